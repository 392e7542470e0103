"""The embedded default: an invented world, conversation trees about it, and the recipe of a tiny Phi."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""As a source of data: the trees of both splits, written by `python -m llm_finetuning.sample.trees`."""
TRAIN, VALIDATION = "train", "validation"


def trees_of(split: str) -> Path:
    """Returns the file with the trees of one split."""
    return FOLDER / f"trees-{split}.jsonl"


def generic_passages() -> list[str]:
    """Returns passages of general text that the world does not contain, to measure what a model has forgotten."""
    return (FOLDER / "generic.txt").read_text(encoding="utf-8").strip().split("\n\n")
