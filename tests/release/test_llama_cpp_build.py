"""How llama.cpp is compiled: its AMX kernels find the tile configuration that they wrote."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from llm_finetuning.release import llama_cpp_tools

PROGRAM = r"""
#include <immintrin.h>
#include <cstdint>
#include <cstdio>
struct configuration {
    uint8_t palette = 0, start = 0, reserved[14] = {0};
    uint16_t columns[16] = {0};
    uint8_t rows[16] = {0};
};
static inline void load() {
    alignas(64) configuration c = {};
    c.palette = 1;
    for (int tile = 0; tile < 8; tile++) { c.rows[tile] = tile < 2 ? 8 : 16; c.columns[tile] = 64; }
    _tile_loadconfig(&c);
}
int main() {
    alignas(64) volatile unsigned char garbage[4096];
    for (int i = 0; i < 4096; i++) garbage[i] = 0xff;
    load();
    alignas(64) configuration found;
    _tile_storeconfig(&found);
    for (int tile = 0; tile < 8; tile++) printf("%d x %d\n", found.rows[tile], found.columns[tile]);
}
"""
CPU = Path("/proc/cpuinfo")
needs_amx = pytest.mark.skipif(
    not CPU.is_file() or "amx_tile" not in CPU.read_text() or not shutil.which("g++"), reason="needs AMX and g++"
)


@needs_amx
def test_the_compiler_keeps_all_of_a_tile_configuration(tmp_path):
    (cxx,) = [option for option in shlex.split(llama_cpp_tools.AMX_FLAGS) if "CXX_FLAGS" in option]
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    options = ["-O3", "-march=native", *cxx.partition("FLAGS=")[2].split()]
    subprocess.run(["g++", *options, str(source), "-o", str(program)], check=True)
    loaded = subprocess.run([program], capture_output=True, text=True)
    assert loaded.returncode == 0
    assert loaded.stdout.splitlines() == ["8 x 64"] * 2 + ["16 x 64"] * 6
