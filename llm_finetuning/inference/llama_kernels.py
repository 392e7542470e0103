"""Which of llama.cpp's kernels compute; a file of its own, for a script that needs nothing else of the package."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def safe_kernels(library: ModuleType) -> Iterator[None]:
    """Models that are loaded inside are not repacked for AMX, and are computed by the other kernels.

    llama.cpp's AMX kernels end the process, with a fault at the second token of a prompt, on processors that have AMX
    as their virtual machine shows it. Llama has no argument for it; the options of llama.cpp do.
    """
    defaults = library.llama_model_default_params
    options = defaults()
    options.use_extra_bufts = b"AMX_INT8 = 1" not in library.llama_print_system_info()
    library.llama_model_default_params = lambda: options
    try:
        yield
    finally:
        library.llama_model_default_params = defaults
