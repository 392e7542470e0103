"""Verified copies of folders, which survive a lost connection, a full disk and a killed process."""

import errno
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from llm_finetuning.files import checksums, drive
from llm_finetuning.files.atomic import partial_name, replace_folder

CHUNK = 8 * 2**20  # bytes read and written at a time
PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds before each further try after a transport error


def _numbers(*names: str) -> set[int]:
    """Returns the numbers of errors of the system; not every system has each."""
    return {getattr(errno, name) for name in names if hasattr(errno, name)}


FULL = _numbers("ENOSPC", "EDQUOT")
TRANSPORT = _numbers(
    *("EIO", "ENOTCONN", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EREMOTEIO", "ECONNRESET", "ECONNABORTED")
)


def check_space(path: str | Path, needed_bytes: int, what: str) -> int:
    """Returns the free bytes where `path` lies or will lie. Raises OSError (ENOSPC) if they are fewer than needed."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {gigabytes(needed_bytes)}, and {there} has {gigabytes(free)} free. "
            f"Free {gigabytes(needed_bytes - free)} there (on Drive empty the bin too), "
            "or choose another folder",
        )
    return free


WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a write may raise: torch.save and safetensors have errors of their own for a full disk."""


def is_full(error: BaseException, folder: Path | None = None, needed_bytes: int = 0) -> bool:
    """Whether one of WRITE_ERRORS comes of a full disk: it says so, or `folder` has less room than was needed.

    torch.save's errors do not name the cause.
    """
    if getattr(error, "errno", None) in FULL or "No space left on device" in str(error):
        return True
    return folder is not None and shutil.disk_usage(folder).free < needed_bytes


def gigabytes(count: int) -> str:
    """Formats a number of bytes: in GB (10^9 bytes) from 0.1 GB on, in MB below."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.3f} MB"


def retrying(
    step: Callable[[], object],
    what: str,
    remount: Callable[[], None] | None = None,
    pauses: Iterable[float] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> object:
    """Calls `step`, and again after each of `pauses` (seconds) as long as it fails with a transport error.

    Between two tries a lost mount is mounted again. Other errors, a full disk among them, are raised at once.
    """
    for pause in pauses:
        try:
            return step()
        except OSError as error:
            if error.errno not in TRANSPORT:
                raise
            print(f"{what}: {error.strerror or error} (errno {error.errno}). Next try in {pause:g} s.")
            lost = error.errno == errno.ENOTCONN
        sleep(pause)
        if lost and remount:
            remount()
    return step()


class VerifiedCopy:
    """Copies the files that `source` lists in its SHA256SUMS until each reads back from `partial` as listed.

    What an interrupted copy left in `partial` is continued.
    """

    def __init__(self, source: Path, partial: Path):
        self.source, self.partial = source, partial
        listed = checksums.read_checksums(source)
        self.hashes = listed | {checksums.NAME: checksums.hash_file(source / checksums.NAME)}  # the list goes last
        self.sizes = {name: (source / name).stat().st_size for name in self.hashes}

    def fill(self) -> None:
        """Copies what differs: continued at first, then afresh, then once more. Raises ValueError if it still does.

        A copy that differs may be of a source that is damaged: it is compared then, and not before every copy.
        """
        for tries in range(3):
            if not (names := self.retry(self.differing, f"Checking {self.partial.name}")):
                return
            if tries:
                self.retry(lambda: checksums.verify_checksums(self.source), f"Checking {self.source.name}")
            self.copy(names)
        if names := self.retry(self.differing, f"Checking {self.partial.name}"):
            cure = "Publish to another disk, or check this one."
            if drive.on_drive(self.partial):
                cure = "Let Drive upload what it has (the finetuning notebook's last cell), then run all cells again."
            raise ValueError(
                f"{', '.join(names)} did not read back from {self.partial} as written, copied three times. The version"
                f" before is untouched, and {self.source} is whole. {cure}"
            )

    def differing(self) -> list[str]:
        """Names of the files that `partial` does not hold with their size and hash."""
        return [name for name in self.hashes if not self.is_same(self.partial, name)]

    def is_same(self, folder: Path, name: str) -> bool:
        """Whether `folder` holds the file with its size and hash, read from the disk and not from memory."""
        path = folder / name
        return path.is_file() and path.stat().st_size == self.sizes[name] and hash_from_disk(path) == self.hashes[name]

    def copy(self, names: list[str], report: Callable[[int], None] = lambda count: None) -> None:
        """Copies files once, without a comparison; `report` gets the number of bytes of each chunk."""
        for name in names:
            step = functools.partial(copy_file, self.source / name, self.partial / name, report)
            self.retry(step, f"Copying {name}")

    def retry(self, step: Callable[[], object], what: str) -> object:
        return retrying(step, what)


def copy_folder(source: Path, target: Path) -> Path:
    """Copies a folder with its SHA256SUMS atomically: under `target` it is complete, as read back from the disk."""
    copy = VerifiedCopy(source, partial_name(target))
    check_space(target.parent, sum(copy.sizes.values()), target.name)
    drive.remove(copy.partial, ignore_errors=True)  # of a killed process; it may be a copy of another folder
    copy.fill()
    replace_folder(copy.partial, target)
    return target


def copy_file(source: Path, target: Path, report: Callable[[int], None]) -> None:
    """Copies `source` to the disk, continuing behind the bytes that a shorter `target` already has."""
    have = target.stat().st_size if target.exists() else 0
    start = have if have < source.stat().st_size else 0
    drive.make_parent(target)
    with open(source, "rb") as reading, open(target, "r+b" if target.exists() else "xb") as writing:
        reading.seek(start)
        writing.seek(start)
        writing.truncate()
        while chunk := reading.read(CHUNK):
            write_chunk(writing, chunk)
            report(len(chunk))
        writing.flush()
        os.fsync(writing.fileno())


def write_chunk(file: BinaryIO, chunk: bytes) -> None:
    """Writes once; a function of its own so that tests can make it fail."""
    file.write(chunk)


def hash_from_disk(path: Path) -> str:
    """Returns the SHA-256 of a file as it lies on the disk: its pages are dropped from memory first."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return checksums.hash_file(path)


def sync_folder(folder: Path) -> None:
    """Writes the entries of a folder (names, renames) to the disk; some mounts cannot, and answer EINVAL.

    Windows opens no folders, and writes their entries itself.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
