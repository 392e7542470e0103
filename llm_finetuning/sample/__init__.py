"""The embedded default: an invented world, conversation trees about it, and the recipe of a tiny Phi."""

from pathlib import Path

TREES = Path(__file__).parent / "trees.jsonl"  # written by `python -m llm_finetuning.sample.trees`
