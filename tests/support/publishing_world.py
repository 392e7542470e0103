"""A small finished folder, its versions, and writes that fail on demand, for the publishing tests."""

import errno
import os
import random
from pathlib import Path

from llm_finetuning.files import checksums

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def finished(folder: Path, version: int, size: int = 5000) -> Path:
    """A finished folder whose files all differ between versions."""
    noise = random.Random(version)
    (folder / "deeper").mkdir(parents=True)
    for name in SHARDS:
        (folder / name).write_bytes(noise.randbytes(size))
    (folder / "config.json").write_text(f'{{"version": {version}}}')
    (folder / "deeper" / "notes.txt").write_text(f"version {version}")
    checksums.write_checksums(folder)
    return folder


def version_at(target: Path) -> int | None:
    """Which version stands there; it must be complete."""
    if not target.exists():
        return None
    checksums.verify_checksums(target)
    return int((target / "config.json").read_text().split(":")[1].strip(" }"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


class FailingWrites:
    """Stands for `copying.write_chunk`: the calls in `at` write half of their chunk, then fail."""

    def __init__(self, number: int, at: range):
        self.number, self.at, self.calls, self.written = number, at, 0, 0

    def __call__(self, file, chunk: bytes) -> None:
        self.calls += 1
        if self.calls in self.at:
            file.write(chunk[: len(chunk) // 2])
            raise OSError(self.number, os.strerror(self.number))
        file.write(chunk)
        self.written += len(chunk)


DISK_FULL, IO_ERROR, NOT_CONNECTED = errno.ENOSPC, errno.EIO, errno.ENOTCONN
