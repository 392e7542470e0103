"""Copy a folder file by file so that it survives a lost connection, a full disk and a killed process."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from llm_finetuning.files.checksums import hash_file

CHUNK = 8 * 2**20  # bytes read and written at a time
PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds before each further try after a transport error
FULL = {errno.ENOSPC, errno.EDQUOT}
TRANSPORT = {
    errno.EIO,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
}


def check_space(path: str | Path, needed_bytes: int, what: str) -> int:
    """Free bytes where `path` lies or will lie; OSError (ENOSPC) with the numbers if fewer than needed."""
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


def gigabytes(count: int) -> str:
    """Bytes for people: GB (10^9 bytes) from 0.1 GB on, MB below."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.3f} MB"


def retrying(
    step: Callable[[], object],
    what: str,
    remount: Callable[[], None] | None = None,
    pauses: Iterable[float] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> object:
    """`step()`, tried again after each of `pauses` (seconds) as long as it fails with a transport error.

    Between two tries a lost mount is mounted again. Other errors, a full disk among them, pass at once.
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


def copy_file(source: Path, target: Path, report: Callable[[int], None] = lambda count: None) -> None:
    """Copy `source`, going on behind the bytes that a shorter `target` already has; written to the disk.

    Nothing is compared here: what is read back decides (`is_same`). `report` gets the bytes of each chunk.
    """
    have = target.stat().st_size if target.exists() else 0
    _append(source, target, have if have < source.stat().st_size else 0, report)


def is_same(path: Path, size: int, sha256: str) -> bool:
    """Whether the file has `size` bytes with that hash, read from the disk and not from memory."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    return hash_from_disk(path) == sha256


def _append(source: Path, target: Path, start: int, report: Callable[[int], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as reading, open(target, "r+b" if target.exists() else "xb") as writing:
        reading.seek(start)
        writing.seek(start)
        writing.truncate()
        while chunk := reading.read(CHUNK):
            write_chunk(writing, chunk)
            report(len(chunk))
        writing.flush()
        os.fsync(writing.fileno())


def write_chunk(file, chunk: bytes) -> None:
    """One write; a function of its own so that tests can make it fail."""
    file.write(chunk)


def hash_from_disk(path: Path) -> str:
    """SHA-256 of the file after what memory remembers of it was dropped."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hash_file(path)


def sync_folder(folder: Path) -> None:
    """Have the folder's own entries (names, renames) written to the disk; some mounts cannot, and say EINVAL."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
