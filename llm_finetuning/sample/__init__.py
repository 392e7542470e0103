"""The embedded default: a small invented world, its conversation trees, and the recipe of a tiny Phi that has read about it."""

from pathlib import Path

TREES = Path(__file__).parent / "trees.jsonl"  # written by `python -m llm_finetuning.sample.trees`
