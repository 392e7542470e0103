"""Text that finetuning does not teach: what a model has forgotten shows in its loss there."""

from pathlib import Path

import datasets

from llm_finetuning import models, sample
from llm_finetuning.data import oasst, own_data, pairs, reports
from llm_finetuning.data.filters import speaks
from llm_finetuning.data.sources import locate
from llm_finetuning.prompts import Template
from llm_finetuning.settings import split_names


def passages(source: str, count: int = 200) -> list[str]:
    """The passages of a text: "sample", a .txt file with blank lines between them, or a dataset with a column `text`.

    source: a file of text, JSON lines or parquet, or a dataset id on the Hub. At most `count`, the first ones.
    Raises FileNotFoundError for a file that is not there, ValueError for one without text.
    """
    if source == models.SAMPLE:
        return sample.generic_passages()[:count]
    path = Path(source).expanduser()
    if path.suffix and not path.is_file() and (path.is_absolute() or source.startswith(".")):
        raise FileNotFoundError(f"generic_text {source} is not there: give a file of text, a dataset id, or sample")
    texts = _of_file(path) if path.is_file() else datasets.load_dataset(source, split="test")["text"]
    found = [text.strip() for text in texts if isinstance(text, str) and text.strip()][:count]
    if not found:
        raise ValueError(f"generic_text {source} holds no text: passages with blank lines between them are needed")
    return found


def other_languages(source: str, val_file: Path, count: int, seed: int) -> list[str]:
    """Replies of the source's validation trees in languages that the data preparation left out, at most `count`.

    source: as in the data notebooks. Empty where it is "" or holds no trees, or no language was left out of
    `val_file`, as its report says. Raises what `oasst.read_messages` raises.
    """
    known = source and reports.report_path(val_file).is_file()
    languages = split_names(reports.read_report(val_file)["recipe"]["languages"]) if known else []
    if not languages or own_data.is_pairs_file((found := locate(source, "validation")).files[0]):
        return []
    messages = oasst.read_messages(found, "validation", on_error="skip")
    rows = zip(messages["role"], messages["lang"], messages["text"], strict=True)
    replies = [text for role, lang, text in rows if role == "assistant" and not speaks(lang, languages)]
    return pairs.draw(replies, count, seed)


def _of_file(path: Path) -> list[str]:
    if path.suffix.lower() in (".txt", ".md"):
        try:
            return path.read_text(encoding="utf-8").split("\n\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"generic_text {path} is no text in UTF-8: {error}") from error
    kind = "parquet" if path.suffix.lower() == ".parquet" else "json"
    table = datasets.Dataset.from_parquet(str(path)) if kind == "parquet" else datasets.Dataset.from_json(str(path))
    if "text" not in table.column_names:
        raise ValueError(f"generic_text {path} has no column text: it has {', '.join(table.column_names)}")
    return table["text"]


def examples(texts: list[str], template: Template, max_seq_length: int) -> list[dict]:
    """Encodes passages as {"input_ids", "labels"}: every token in the loss, the first `max_seq_length` of each.

    They begin with what the tokenizer puts before every text, such as BOS, as the model saw text in pretraining.
    """
    made = []
    for text in texts:
        ids = template.tokenizer(text, verbose=False).input_ids[:max_seq_length]
        if len(ids) > 1:
            made.append({"input_ids": ids, "labels": list(ids)})
    return made
