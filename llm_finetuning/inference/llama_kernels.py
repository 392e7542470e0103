"""Which of llama.cpp's kernels compute; a file of its own, for a script that needs nothing else of the package."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import write_text

MARK = "amx.sha256"
"""Stands beside llama.cpp's library and holds its hash, where it was compiled so that its AMX kernels run."""


def mark_build() -> None:
    """Notes that the library of llama.cpp was compiled here, with what its AMX kernels need."""
    library = _library()
    if library.is_file():
        write_text(library.with_name(MARK), checksums.hash_file(library))


def amx_is_sound() -> bool:
    """Whether llama.cpp's AMX kernels can be used: its library is the one that `mark_build` saw."""
    library = _library()
    mark = library.with_name(MARK)
    return mark.is_file() and mark.read_text(encoding="utf-8") == checksums.hash_file(library)


def amx_runs() -> bool:
    """Whether they compute on this CPU."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "amx_int8" in flags.read_text(encoding="utf-8", errors="replace") and amx_is_sound()


def _library() -> Path:
    return Path(find_spec("llama_cpp").origin).parent / "lib" / "libggml-cpu.so"


@contextmanager
def safe_kernels(library: ModuleType) -> Iterator[None]:
    """Models that are loaded inside are not repacked for AMX kernels that end the process; other kernels compute them.

    Compiled without the flags of `make gguf`, GCC leaves out most of the configuration that they load, which is a fault
    at the second token of a prompt. Llama has no argument for it; the options of llama.cpp do.
    """
    defaults = library.llama_model_default_params
    options = defaults()
    options.use_extra_bufts = b"AMX_INT8 = 1" not in library.llama_print_system_info() or amx_is_sound()
    library.llama_model_default_params = lambda: options
    try:
        yield
    finally:
        library.llama_model_default_params = defaults
