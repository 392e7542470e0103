"""llama.cpp, the optional extra: where its converters are, how it is installed, and how its programs are run."""

import importlib
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

from llm_finetuning.files.atomic import building
from llm_finetuning.inference import llama_kernels

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / ".gguf"
"""Where `install` unpacks the source package of llama-cpp-python."""
REQUIREMENTS = ROOT / "requirements-gguf.txt"
FLAGS = "-DLLAVA_BUILD=OFF"
AMX_FLAGS = "'-DCMAKE_CXX_FLAGS=-fno-dse -fno-tree-dse'"
"""For GCC on Linux: without it GCC drops most of the tile configuration that llama.cpp's AMX kernels load, because its
header says that the instruction reads 8 of the 64 bytes, so that writing the others looks useless."""


def converter(name: str = "convert_hf_to_gguf.py") -> Path:
    """Finds one of llama.cpp's converters, in the folder LLAMA_CPP or in what `install` unpacked."""
    folders = sources()
    if not folders:
        raise FileNotFoundError(
            "llama.cpp's converter is not here. Run `make gguf` (it builds llama-cpp-python, 5 to 9 minutes on "
            "2 cores), or set LLAMA_CPP to a checkout of llama.cpp."
        )
    return folders[0] / name


def sources() -> list[Path]:
    """The folders that hold llama.cpp's source with its converters, the one to be used first."""
    places = [Path(os.environ["LLAMA_CPP"])] if "LLAMA_CPP" in os.environ else []
    places += sorted(UNPACKED.glob("llama_cpp_python-*/vendor/llama.cpp"))
    return [place for place in places if (place / "conversion").is_dir()]


def prepare(types: str) -> None:
    """Installs llama.cpp where the settings ask for GGUF files, before anything else takes its time."""
    if types:
        install()


def install() -> None:
    """Installs what is missing of llama-cpp-python, its source package with the converters, and sentencepiece."""
    if not (find_spec("llama_cpp") and sources()):
        print("Building llama.cpp: 5 to 9 minutes on 2 cores, once.", flush=True)
        _build()
    if not find_spec("sentencepiece"):
        _pip("install", "-r", str(REQUIREMENTS))


def _build() -> None:
    with building(UNPACKED) as partial:
        source = ["--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python" + _version()]
        _pip("download", "--dest", str(partial), *source)
        (archive,) = partial.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(partial, filter="data")
        archive.unlink()
    (package,) = UNPACKED.iterdir()
    _pip("install", str(package))
    importlib.invalidate_caches()
    llama_kernels.mark_build()


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    flags = f"{FLAGS} {AMX_FLAGS}" if sys.platform == "linux" else FLAGS
    subprocess.run(command, check=True, env=os.environ | {"CMAKE_ARGS": flags})


def _version() -> str:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("llama-cpp-python")).removeprefix("llama-cpp-python")


def run(arguments: list[str | Path], problem: str) -> None:
    """Runs Python with `arguments`; an interrupt ends it too. Raises ValueError with `problem` where it fails."""
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{problem}:\n" + "\n".join((result.stderr or result.stdout).splitlines()[-5:]))


if __name__ == "__main__":
    install()
