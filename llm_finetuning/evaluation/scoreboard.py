"""Before, after, merged: the same measures on one fixed held-out set.

The held-out set is a list of `prompts.encode` rows with the pair beside them: `{"input_ids", "labels", "pair"}`.
"""

import json
import math
import random
from pathlib import Path

import pandas as pd
import torch

from llm_finetuning import models, prompts
from llm_finetuning.evaluation import mode
from llm_finetuning.files import checksums
from llm_finetuning.inference.chat import Answer, Chat
from llm_finetuning.inference.generation import END, SamplingParameters
from llm_finetuning.prompts import Template

BATCH_TOKENS = 4096
GRAMS = 4


def held_out_set(pairs: list[dict], template: Template, max_seq_length: int, count: int, seed: int) -> list[dict]:
    """At most `count` pairs that fit, drawn with the seed and kept in that order.

    Raises ValueError when none fits.
    """
    fitted = [fit for fit in prompts.truncate_histories(pairs, template, max_seq_length) if fit.example]
    if not fitted:
        raise ValueError(f"no validation pair fits in max_seq_length = {max_seq_length}: raise it")
    chosen = random.Random(seed).sample(fitted, min(count, len(fitted)))
    return [fit.example | {"pair": fit.pair} for fit in chosen]


def held_out_loss(model, held_out: list[dict], template: Template) -> float:
    """Mean negative log-likelihood per trained token (answers and their EOS), in nats, over all rows together."""
    total, tokens = 0.0, 0
    rows = sorted(held_out, key=lambda row: -len(row["input_ids"]))
    with mode.evaluating(model):
        for batch in _batches(rows):
            loss, count = _batch_loss(model, batch, template)
            total, tokens = total + loss, tokens + count
    return total / tokens


def _batches(rows: list[dict]):
    """Rows, longest first, in batches of at most BATCH_TOKENS tokens with their padding."""
    while rows:
        count = max(1, BATCH_TOKENS // len(rows[0]["input_ids"]))
        yield rows[:count]
        rows = rows[count:]


def _batch_loss(model, batch: list[dict], template: Template) -> tuple[float, int]:
    length = len(batch[0]["input_ids"])
    pad = template.tokenizer.eos_token_id
    ids = torch.tensor([row["input_ids"] + [pad] * (length - len(row["input_ids"])) for row in batch])
    labels = torch.tensor([row["labels"] + [prompts.IGNORE_INDEX] * (length - len(row["labels"])) for row in batch])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in batch])
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[:, :-1]
    wanted = labels[:, 1:].to(device)
    trained = wanted != prompts.IGNORE_INDEX
    loss = torch.nn.functional.cross_entropy(logits[trained].float(), wanted[trained], reduction="sum")
    return loss.item(), int(trained.sum())


def answers(model, held_out: list[dict], template: Template, max_new_tokens: int) -> list[Answer]:
    """Greedy answers of a model in memory to the prompts of held-out rows, in their order."""
    asked = [prompts.conversation(row["pair"])[:-1] for row in held_out]
    with mode.evaluating(model):
        return Chat.of(model, template).generate_batch(asked, SamplingParameters(max_new_tokens=max_new_tokens))


def measure(model, held_out: list[dict], template: Template, settings) -> dict:
    """One column of the scoreboard: loss, perplexity, stop_rate, repetition_rate, samples, maybe exact_match."""
    loss = held_out_loss(model, held_out, template)
    asked = held_out[: settings.eval_answers]
    given = answers(model, asked, template, settings.max_new_tokens)
    scores = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "stop_rate": _mean(reply.ended_by == END for reply in given),
        "repetition_rate": _mean(repetition(reply.text) for reply in given),
        "samples": [
            {
                "prompt": row["pair"]["prompt"],
                "reference": row["pair"]["response"],
                "text": reply.text,
                "stopped": reply.ended_by == END,
            }
            for row, reply in zip(asked, given, strict=True)
        ],
    }
    if settings.judge_exact_match:
        same = [reply.text.strip() == row["pair"]["response"].strip() for reply, row in zip(given, asked, strict=True)]
        scores["exact_match"] = _mean(same)
    return scores


def repetition(text: str) -> float:
    """Share of an answer's word 4-grams that stood in it before (seq-rep-4 of arXiv 1908.04319, over words)."""
    words = text.split()
    grams = [tuple(words[i : i + GRAMS]) for i in range(len(words) - GRAMS + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def before(model, held_out: list[dict], template: Template, settings) -> dict:
    """Measures the base without its adapters; returns the scoreboard."""
    with model.disable_adapter():
        return record(settings.folders.scoreboard, before=measure(model, held_out, template, settings))


def after(model, held_out: list[dict], template: Template, settings) -> dict:
    """Measures the base with its trained adapters; returns the scoreboard."""
    return record(settings.folders.scoreboard, after=measure(model, held_out, template, settings))


def published(folder: Path, held_out: list[dict], template: Template, settings, plan) -> dict:
    """Measures the published folder as read back, its sums checked first; returns the scoreboard."""
    checksums.verify_checksums(folder)
    model = models.load_strict(folder, plan.save_dtype, plan.device)
    return record(settings.folders.scoreboard, merged=measure(model, held_out, template, settings))


def _mean(values) -> float:
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else 0.0


def table(board: dict) -> pd.DataFrame:
    """Measures down, before / after / merged across."""
    names = ("loss", "perplexity", "stop_rate", "repetition_rate", "exact_match")
    return pd.DataFrame(
        {column: {n: scores[n] for n in names if n in scores} for column, scores in board.items()}
    ).round(4)


def side_by_side(board: dict, count: int = 5) -> pd.DataFrame:
    """The first prompts with the reference and each column's answer."""
    rows = []
    for i in range(min(count, min(len(scores["samples"]) for scores in board.values()))):
        first = next(iter(board.values()))["samples"][i]
        told = {name: _shown(scores["samples"][i]) for name, scores in board.items()}
        rows.append({"prompt": first["prompt"], "reference": first["reference"], **told})
    return pd.DataFrame(rows)


def _shown(sample: dict) -> str:
    return sample["text"] + ("" if sample["stopped"] else " … (did not stop)")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(path: Path, **columns: dict) -> dict:
    """Adds or replaces columns of scoreboard.json, written beside and renamed; returns all of it in order."""
    board = read(path) | columns
    board = {name: board[name] for name in ("before", "after", "merged") if name in board}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(board, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return board
