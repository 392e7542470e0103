"""llama.cpp where it is installed: its Python module, and its own programs, built from its source package.

    python tests/support/llama_programs.py

builds llama-server and llama-cli, which no package brings ready, from the source that `make gguf` unpacks: once, some
minutes, into a folder that git ignores. `make test-gguf` does both.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".readers" / "llama.cpp"
NAMES = ("llama-server", "llama-cli")
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=OFF",
    "GGML_NATIVE=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
)


@pytest.fixture(scope="session")
def llama_cpp():
    """The module llama_cpp; the test is skipped without it or without llama.cpp's converters."""
    from llm_finetuning.release import llama_cpp_tools

    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: run `make gguf`")
    try:
        llama_cpp_tools.converter()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return library


def program(name: str) -> str:
    """The path of one of NAMES: in the folder LLAMA_CPP_PROGRAMS, built here, or on PATH; else the test is skipped."""
    places = [os.environ.get("LLAMA_CPP_PROGRAMS", ""), FOLDER / "bin"]
    found = [path for place in places if place and (path := shutil.which(name, path=str(place)))] + [shutil.which(name)]
    return found[0] or pytest.skip(f"{name} is not here: run `make test-gguf`, or set LLAMA_CPP_PROGRAMS to its folder")


def build() -> None:
    """Builds NAMES, for any processor of this kind, without the server's page."""
    from llm_finetuning.release import llama_cpp_tools

    source = llama_cpp_tools.converter().parent
    subprocess.run(["cmake", "-S", source, "-B", FOLDER, *(f"-D{option}" for option in OPTIONS)], check=True)
    cores = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", FOLDER, "--parallel", cores, "--target", *NAMES], check=True)


if __name__ == "__main__":
    build()
