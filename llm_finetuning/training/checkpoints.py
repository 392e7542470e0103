"""Checkpoints: written atomically, kept to a number, mirrored to Drive, and found again.

A folder called `checkpoint-<step>` is complete: it is written under another name, closed with SHA256SUMS and renamed.
`run.json` inside says what it was trained with.
"""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import building, remove_folder, replace_folder, write_text
from llm_finetuning.files.copying import copy_folder, retrying
from llm_finetuning.files.drive import check_mounted, make_parent

RUN_FILE = "run.json"
CHANGED = {
    "base": "the base's weights changed",
    "tokenizer": "the tokenizer changed",
    "chat_template": "the chat template or its system message changed",
    "rows_sha256": "the training pairs changed, or what they are encoded to",
    "adapter": "the adapter that the run starts from changed",
    "held_out": "the held-out set changed (the validation file, eval_pairs)",
}
"""What a checkpoint notes as a checksum, in words."""
NOT_NOTED = {
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": "default",
    "loraplus_lr_ratio": 1.0,
    "neftune_noise_alpha": 0.0,
}
"""What the checkpoints of versions that did not note it were trained with; anything else counts as unchanged."""
BEST = "best"
"""Folder of the adapter with the lowest held-out loss so far, beside the checkpoints."""
BEST_INSIDE = Path("best", "adapter")
"""The same inside a checkpoint; two levels deep, for Trainer loads any adapter one level below as a second one."""


def finalize(partial: Path, final: Path, run: dict) -> Path:
    """Completes a written checkpoint with what it was trained with and its checksums, and gives it its final name."""
    (partial / RUN_FILE).write_text(json.dumps(run, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    checksums.write_checksums(partial)
    replace_folder(partial, final)
    return final


def step_of(folder: Path) -> int:
    """'checkpoint-120' → 120; anything else → -1."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, nothing compared."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder` whose files are all as their checksums say, oldest first."""
    return [checkpoint for checkpoint in found(folder) if checksums.is_complete(checkpoint)]


def newest(work: Path, drive: Path) -> Path | None:
    """The newest complete checkpoint, fetched from `drive` when that one is ahead of `work`.

    Damaged ones are passed over by name. Raises ValueError when all are damaged, and OSError when `drive` cannot be
    read and nothing lies in `work`: a run that began afresh would take the place of what is there.
    """
    try:
        check_mounted(drive)
        places = (work,) if drive == work else (work, drive)
        start, damaged = retrying(lambda: _newest_complete(*places), f"Reading {drive}")
    except OSError as error:
        start, damaged = _newest_complete(work)
        if start is None:
            cure = "mount the Drive again and run this cell again"
            raise OSError(
                error.errno, f"{drive} cannot be read for a checkpoint to go on from ({error}): {cure}"
            ) from None
        print(f"{drive} cannot be read ({error}): going on from what is here")
    damaged = [path for path in reversed(damaged) if path.parent == work]
    if damaged and start is None:
        raise ValueError(
            f"the files of {', '.join(map(str, damaged))} are not those that were written, and there is no other"
            " checkpoint to go on from. Bring an undamaged copy back, or set resume = False to start afresh (old"
            " checkpoints are moved aside, not deleted)"
        )
    if damaged:
        print(f"passed over, for its files are not those that were written: {', '.join(path.name for path in damaged)}")
    if start is None or start.parent == work:
        return start
    make_parent(work / start.name)
    return copy_folder(start, work / start.name)


def _newest_complete(*folders: Path) -> tuple[Path | None, list[Path]]:
    """(the newest complete checkpoint in `folders`, the damaged ones that are newer).

    To compare one is to hash gigabytes, so none is that is older than the first complete one. Where both folders have
    a step, the first folder's is looked at first.
    """
    damaged: list[Path] = []
    for checkpoint in sorted((path for folder in folders for path in found(folder)), key=step_of, reverse=True):
        if checksums.is_complete(checkpoint):
            return checkpoint, damaged
        damaged.append(checkpoint)
    return None, damaged


def newest_run(work: Path, drive: Path) -> dict | None:
    """What the newest checkpoint, here or on Drive, was trained with; None where there is none.

    One that Drive did not upload to its end, or that is damaged, is passed over.
    """
    check_mounted(drive)
    files = [checkpoint / RUN_FILE for folder in (work, drive) for checkpoint in found(folder)]
    runs = [run for file in files if file.is_file() and (run := _run_in(file))]
    return runs[-1] if runs else None


def _run_in(file: Path) -> dict | None:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return run if isinstance(run, dict) else None


def newest_step(work: Path, drive: Path) -> int:
    """The step of the newest checkpoint, here or on Drive; 0 where there is none."""
    return max((step_of(checkpoint) for folder in (work, drive) for checkpoint in found(folder)), default=0)


def keep_newest(folder: Path, limit: int) -> None:
    """Removes all but the `limit` newest checkpoints."""
    for old in found(folder)[:-limit]:
        remove_folder(old)


def set_aside(folder: Path) -> Path | None:
    """Moves earlier checkpoints out of the way of a fresh start, without deleting them."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}-before-{n}").exists())
    aside = folder.with_name(f"{folder.name}-before-{number}")
    folder.rename(aside)
    return aside


def keep_best(write: Callable[[Path], None], folder: Path) -> None:
    """Has an adapter written to `folder`/best, atomically."""
    with building(folder / BEST) as partial:
        write(partial)


def store_extras(partial: Path, folder: Path, metrics: Path) -> None:
    """Copies the best adapter so far and the metrics into a checkpoint that is being written."""
    if (folder / BEST).exists():
        shutil.copytree(folder / BEST, partial / BEST_INSIDE)
    if metrics.exists():
        shutil.copy(metrics, partial / metrics.name)


def restore_extras(start: Path | None, folder: Path, metrics: Path, drive: Path, best: bool = True) -> None:
    """Makes `folder`/best and the metrics what they were when the checkpoint `start` was written; none without one.

    best: False leaves the best adapter out, where another held-out set chose it.
    Earlier versions kept the metrics in `drive` and not in the checkpoints.
    """
    if (folder / BEST).exists():
        remove_folder(folder / BEST)
    if start is not None and best and (start / BEST_INSIDE).exists():
        with building(folder / BEST) as partial:
            shutil.copytree(start / BEST_INSIDE, partial, dirs_exist_ok=True)
    places = [start / metrics.name, metrics, drive / metrics.name] if start is not None else []
    if source := next((place for place in places if place.exists()), None):
        write_text(metrics, source.read_text(encoding="utf-8"))


def check_same_run(checkpoint: Path, run: dict, optional: str = "") -> bool:
    """Raises ValueError naming every setting in which `run` differs from what the checkpoint was trained with.

    optional: one that may differ; returns whether it does.
    """
    return compare(checkpoint, json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8")), run, optional)


def compare(checkpoint: Path, before: dict, run: dict, optional: str = "") -> bool:
    """`check_same_run` for what a checkpoint notes of its run; checkpoint: it, or the folder of them."""
    before = NOT_NOTED | before
    differing = {name: value for name, value in run.items() if before.get(name, value) != value}
    changed = [
        CHANGED.get(name, f"{name}: {before.get(name)!r} in the checkpoint, {value!r} now")
        for name, value in differing.items()
        if name != optional
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} cannot be continued with other settings:\n"
            + "\n".join(changed)
            + "\nSet them back, or set resume = False to start afresh (old checkpoints are moved aside, not deleted)."
        )
    return optional in differing


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
                make_parent(self.drive / checkpoint.name)
                copy_folder(checkpoint, self.drive / checkpoint.name)
                keep_newest(self.drive, self.limit)
                self.problem = None
            except (OSError, ValueError) as error:
                if self.problem is None:
                    print(f"{checkpoint.name} could not be copied to Drive ({error}): training goes on")
                self.problem = f"{checkpoint.name} is not on Drive yet: {error}"

    def wait(self) -> None:
        """Returns when nothing is being copied any more."""
        thread = self._thread
        if thread is not None:
            thread.join()
