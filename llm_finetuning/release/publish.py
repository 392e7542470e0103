"""From a proved merge to the folder that people download: card, settings, sums, publication, take-away."""

import dataclasses
import json
import shutil
from pathlib import Path

from llm_finetuning import hardware
from llm_finetuning.files import checksums
from llm_finetuning.models import SAMPLE, commit_of
from llm_finetuning.plotting import save
from llm_finetuning.release import card_data, hub, model_card, replace
from llm_finetuning.training import figures


def publish(merged, settings, plan, model_path: Path, board: dict, entries: list[dict]) -> Path:
    """Finishes the merged folder and the adapter, publishes both, and returns where the model was published.

    A folder is complete before it is copied: model card, settings.json, SHA256SUMS. Raises what
    `publishing.publish` raises; the last good version then stays.
    """
    folders = settings.folders
    known = facts(merged, settings, plan, model_path, board, entries)
    for folder in (merged.folder, folders.adapter):
        figure = folder / "loss.png"
        save(figures.loss_curve(entries), figure)
        model_card.write(folder, known | {"loss_figure": figure})
        text = json.dumps(_shareable(settings), indent=1, ensure_ascii=False) + "\n"
        (folder / "settings.json").write_text(text, encoding="utf-8")
        checksums.write_checksums(folder)
    published = replace.replace_folder(merged.folder, folders.published)
    if folders.work != folders.drive:
        replace.replace_folder(folders.adapter, folders.drive / "adapter")
    if settings.publish_to == "hub":
        print(hub.push_to_hub(merged.folder, settings.hub_repository))
        print(hub.push_to_hub(folders.adapter, f"{settings.hub_repository}-adapter"))
    shutil.rmtree(folders.merged)
    return published


def _shareable(settings) -> dict:
    """The settings without the folders of this machine."""
    values = dataclasses.asdict(settings)
    return {name: value for name, value in values.items() if not name.endswith("_folder")}


def facts(merged, settings, plan, model_path: Path, board: dict, entries: list[dict]) -> dict:
    """What the model card tells: everything from this run."""
    trained = [entry for entry in entries if "tokens_per_second" in entry]
    seconds = sum(entry["seconds"] for entry in trained)
    rate = settings.rate_per_hour
    return {
        "base": settings.model_name,
        "base_revision": commit_of(model_path),
        "tiny": settings.model_name == SAMPLE,
        "data": card_data.data_facts(settings.folders.train_file, settings.folders.val_file),
        "settings": _shareable(settings),
        "scoreboard": board,
        "merge": {"base": merged.base, **dict(zip(merged.checks.check, merged.checks.found, strict=True))},
        "machine": {"processor": plan.machine.name, "memory": hardware.as_gib(plan.machine.memory)},
        "seconds": seconds,
        "peak_memory_bytes": max((entry["memory_bytes"] for entry in trained), default=0),
        "cost": seconds / 3600 * rate if rate else None,
        "versions": hardware.versions(),
    }


def download_note(published: Path) -> str:
    """What to download, how large it is, and the command that checks it."""
    size = sum(file.stat().st_size for file in published.iterdir() if file.is_file())
    return (
        f"{published}: {size / 1e9:.2f} GB in {sum(1 for _ in published.iterdir())} files."
        f" After downloading: cd {published.name} && sha256sum -c SHA256SUMS"
    )
