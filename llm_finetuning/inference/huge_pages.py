"""Huge pages: decoding reads every weight for every token, and of pages of 2 MiB a processor reads faster.

In pages of 4 KiB each has to be looked up, and prefetching ends at its end. Only Linux is asked.
"""

import ctypes
from pathlib import Path

MAPS = Path("/proc/self/maps")
LARGE = 2**25
"""Bytes of a mapping from which on it is asked for: 32 MiB, which hold weights."""
HUGEPAGE, COLLAPSE = 14, 25
"""Advice of madvise(2): use huge pages, and move into them now what is there, which Linux knows since 6.1."""


def use() -> None:
    """Moves this process' large blocks of memory into huge pages; where that is not possible, they stay as they are."""
    if not MAPS.is_file():
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int
    for start, size in large_mappings(MAPS.read_text(encoding="utf-8", errors="replace")):
        for advice in (HUGEPAGE, COLLAPSE):
            madvise(start, size, advice)


def large_mappings(maps: str) -> list[tuple[int, int]]:
    """Returns (address, bytes) of the large writable mappings of memory alone, of no file, in a /proc/PID/maps."""
    found = []
    for addresses, permissions, _, _, inode, *_ in map(str.split, maps.splitlines()):
        start, end = (int(address, 16) for address in addresses.split("-"))
        if permissions == "rw-p" and inode == "0" and end - start >= LARGE:
            found.append((start, end - start))
    return found
