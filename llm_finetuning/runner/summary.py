"""What a headless run ends with: the scoreboard as a table and a short talk with the merged model."""

import json
from pathlib import Path

from transformers.utils import logging

from llm_finetuning.data import pairs
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters

TURNS = 3
SHORT = SamplingParameters(max_new_tokens=64)


def show(output: Path) -> None:
    """Prints both for a finished run in `output`."""
    logging.disable_progress_bar()
    print(f"\n{table(json.loads((output / 'scoreboard.json').read_text(encoding='utf-8')))}\n")
    for role, text in conversation(
        Chat.load(output / "finetuned_phi2"), questions(output / "data" / "finetuning_data_val.jsonl")
    ):
        print(f"{role}: {text}")
    print(f"\nEverything is in {output}; open {output / 'notebooks'}/*.html to see the notebooks as they ran.")


def table(scoreboard: dict[str, dict]) -> str:
    """The scoreboard's numbers: a row per measure, a column per model."""
    measures = dict.fromkeys(
        m for scores in scoreboard.values() for m, v in scores.items() if isinstance(v, (int, float))
    )
    rows = [["", *scoreboard]]
    rows += [[m, *(_number(scores.get(m)) for scores in scoreboard.values())] for m in measures]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def questions(val_file: Path) -> list[str]:
    """The user's side of the first held-out conversation of several turns, or else the first prompts."""
    held_out = pairs.to_records(pairs.read_jsonl(val_file))
    for pair in held_out:
        if asked := [turn["content"] for turn in pair.get("history", []) if turn["role"] == "user"]:
            return [*asked, pair["prompt"]][:TURNS]
    return [pair["prompt"] for pair in held_out[:TURNS]]


def conversation(chat: Chat, asked: list[str]) -> list[tuple[str, str]]:
    """Asks one question after another in one conversation; returns (role, text) in order."""
    messages = []
    for question in asked:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": chat.answer(messages, SHORT)})
    return [(message["role"], message["content"]) for message in messages]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
