"""The README.md of a published folder: what this model is, what it was made from, and what was measured.

Its text is `model_card.md.jinja`. What others must not read (tokens, paths of this machine) is taken out here.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import jinja2
from huggingface_hub import ModelCardData

from llm_finetuning.data.reports import report_path
from llm_finetuning.files.atomic import read_json, write_text
from llm_finetuning.files.checksums import CARD, hash_file, hash_together
from llm_finetuning.files.copying import gigabytes
from llm_finetuning.hardware import readable_seconds
from llm_finetuning.release.safety import without_tokens
from llm_finetuning.sample import TRAIN, VALIDATION, trees_of

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
GGUF = Path(__file__).with_name("gguf_card.md.jinja")
LICENCES = dict.fromkeys(("microsoft/phi-2", "microsoft/phi-1_5", "microsoft/phi-1"), "mit")
DATA_LICENCES = dict.fromkeys(("OpenAssistant/oasst1", "OpenAssistant/oasst2", "sample"), "Apache-2.0")
LANGUAGES_SHOWN = 5
SECRET = re.compile(r"(^|_)(token|secret|password|api_key)$")
ABSOLUTE = re.compile(r"^(/|~|[A-Za-z]:[\\/])")
PATH_IN_TEXT = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[\\/](?:[\w.@ -]+[\\/])+(?=[\w.-])")
SCORES = ("loss", "perplexity", "stop_rate", "exact_match", "repetition_rate", "rank_agreement", "margin")


def write(folder: str | Path, facts: dict) -> Path:
    """Writes the model card of `folder`, its `README.md`, from the facts of a run; returns its path.

    A folder with an adapter_config.json gets the card of an adapter.

    facts, all optional but `base`:
        base, base_revision    hub id (a local folder is shown by its name alone), and its commit there
        tiny: bool             the base is the sample's tiny model
        data                   as `data_facts` reads it from the reports; samples are shown only of data that is public
        settings               of the run; folders are shown by their names, tokens not at all
        scoreboard             {"before" | "after" | "merged": {"loss": …, "samples": [{"prompt", "text"}]}}
        merge, machine         {name: value}: what the verification measured; GPU or CPU, memory, …
        seconds, cost          of training; cost in the currency of `rate_per_hour`
        peak_memory_bytes: int
        versions               {package: version}
        preference             {name: value} of preference tuning: its loss, its pairs, the adapter it started from
        gguf                   `gguf.Exported`: the GGUF files made from this folder
        loss_figure: path      a PNG, copied into `folder` as loss.png unless it is that file
    """
    folder, figure = Path(folder), facts.get("loss_figure")
    if figure and Path(figure).resolve() != (folder / "loss.png").resolve():
        shutil.copyfile(figure, folder / "loss.png")
    adapter = (folder / "adapter_config.json").exists()
    settings = facts.get("settings", {})
    board = {stage: figures for stage, figures in facts.get("scoreboard", {}).items() if figures}
    data = facts.get("data", {})
    derived = {
        "shows_samples": data.get("public", data.get("source") in DATA_LICENCES),
        "adapter": adapter,
        "front_matter": _front_matter(facts, adapter),
        "licence": LICENCES.get(facts["base"]),
        "settings": _public_settings(settings),
        "recipe_hash": recipe_hash(settings),
        "scoreboard": board,
        "gguf_section": gguf_section(facts["gguf"], "GGUF files", "##") if facts.get("gguf") and not adapter else "",
        "scores": [name for name in SCORES if any(name in figures for figures in board.values())],
    }
    return write_text(folder / CARD, without_tokens(_template(TEMPLATE).render(facts | derived)))


def recipe_hash(settings: dict) -> str:
    """Returns the first 12 hex digits of the SHA-256 of the settings as published: the same for the same recipe."""
    text = json.dumps(_public_settings(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def data_facts(train_file: str | Path, val_file: str | Path) -> dict:
    """Reads `facts["data"]` of `write` from the reports that data preparation left beside the pairs.

    A file without its `*.report.json` (pairs of one's own), or with one that Drive has not uploaded to its end, is
    described by its count and hash alone; one that is not there, as where an adapter is tuned on, is left out.
    """
    train, val = (read_json(report_path(Path(file))) for file in (train_file, val_file))
    source = train.get("source", {})
    counts = {"train": _counts(Path(train_file), train), "val": _counts(Path(val_file), val)}
    public = all(_is_public(report, counts[name].get("SHA-256")) for name, report in (("train", train), ("val", val)))
    facts = {
        "source": source.get("source"),
        "generator": train.get("generation", {}).get("generator"),
        "revision": source.get("revision") or source.get("sha256"),
        "licence": DATA_LICENCES.get(source.get("source")),
        "languages": [code for code in train.get("pairs", {}).get("languages", {}) if code != "unknown"],
    } | counts
    return {key: value for key, value in facts.items() if value} | {"public": public}


def _is_public(report: dict, sha256: str | None) -> bool:
    """Whether a file with this hash is as the data preparation wrote it from a source that is known to be public."""
    if sha256 is None or report.get("sha256") != sha256:
        return False
    origin = report.get("source", {})
    on_hub = origin.get("source") in DATA_LICENCES and "revision" in origin
    return on_hub or origin.get("sha256") in {hash_together([trees_of(split)]) for split in (TRAIN, VALIDATION)}


def _counts(pairs_file: Path, report: dict) -> dict:
    if not pairs_file.is_file():
        return {}
    with open(pairs_file, encoding="utf-8") as file:
        counts = {"pairs": sum(1 for line in file if line.strip())}
    languages = list(report.get("pairs", {}).get("languages", {}).items())[:LANGUAGES_SHOWN]
    if tokens := report.get("tokens"):
        counts |= {"tokens": tokens["tokens"], "tokens in the loss": f"{tokens['share_trained']:.0%}"}
    if languages:
        counts["languages"] = ", ".join(f"{code} {count:,}" for code, count in languages)
    if recipe := report.get("recipe"):
        counts["replies"] = recipe["replies"]
    return counts | {"SHA-256": hash_file(pairs_file)}


def _front_matter(facts: dict, adapter: bool) -> str:
    """YAML as the Hub wants it, without the keys whose value is unknown or not on the Hub."""
    data, tags = facts.get("data", {}), ["phi", "qlora", "dpo" if facts.get("preference") else "sft", "conversational"]
    return ModelCardData(
        license=LICENCES.get(facts["base"]),
        language=sorted({code.split("-")[0] for code in data.get("languages", [])}) or None,
        base_model=facts["base"] if _is_hub_id(facts["base"]) else None,
        datasets=[data["source"]] if _is_hub_id(data.get("source", "")) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags + ["tiny", "test-model"] * bool(facts.get("tiny")),
    ).to_yaml()


def gguf_section(exported: object, title: str, level: str = "#") -> str:
    """What was measured of GGUF files (`gguf.Exported`), and how they are used, in Markdown."""
    return _template(GGUF).render(exported=exported, title=title, level=level)


def _template(path: Path) -> jinja2.Template:
    """A card's template; a fact that is not there counts as false, at any depth."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters |= {"cell": _cell, "duration": readable_seconds, "name": _name, "size": gigabytes}
    return environment.from_string(path.read_text(encoding="utf-8"))


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)) and not Path(name).exists()


def _name(name: str) -> str:
    """A hub id as it is; of a path on this machine its last part."""
    return name if _is_hub_id(name) else Path(name).name


def _public_settings(settings: dict) -> dict:
    """The settings that others may read: no secrets, and of absolute paths the last part."""
    return {name: _public(value) for name, value in settings.items() if not SECRET.search(name)}


def _public(value: object) -> object:
    if isinstance(value, Path) or isinstance(value, str) and ABSOLUTE.match(value):
        return Path(value).name
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cell(value: object) -> str:
    """A value in a table of Markdown, without the folders of this machine."""
    value = _public(value)
    text = f"{value:,}" if type(value) is int else str(value)
    return PATH_IN_TEXT.sub("", text).replace("\n", "<br>").replace("|", "\\|")
