"""What a run writes, where, and at which stage: counted before it starts, against what is free on each disk."""

import errno
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.constants import HF_HUB_CACHE

from llm_finetuning.files import drive
from llm_finetuning.files.copying import gigabytes

if TYPE_CHECKING:
    from llm_finetuning.training.planning import Plan


@dataclass(frozen=True)
class Need:
    """Bytes that a run writes to a folder: while it merges, and while it publishes."""

    place: Path
    what: str
    merging: int
    publishing: int
    replaced: str = ""
    """What of an earlier run in `place` goes before that, or is gone on with, as a pattern."""

    def beside(self) -> "Need":
        """The need less what is replaced."""
        there = sum(map(size_of, self.place.glob(self.replaced))) if self.replaced else 0
        return replace(self, merging=max(0, self.merging - there), publishing=max(0, self.publishing - there))


def work_needs(plan: "Plan") -> list[Need]:
    """What a run writes to the local disk: one checkpoint more than are kept, the adapter, and the merged models.

    While it merges the 4-bit weights lie beside these, in 4.5 bits each with their constants.
    """
    folders, size = plan.settings.folders, plan.size
    merged = (4 if plan.settings.merge_base == "best" else 2) * size.total
    if plan.four_bit and plan.settings.merge_base != "original":
        merged += size.linear * 9 // 16
    return [
        _checkpoints(plan, folders.work),
        Need(folders.work, "the adapter", 4 * size.adapter, 4 * size.adapter),
        Need(folders.work, "the merged model", merged, 2 * size.total, folders.merged.name),
    ]


def result_needs(plan: "Plan") -> list[Need]:
    """What a run writes to the folder of the results: copies of checkpoints and adapter, its zip, the model.

    Where no Drive is in use checkpoints and adapter lie there already. The model before stays beside the new one.
    """
    folders, size = plan.settings.folders, plan.size
    needs = [
        Need(folders.drive, "the adapter's zip", 0, 4 * size.adapter, folders.adapter_zip.name),
        Need(folders.drive, "the published model", 0, 2 * size.total, f".{folders.published.name}.*"),
    ]
    if folders.drive != folders.work:
        adapter = Need(folders.drive, "the published adapter", 0, 4 * size.adapter, f".{folders.adapter.name}.*")
        needs = [_checkpoints(plan, folders.drive), adapter, *needs]
    return needs


def _checkpoints(plan: "Plan", place: Path) -> Need:
    count = plan.checkpoint_bytes * (plan.settings.save_total_limit + 1)
    return Need(place, "checkpoints", count, count, plan.settings.folders.checkpoints.name)


def check(plan: "Plan") -> None:
    """Raises OSError (ENOSPC) with what to change where a run cannot fit in what is free, on the disk or on Drive."""
    needs = [need.beside() for need in [*work_needs(plan), *result_needs(plan)]]
    if drive.on_drive(plan.settings.folders.drive):
        uploads = [need for need in needs if need.place == plan.settings.folders.drive]
        waiting = (sum(need.merging for need in uploads), sum(need.publishing for need in uploads))
        needs.append(Need(drive.CACHE, "uploads that wait", *waiting))
    needs += _download(plan)
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(os.stat(_existing(need.place)).st_dev, []).append(need)
    if problems := [problem for together in disks.values() if (problem := _problem(plan, together))]:
        raise OSError(errno.ENOSPC, "\n".join(problems))


def _problem(plan: "Plan", needs: list[Need]) -> str | None:
    """What is wrong with one disk, where all of `needs` lie."""
    place = _existing(needs[0].place)
    free = shutil.disk_usage(place).free
    counts = max(([need.merging for need in needs], [need.publishing for need in needs]), key=sum)
    if (lacking := sum(counts) - free) <= 0:
        return None
    one = (plan.settings.save_total_limit - 1) * plan.checkpoint_bytes
    fewer = sum(min(one, count) for need, count in zip(needs, counts, strict=True) if need.what == "checkpoints")
    parts = ", ".join(f"{need.what} {gigabytes(count)}" for need, count in zip(needs, counts, strict=True) if count)
    least = f"Set save_total_limit = 1, which takes {gigabytes(fewer)} less. Or free" if lacking <= fewer else "Free"
    return (
        f"{place} has {gigabytes(free)} free, and this run writes {gigabytes(sum(counts))} there beside what it"
        f" replaces ({parts}). {least} {gigabytes(lacking)} (on Drive empty the bin too), set a smaller lora_r, or"
        " choose another drive_folder or work_folder"
    )


def _download(plan: "Plan") -> list[Need]:
    """The base's weights in 16 bits, where they are not on this machine yet."""
    name, revision = plan.settings.model_name, plan.settings.model_revision
    if plan.model_path or Path(name).expanduser().is_dir():
        return []
    files = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=revision), str) for file in files):
        return []
    return [Need(Path(HF_HUB_CACHE), "the base's download", 2 * plan.size.total, 2 * plan.size.total)]


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files below a folder; 0 where nothing is there."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
