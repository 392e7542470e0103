"""Publishing a verified merge, from the merged folder to what people download.

`publish` completes a folder (model card, settings.json, SHA256SUMS), then `replace.replace_published` copies it beside
its place on Drive or a disk, verifies the copy as read back, and gives it the name; `hub.push_to_hub` uploads it.
"""

import dataclasses
import shutil
import zipfile
from pathlib import Path

from llm_finetuning import hardware
from llm_finetuning.data import preferences
from llm_finetuning.files import checksums, drive
from llm_finetuning.files.atomic import write_json, write_text, writing
from llm_finetuning.files.copying import copy_folder, gigabytes
from llm_finetuning.inference import llama
from llm_finetuning.models import SAMPLE, commit_of
from llm_finetuning.plotting import save
from llm_finetuning.release import gguf, hub, model_card
from llm_finetuning.release.replace import replace_published
from llm_finetuning.release.safety import PICKLES, check_no_tokens
from llm_finetuning.release.verify import Merged
from llm_finetuning.settings import Finetuning, PreferenceTuning
from llm_finetuning.training import figures, metrics
from llm_finetuning.training.planning import Plan


def publish(
    merged: Merged, plan: Plan, board: dict, entries: list[dict], exported: gguf.Exported | None = None
) -> Path:
    """Completes the merged folder and the adapter, publishes both, and returns where the model was published.

    board: the scoreboard; entries: of metrics.jsonl; exported: its GGUF files, which are copied beside it. Raises what
    `replace_published` raises; the last good version then stays. Raises FileNotFoundError where the merged folder has
    been published, and removed, already.
    """
    settings, folders = plan.settings, plan.settings.folders
    if not (merged.folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{merged.folder} is not there any more: it goes once it is published, to {folders.published}."
            " To publish again, run the notebook from its beginning (what is trained is not trained again)."
        )
    facts = _facts(merged, plan, board, entries) | {"gguf": exported}
    for file in merged.folder.glob("tokenizer*"):  # the adapter's tokenizer, in the form that both versions read
        shutil.copyfile(file, folders.adapter / file.name)
    for folder in (merged.folder, folders.adapter):
        figure = folder / "loss.png"
        save(figures.curves(entries), figure)
        model_card.write(folder, facts | {"loss_figure": figure})
        write_json(folder / "settings.json", _shareable(settings))
        checksums.write_checksums(folder)
    published = replace_published(merged.folder, folders.published)
    if folders.work != folders.drive:
        replace_published(folders.adapter, folders.published_adapter)
        write_text(folders.drive / folders.metrics.name, "".join(map(metrics.Metrics.line, entries)))
    if exported:
        copy_folder(exported.folder, llama.folder_beside(published))
    if settings.publish_to == "hub":
        print(hub.push_to_hub(merged.folder, settings.hub_repository, settings.hub_private))
        print(hub.push_to_hub(folders.adapter, f"{settings.hub_repository}-adapter", settings.hub_private))
    shutil.rmtree(folders.merged)
    if exported:
        shutil.rmtree(exported.folder)
    return published


def _shareable(settings: Finetuning) -> dict:
    """The settings without the folders of this machine."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if not name.endswith("_folder")}


def _facts(merged: Merged, plan: Plan, board: dict, entries: list[dict]) -> dict:
    """The facts of this run that the model card tells."""
    settings = plan.settings
    trained = [entry for entry in entries if "tokens_per_second" in entry]
    seconds = sum(entry["seconds"] for entry in trained)
    rate = settings.rate_per_hour
    return {
        "base": settings.model_name,
        "base_revision": commit_of(plan.model_path),
        "tiny": settings.model_name == SAMPLE,
        "data": model_card.data_facts(settings.folders.train_file, settings.folders.val_file),
        "settings": _shareable(settings),
        "preference": _preference(settings) if isinstance(settings, PreferenceTuning) else {},
        "scoreboard": board,
        "merge": {"base": merged.base, **dict(zip(merged.checks.check, merged.checks.found, strict=True))},
        "machine": {"processor": plan.machine.name, "memory": hardware.as_gib(plan.machine.memory)},
        "seconds": seconds,
        "peak_memory_bytes": max((entry["memory_bytes"] for entry in trained), default=0),
        "cost": seconds / 3600 * rate if rate else None,
        "versions": hardware.versions(),
    }


def _preference(settings: PreferenceTuning) -> dict:
    """What a model card tells of the pairs that people preferred one response of, and where the tuning started."""
    files = {"train": settings.folders.train_preferences, "val": settings.folders.val_preferences}
    return {"start": Path(settings.adapter_folder).name, "loss": settings.loss, "beta": settings.beta} | {
        f"{split}: {what}": value
        for split, path in files.items()
        for what, value in (("preference pairs", len(preferences.read(path))), ("SHA-256", checksums.hash_file(path)))
    }


def zip_adapter(adapter_folder: str | Path, target: str | Path) -> Path:
    """Writes the adapter as one zip for the browser, without pickles; stored, since weights do not shrink."""
    folder, target = Path(adapter_folder), Path(target)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder / 'adapter_config.json'} is missing. Train first, or correct the path.")
    check_no_tokens(folder)
    if drive.on_drive(target):
        drive.remove(target)  # else the one before lies in Drive's bin and counts there
    with writing(target) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name in checksums.files_below(folder):
            if Path(name).suffix not in PICKLES:
                archive.write(folder / name, f"{folder.name}/{name}")
    return target


def download_note(published: Path) -> str:
    """Says what to download, how large it is, and the command that checks it."""
    sizes = [file.stat().st_size for file in published.iterdir()]
    return (
        f"{published}: {gigabytes(sum(sizes))} in {len(sizes)} files."
        f" After downloading: cd {published.name} && {checksums.COMMAND}"
    )
