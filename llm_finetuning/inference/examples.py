"""What the inference notebook asks: the user's questions, the validation file's, or general ones."""

import json
from pathlib import Path

from llm_finetuning.data import pairs
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


def conversations(settings: Inference) -> list[list[dict]]:
    """The conversations to answer, each a list of messages that ends with the user's."""
    if settings.questions:
        return [[user(question)] for question in settings.questions]
    known = _validation(settings)
    return [messages_of(pair) for pair in known[:SHOWN]] or [[user(q)] for q in GENERAL_QUESTIONS]


def dialogue(settings: Inference) -> list[str]:
    """What the user says, turn by turn: of the first validation conversation with a history, or general."""
    if settings.conversation:
        return settings.conversation
    for pair in _validation(settings):
        if any(turn["role"] == "user" for turn in pair.get("history", [])):
            return [turn["content"] for turn in messages_of(pair) if turn["role"] == "user"]
    return GENERAL_CONVERSATION


def messages_of(pair: dict) -> list[dict]:
    """Prompt (and history) of a pair record as a conversation that waits for an answer."""
    return [*(pair.get("history") or []), user(pair["prompt"])]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def write_prompts(path: Path, asked: list[list[dict]]) -> Path:
    """A prompts file, one {"prompt", "history"} a line, written whole or not at all."""
    lines = [json.dumps({"prompt": c[-1]["content"], "history": c[:-1]}, ensure_ascii=False) + "\n" for c in asked]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)
    return path


def _validation(settings: Inference) -> list[dict]:
    path = Path(settings.drive_folder) / "data" / "finetuning_data_val.jsonl"
    return pairs.to_records(pairs.read_jsonl(path)) if path.is_file() else []
