"""Weights in huge pages: found among the mappings of a process, and unchanged by the move."""

import re
from pathlib import Path

import pytest
import torch

from llm_finetuning.inference import huge_pages

MAPS = """\
55d0a0a00000-55d0a0c00000 r-xp 00000000 08:02 173521                     /usr/bin/python3.11
55d0a2e4c000-55d0b2e4c000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0003ffe000 rw-p 00000000 00:00 0
7f1000000000-7f1000021000 rw-p 00000000 00:00 0
7f2000000000-7f2080000000 r--s 00000000 08:02 9701                       /models/a folder/model 1.safetensors
7f3000000000-7f3080000000 rw-p 00000000 08:02 9702                       /models/private.bin
7f4000000000-7f4080000000 ---p 00000000 00:00 0
7f5000000000-7f5004000000 rw-p 00000000 00:00 0                          [anon:glibc: malloc arena]
7ffd1c9f6000-7ffd1ca17000 rw-p 00000000 00:00 0                          [stack]
"""
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_only_large_writable_memory_of_no_file_is_moved():
    sizes = [(0x55D0A2E4C000, 2**28), (0x7F0000000000, 0x3FFE000), (0x7F5000000000, 2**26)]
    assert huge_pages.large_mappings(MAPS) == sizes


def test_what_lies_in_memory_is_the_same_afterwards():
    weights = torch.arange(2**24)
    huge_pages.use()
    assert torch.equal(weights, torch.arange(2**24))


@pytest.mark.skipif(
    not SWITCH.is_file() or "[never]" in SWITCH.read_text(), reason="huge pages are switched off, or this is no Linux"
)
def test_large_tensors_lie_in_huge_pages():
    def huge() -> int:
        return sum(map(int, re.findall(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps").read_text())))

    before = huge()
    weights = torch.zeros(2**25)
    huge_pages.use()
    assert huge() >= before + 0.8 * weights.nbytes / 1024


def test_another_system_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda name: pytest.fail("asked"))
    huge_pages.use()
