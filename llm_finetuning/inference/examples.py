"""The questions of the inference notebook: the user's, the validation file's, or general ones."""

import json
from pathlib import Path

from llm_finetuning import prompts
from llm_finetuning.data import pairs
from llm_finetuning.files.atomic import write_text
from llm_finetuning.settings import Inference

GENERAL_QUESTIONS = [
    "What should I think about before adopting a dog?",
    "Explain photosynthesis to a ten-year-old in three sentences.",
    "Write a polite e-mail that moves a meeting from Monday to Wednesday.",
    "What is the difference between a list and a tuple in Python?",
]
GENERAL_CONVERSATION = [
    "Suggest a simple dinner for two.",
    "Make it vegetarian, please.",
    "What do I have to buy?",
]
SHOWN = 5
"""Pairs of the validation file that are asked."""


def conversations(settings: Inference) -> list[list[dict]]:
    """Returns the conversations to answer, each a list of messages that ends with the user's."""
    if settings.questions:
        return [[user(question)] for question in settings.questions]
    held_out = _validation(settings)[:SHOWN]
    return [prompts.question(pair) for pair in held_out] or [[user(q)] for q in GENERAL_QUESTIONS]


def dialogue(settings: Inference) -> list[str]:
    """Returns what the user says turn by turn: in the first validation pair with a history, or in general."""
    if settings.conversation:
        return settings.conversation
    for pair in _validation(settings):
        if any(turn["role"] == "user" for turn in pair.get("history", [])):
            return [turn["content"] for turn in prompts.question(pair) if turn["role"] == "user"]
    return GENERAL_CONVERSATION


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def write_prompts(path: Path, asked: list[list[dict]]) -> Path:
    """Writes conversations to a prompts file, one {"prompt", "history"} a line; returns its path."""
    lines = [json.dumps({"prompt": c[-1]["content"], "history": c[:-1]}, ensure_ascii=False) for c in asked]
    return write_text(path, "".join(f"{line}\n" for line in lines))


def _validation(settings: Inference) -> list[dict]:
    path = Path(settings.drive_folder) / "data" / "finetuning_data_val.jsonl"
    return pairs.to_records(pairs.read_jsonl(path)) if path.is_file() else []
