"""Replacing a published folder atomically, on Drive or a disk: `publish` does it for the model and the adapter.

What an interrupted run may leave beside `finetuned_phi2`, all cleared up by the next one:
    .finetuned_phi2.partial-<id>   a copy that is not complete; <id>: first digits of its list's hash
    .finetuned_phi2.previous       the last good version, until the new one is verified in its place; on Drive until the
                                   next publishing, for the new one may still be on its way there
    .finetuned_phi2.lock           who is publishing
"""

import contextlib
import errno
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from llm_finetuning import colab
from llm_finetuning.files import checksums, drive
from llm_finetuning.files.copying import FULL, TRANSPORT, VerifiedCopy, check_space, gigabytes, retrying, sync_folder
from llm_finetuning.release.lock import Lock
from llm_finetuning.release.safety import check_no_pickles, check_no_tokens

SPARE = 16 * 2**20  # bytes left free beside the copy, for folders, logs and what rounding takes


def replace_published(source: str | Path, target: str | Path, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Replaces `target` by a verified copy of the folder `source` with its SHA256SUMS; returns `target`.

    Either all of `source` stands under `target` afterwards, or what stood there before. An interrupted copy is
    continued by the next call; transport errors are tried again with growing pauses; a second run waits for the first.
    On Drive it is read back from the mount, and uploaded later. `sleep`: takes seconds.

    Where `target` is a symbolic link, the folder that it leads to is replaced. The source is read once, while it is
    copied: what is damaged in it differs from its list when the copy is read back.

    Raises FileNotFoundError or ValueError for a source that is not complete, or a target that holds something
    else; OSError when the disk is full or the connection stays lost, with what to do.
    """
    source, given = Path(source), Path(target)
    target = _led_to(given)
    checksums.verify_checksums(source, contents=False)
    check_no_pickles(source)
    check_no_tokens(source)
    job = _Job(source, target, sleep)
    try:
        job.retry(lambda: drive.make_parent(target), "Making the folder")
        with job.retry(job.lock.take, "Locking the folder"):
            job.run()
    except OSError as error:
        raise _explained(error, job) from error
    if job.on_drive:
        print(f"{target}: written and read back, its upload is pending. {job.said_of_previous()}".rstrip())
    return given


def _led_to(target: Path) -> Path:
    """Where a symbolic link leads to; any other path as it is. Raises ValueError for links that lead in a circle."""
    try:
        real = target.resolve() if target.is_symlink() else target
    except RuntimeError:  # of a circle; Python 3.13 gives a link of it back
        real = target
    if real.is_symlink():
        raise ValueError(f"{target} is a link that leads in a circle: remove it, or publish to another folder")
    return real


class _Job(VerifiedCopy):
    """One publication; the steps of `run` read from top to bottom."""

    def __init__(self, source: Path, target: Path, sleep: Callable[[float], None]):
        digits = checksums.hash_file(source / checksums.NAME)[:12]
        super().__init__(source, target.parent / f".{target.name}.partial-{digits}")
        self.target, self.on_drive, self.sleep = target, drive.on_drive(target), sleep
        self.lock = Lock(target.parent / f".{target.name}.lock", sleep)
        self.previous = target.parent / f".{target.name}.previous"

    def run(self) -> None:
        self.retry(self.recover, "Looking at what is there")
        self.retry(self.check_target, "Looking at what is there")
        if self.retry(self.is_published, "Looking at what is there"):
            return
        self.retry(self.remove_other_partials, "Clearing up")
        self.fill()
        self.retry(self.lock.confirm, "Looking at the lock")
        self.retry(self.swap, "Putting the new version in its place")
        if self.on_drive:
            self.verify_in_place()
        else:
            self.retry(self.drop_previous, "Removing the version before")

    def retry(self, step: Callable[[], object], what: str) -> object:
        remount = functools.partial(colab.mount_drive, again=True)
        return retrying(step, what, remount if self.on_drive else None, sleep=self.sleep)

    def said_of_previous(self) -> str:
        return f"The version before stays in {self.previous} until the next one." if self.previous.exists() else ""

    def check_target(self) -> None:
        if not self.target.exists():
            return
        if self.source.samefile(self.target):  # whatever it is called: in other letters, or through a link
            raise ValueError(f"{self.source} is both source and target. Publish to another folder.")
        foreign = f"holds files but no {checksums.NAME}"
        if not self.target.is_dir():
            foreign = "is a file"
        elif not any(self.target.iterdir()) or (self.target / checksums.NAME).exists():
            return
        raise ValueError(
            f"{self.target} {foreign}, so it was not published from here and is left alone. Move it away, or publish"
            " under another name."
        )

    def recover(self) -> None:
        """Finishes or undoes what a killed run left between its two renames."""
        if not self.previous.exists():
            return
        if not checksums.is_complete(self.target) and checksums.is_complete(self.previous):
            if self.target.exists():
                drive.remove(self.target)
            os.rename(self.previous, self.target)
        self.drop_previous()

    def is_published(self) -> bool:
        return self.is_same(self.target, checksums.NAME) and checksums.is_complete(self.target)

    def remove_other_partials(self) -> None:
        for folder in self.target.parent.glob(f".{self.target.name}.partial-*"):
            if folder != self.partial:
                drive.remove(folder)

    def copy(self, names: list[str]) -> None:
        self.check_room()
        total = sum(self.sizes[name] for name in names)
        units = {"unit": "B", "unit_scale": True, "delay": 2, "mininterval": 2, "file": sys.stdout}
        with tqdm(total=total, desc=f"Publishing {self.target.name}", **units) as bar:

            def report(count: int) -> None:
                self.lock.beat()
                bar.update(count)

            super().copy(names, report)

    def check_room(self) -> None:
        """Checks the free space for what is left to copy, at the target and on the disk that caches Drive's uploads."""
        copied = sum((self.partial / name).stat().st_size for name in self.sizes if (self.partial / name).exists())
        needed = max(0, sum(self.sizes.values()) - copied) + SPARE
        for place in [self.target.parent, *([drive.CACHE] if self.on_drive else [])]:
            check_space(place, needed, f"Publishing {self.source.name}")

    def swap(self) -> None:
        """Renames twice; between the two the last good version stands beside under `previous` (see `recover`)."""
        if self.target.exists() and self.partial.exists():
            os.rename(self.target, self.previous)
        if self.partial.exists():
            os.rename(self.partial, self.target)
        sync_folder(self.target.parent)

    def verify_in_place(self) -> None:
        """Verifies the copy on Drive again under its final name; if that fails, the version before comes back."""
        try:
            self.retry(lambda: checksums.verify_checksums(self.target), f"Checking {self.target.name}")
        except (ValueError, FileNotFoundError):
            self.retry(self.swap_back, "Putting the version before back")
            raise

    def swap_back(self) -> None:
        if self.target.exists():
            os.rename(self.target, self.partial)
        if self.previous.exists():
            os.rename(self.previous, self.target)

    def drop_previous(self) -> None:
        """Removes the version before; what somebody else had put into it is kept under a visible name."""
        if not self.previous.exists():
            return
        listed, names = {}, checksums.files_below(self.previous)
        with contextlib.suppress(ValueError, FileNotFoundError):  # damaged: all that it holds is kept
            listed = checksums.read_checksums(self.previous)
        others = [name for name in names if name not in listed]
        for name in set(names) & set(listed):
            drive.remove(self.previous / name)
        (self.previous / checksums.NAME).unlink(missing_ok=True)  # last: until then this can be continued
        if any(not checksums.is_hidden(name) for name in others if name != checksums.NAME):
            kept = self.target.parent / f"{self.target.name}.kept-{time.time():.0f}"
            os.rename(self.previous, kept)
            print(f"The version before held files that were not published from here; they are in {kept}.")
        else:
            drive.remove(self.previous)


def _explained(error: OSError, job: _Job) -> OSError:
    """The same error number with what happened, what was left alone and what to do next."""
    found = (error.strerror or str(error)).rstrip(".")
    kept = f"Nothing new stands under {job.target.name}; what was published before is kept, and {job.source} is whole."
    again = f"run this cell again: it goes on with what lies in {job.partial}"
    if error.errno in FULL:
        size = gigabytes(sum(job.sizes.values()))
        cure = f"Free space in {job.target.parent} (on Drive empty the bin too), then {again}"
        return type(error)(error.errno, f"{found}. The whole copy takes {size}. {kept} {cure}")
    if isinstance(error, ConnectionError) and error.errno is None:  # Colab could not mount Drive again
        return type(error)(errno.ENOTCONN, f"The connection to Drive was lost. {found}. {kept} Then {again}")
    if error.errno in TRANSPORT:
        lost = f"The connection to {job.target.parent} stayed lost ({found}). {kept}"
        return type(error)(error.errno, f"{lost} When that folder opens again, {again}")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return type(error)(error.errno, f"{job.target.parent} cannot be written. {kept} Choose another folder")
    return error
