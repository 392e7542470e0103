"""The README.md of a published folder: what this model is, what it was made from, and what was measured."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from llm_finetuning.release import card_texts
from llm_finetuning.release.safety import without_tokens

LICENCES = {  # what may be said about the result without asking: licence of the base by its id
    "microsoft/phi-2": "mit",
    "microsoft/phi-1_5": "mit",
    "microsoft/phi-1": "mit",
}
SECRET = re.compile(r"(^|_)(token|secret|password|api_key)$")
ABSOLUTE = re.compile(r"^(/|~|[A-Za-z]:[\\/])")
PATH_IN_TEXT = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[\\/](?:[\w.@ -]+[\\/])+(?=[\w.-])")
SCORES = ("loss", "perplexity", "stop_rate", "exact_match", "repetition_rate")


def write(folder: str | Path, facts: dict) -> Path:
    """Write `README.md` of the model in `folder` from the facts of its run; returns its path.

    A folder with an adapter_config.json gets the card of an adapter.

    facts, all optional but `base`:
        base: str              hub id, or "sample" / "rehearsal" / a local folder, shown by its name alone
        base_revision: str     commit of the base on the Hub
        tiny: bool             the base is the sample's tiny model
        licence: str           licence id of the result; by default the base's where it is known
        data: dict             {"source": dataset id or file, "revision": commit, "licence": str,
                               "languages": [codes], "train": {name: count}, "val": {name: count}}
                               as `card_data.data_facts` reads it from the reports
        settings: dict         of the run; folders are shown by their names, tokens not at all
        scoreboard: dict       {"before" | "after" | "merged": {"loss": …, "samples": [{"prompt", "text"}]}}
        merge: dict            what the proof of the merge found, {name: value}
        machine: dict          {name: value}: GPU or CPU, memory, …
        seconds: float         of training
        peak_memory_bytes: int
        cost: float            what the run cost, in the currency of `rate_per_hour`
        energy_wh: float       watt-hours, if something measured them
        versions: dict         {package: version}
        loss_figure: path      a PNG, copied into `folder` as loss.png unless it is that file
    """
    folder = Path(folder)
    facts = facts | {"adapter": (folder / "adapter_config.json").exists()}
    figure = _copy_figure(folder, facts)
    parts = [_front_matter(facts), *(part(facts) for part in _PARTS), _figure(figure), _samples(facts)]
    text = "\n\n".join(part for part in [*parts, _limits(facts), _loading(facts)] if part) + "\n"
    path = folder / "README.md"
    temporary = folder / ".README.md.partial"
    temporary.write_text(without_tokens(text), encoding="utf-8")
    os.replace(temporary, path)
    return path


def recipe_hash(settings: dict) -> str:
    """12 hex digits, the start of the SHA-256 of the settings as shown: the same for the same recipe."""
    shown = json.dumps(_shown_settings(settings), sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest()[:12]


def _front_matter(facts: dict) -> str:
    """YAML as the Hub wants it, without the keys whose value is unknown or not on the Hub."""
    from huggingface_hub import ModelCardData

    data = facts.get("data", {})
    card = ModelCardData(
        license=_licence(facts),
        language=sorted({code.split("-")[0] for code in data.get("languages", [])}) or None,
        base_model=facts["base"] if _is_hub_id(facts["base"]) else None,
        datasets=[data["source"]] if _is_hub_id(data.get("source", "")) else None,
        library_name="peft" if facts["adapter"] else "transformers",
        pipeline_tag="text-generation",
        tags=[
            "phi",
            "qlora",
            "sft",
            "conversational",
            *(["tiny", "test-model"] if facts.get("tiny") else []),
        ],
    )
    return f"---\n{card.to_yaml()}\n---"


def _title(facts: dict) -> str:
    base = _name(facts["base"])
    if facts.get("tiny"):
        return (
            "# A tiny model, finetuned to show how it is done\n\n"
            "**This is not Phi-2.** It is a Phi of a few million parameters that knows a small made-up "
            "world, trained on the sample that ships with the project. Its numbers say nothing about a real "
            "model."
        )
    note = " **The base has random weights: this model shows that a machine suffices, and says nothing.**"
    what = (
        f"The LoRA adapter, trained in 4 bits (QLoRA), that makes a chat model of {base}."
        if facts["adapter"]
        else f"A chat model: {base} with a LoRA adapter trained in 4 bits (QLoRA) and merged into 16-bit weights."
    )
    return f"# {base}, finetuned on conversations\n\n{what}" + (note if base == "rehearsal" else "")


def _origin(facts: dict) -> str:
    revision = facts.get("base_revision")
    rows = {"Base": _name(facts["base"]), "Base revision": revision or "not from the Hub"}
    rows |= {f"Merge: {name}": value for name, value in facts.get("merge", {}).items()}
    return _section("Base" if facts["adapter"] else "Base and merge", _table(["", ""], rows.items()))


def _data(facts: dict) -> str:
    data = facts.get("data")
    if not data:
        return ""
    head = {
        "Source": _name(data["source"]) if "source" in data else None,
        "Revision": data.get("revision"),
        "Licence": data.get("licence"),
        "Languages": ", ".join(data.get("languages", [])) or None,
    }
    rows = [(name, value) for name, value in head.items() if value]
    for split in ("train", "val"):
        rows += [(f"{split}: {name}", value) for name, value in _flat(data.get(split, {}))]
    return _section("Data", _table(["", ""], rows))


def _recipe(facts: dict) -> str:
    settings = facts.get("settings")
    if not settings:
        return ""
    table = _table(["setting", "value"], _shown_settings(settings).items())
    return _section("Recipe", f"Recipe `{recipe_hash(settings)}` (hash of this table).\n\n{table}")


def _scores(facts: dict) -> str:
    board = {name: board for name, board in facts.get("scoreboard", {}).items() if board}
    if not board:
        return ""
    names = [name for name in SCORES if any(name in scores for scores in board.values())]
    rows = [(stage, *(scores.get(name, "–") for name in names)) for stage, scores in board.items()]
    text = (
        "All on the same held-out conversations. `before` is the base in 4 bits with the same template, "
        "`after` the "
        "same with the trained adapter, `merged` the merged model. The loss is "
        "token-weighted, over answers only; `stop_rate` is the share of answers that ended by themselves."
    )
    return _section("What was measured", f"{text}\n\n{_table(['', *names], rows)}")


def _cost(facts: dict) -> str:
    rows = {_words(name): value for name, value in facts.get("machine", {}).items()}
    if "seconds" in facts:
        rows["Training time"] = _time(facts["seconds"])
    if facts.get("peak_memory_bytes"):
        rows["Peak memory"] = f"{facts['peak_memory_bytes'] / 1e9:.2f} GB"
    if facts.get("cost"):
        rows["Cost"] = f"{facts['cost']:.2f} (at the given hourly rate)"
    if facts.get("energy_wh"):
        rows["Energy"] = f"{facts['energy_wh']:.1f} Wh"
    rows |= {f"Version of {name}": version for name, version in facts.get("versions", {}).items()}
    return _section("Machine, time, cost", _table(["", ""], rows.items())) if rows else ""


def _figure(figure: str) -> str:
    return _section("Loss", f"![Training and held-out loss over the steps]({figure})") if figure else ""


def _samples(facts: dict, count: int = 4) -> str:
    board = facts.get("scoreboard", {})
    stage = next((stage for stage in ("merged", "after") if board.get(stage, {}).get("samples")), None)
    if not stage:
        return ""
    blocks = [_quoted(sample) for sample in board[stage]["samples"][:count]]
    return _section(
        "Samples", f"Greedy answers of `{stage}` to held-out prompts, as they came:\n\n" + "\n\n".join(blocks)
    )


def _limits(facts: dict) -> str:
    licence = _licence(facts)
    text = (
        "It states wrong things with confidence, knows nothing after its base was made, and was not aligned "
        "for safety: do not rely on what it answers. It was trained on conversations in the languages above "
        "and is weak in all others. The scores above are of one run on one small held-out set."
    )
    terms = (
        f"Licence of the weights: `{licence}`, that of the base."
        if licence
        else "The licence of the base applies to these weights; it was not known to this run."
    )
    data = facts.get("data", {}).get("licence")
    return _section("Limits and licence", f"{text}\n\n{terms}" + (f" Licence of the data: {data}." if data else ""))


def _loading(facts: dict) -> str:
    return _section("How to use it", card_texts.ADAPTER if facts["adapter"] else card_texts.MODEL)


_PARTS = (_title, _origin, _data, _recipe, _scores, _cost)


def _copy_figure(folder: Path, facts: dict) -> str:
    if not facts.get("loss_figure"):
        return ""
    figure = Path(facts["loss_figure"])
    if figure.resolve() != (folder / "loss.png").resolve():
        shutil.copyfile(figure, folder / "loss.png")
    return "loss.png"


def _licence(facts: dict) -> str | None:
    return facts.get("licence") or LICENCES.get(facts["base"])


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)) and not Path(name).exists()


def _name(name: str) -> str:
    """A hub id as it is; of a path on this machine its last part."""
    return name if _is_hub_id(name) else Path(name).name


def _shown_settings(settings: dict) -> dict:
    """What of the settings may be read by others: no secrets, and of absolute paths the last part."""
    return {name: _shown(value) for name, value in settings.items() if not SECRET.search(name)}


def _shown(value) -> object:
    if isinstance(value, Path) or isinstance(value, str) and ABSOLUTE.match(value):
        return Path(value).name
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value


def _flat(value: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Nested counts as rows, `{"kept": {"en": 3}}` → `("kept, en", 3)`; lists are left out."""
    rows = []
    for name, item in value.items():
        if isinstance(item, dict):
            rows += _flat(item, f"{prefix}{_words(name)}, ")
        elif not isinstance(item, list):
            rows.append((f"{prefix}{_words(name)}", item))
    return rows


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _table(head: list[str], rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value) -> str:
    value = _shown(value)
    text = f"{value:,}" if type(value) is int else str(value)
    return PATH_IN_TEXT.sub("", text).replace("\n", "<br>").replace("|", "\\|")


def _quoted(sample: dict) -> str:
    turns = [("prompt", str(sample["prompt"])), ("answer", str(sample["text"]))]
    return "\n>\n".join(f"> **{name}**: " + text.strip().replace("\n", "\n> ") for name, text in turns)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
