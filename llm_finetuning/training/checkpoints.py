"""Checkpoints that are complete or absent, kept to a number, mirrored to Drive, and found again.

A checkpoint is written beside its final name, closed with SHA256SUMS and renamed: a folder called
`checkpoint-<step>` is whole. `run.json` inside says what it was trained with.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from llm_finetuning.files import checksums
from llm_finetuning.files.copying import check_space, copy_file, retrying

RUN_FILE = "run.json"
BEST = "best"
"""Folder of the adapter with the lowest held-out loss so far, beside the checkpoints."""
BEST_INSIDE = Path("best", "adapter")
"""The same inside a checkpoint; two levels deep, for Trainer loads any adapter one level below as a second one."""


def finalize(partial: Path, final: Path, run: dict) -> Path:
    """Closes a written checkpoint with what it was trained with and its sums, and gives it its final name."""
    (partial / RUN_FILE).write_text(json.dumps(run, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    checksums.write_checksums(partial)
    _replace(partial, final)
    return final


def step_of(folder: Path) -> int:
    """'checkpoint-120' → 120; anything else → -1."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder` whose every file is what its sums say, oldest first."""
    candidates = sorted((p for p in folder.glob("checkpoint-*") if step_of(p) >= 0), key=step_of)
    return [candidate for candidate in candidates if _is_whole(candidate)]


def _is_whole(folder: Path) -> bool:
    try:
        checksums.verify_checksums(folder)
    except (ValueError, FileNotFoundError):
        return False
    return True


def newest(work: Path, drive: Path) -> Path | None:
    """The newest complete checkpoint, fetched from `drive` when that one is ahead of `work`."""
    here = complete(work) if work.exists() else []
    there = complete(drive) if drive != work and drive.exists() else []
    if there and (not here or step_of(there[-1]) > step_of(here[-1])):
        work.mkdir(parents=True, exist_ok=True)
        return copy_whole(there[-1], work / there[-1].name)
    return here[-1] if here else None


def copy_whole(source: Path, target: Path) -> Path:
    """Copies a complete checkpoint: written beside `target`, checked as read back, then renamed."""
    files = [*checksums.read_checksums(source), checksums.NAME]
    check_space(target.parent, sum((source / name).stat().st_size for name in files), target.name)
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for name in files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        retrying(lambda name=name: copy_file(source / name, partial / name), f"Copying {name}")
    checksums.verify_checksums(partial)
    _replace(partial, target)
    return target


def keep_newest(folder: Path, limit: int) -> None:
    """Removes all but the `limit` newest checkpoints, and what an interrupted save left behind."""
    kept = sorted((p for p in folder.glob("checkpoint-*") if step_of(p) >= 0), key=step_of)
    for old in kept[:-limit]:
        _remove(old)


def clear_partial(folder: Path) -> None:
    """Removes what a save that was cut off left behind; call it when no save is under way."""
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def set_aside(folder: Path) -> Path | None:
    """Moves earlier checkpoints out of the way of a fresh start, without deleting them."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}-before-{n}").exists())
    aside = folder.with_name(f"{folder.name}-before-{number}")
    folder.rename(aside)
    return aside


def keep_best(write: Callable[[Path], None], folder: Path) -> None:
    """Has an adapter written to `folder`/best, whole or not at all."""
    partial = folder / f".partial-{BEST}"
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    _replace(partial, folder / BEST)


def store_best(partial: Path, folder: Path) -> None:
    """The best adapter so far goes into a checkpoint that is being written: it comes back with it."""
    if (folder / BEST).exists():
        shutil.copytree(folder / BEST, partial / BEST_INSIDE)


def restore_best(start: Path | None, folder: Path) -> None:
    """Makes `folder`/best what it was when the checkpoint `start` was written; none for a fresh start.

    Call it after `clear_partial`.
    """
    if (folder / BEST).exists():
        _remove(folder / BEST)
    if start is not None and (start / BEST_INSIDE).exists():
        shutil.copytree(start / BEST_INSIDE, folder / f".partial-{BEST}")
        os.replace(folder / f".partial-{BEST}", folder / BEST)


def _replace(partial: Path, final: Path) -> None:
    if final.exists():
        _remove(final)
    os.replace(partial, final)


def _remove(folder: Path) -> None:
    """Takes the final name away first: a removal that is cut off leaves nothing half there under it."""
    going = folder.with_name(f".partial-removed-{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def check_same_run(checkpoint: Path, run: dict) -> None:
    """Raises ValueError naming every setting in which `run` differs from what the checkpoint was trained with."""
    before = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    changed = [
        f"{name}: {before.get(name)!r} in the checkpoint, {value!r} now"
        for name, value in run.items()
        if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} cannot be continued with other settings:\n"
            + "\n".join(changed)
            + "\nSet them back, or set resume = False to start afresh (old checkpoints are moved aside, not deleted)."
        )


class Mirror:
    """Copies finished checkpoints to Drive in the background; a lost Drive never ends training."""

    def __init__(self, work: Path, drive: Path, limit: int):
        self.work, self.drive, self.limit = work, drive, limit
        self.problem: str | None = None
        self._waiting: Path | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def send(self, checkpoint: Path) -> None:
        """Starts copying `checkpoint`; while a copy runs only the newest one waits."""
        if self.work == self.drive:
            return
        with self._lock:
            self._waiting = checkpoint
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._copy, name="checkpoint-mirror")
                self._thread.start()

    def _copy(self) -> None:
        while True:
            with self._lock:
                checkpoint, self._waiting = self._waiting, None
                if checkpoint is None:
                    self._thread = None
                    return
            try:
                self.drive.mkdir(parents=True, exist_ok=True)
                copy_whole(checkpoint, self.drive / checkpoint.name)
                keep_newest(self.drive, self.limit)
                self.problem = None
            except (OSError, ValueError) as error:
                self.problem = f"{checkpoint.name} is not on Drive yet: {error}"

    def wait(self) -> None:
        """Returns when nothing is being copied any more."""
        thread = self._thread
        if thread is not None:
            thread.join()
