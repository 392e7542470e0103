"""Before, after, merged: the same measures on one fixed held-out set.

The held-out set is a list of examples (`prompts.encode`) with the pair beside them: `{"input_ids", "labels", "pair"}`.
"""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean as mean

import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from llm_finetuning import models, prompts
from llm_finetuning.evaluation import mode
from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import write_json
from llm_finetuning.inference.chat import Answer, Chat
from llm_finetuning.inference.generation import END, SamplingParameters
from llm_finetuning.prompts import Template
from llm_finetuning.settings import Finetuning

BATCH_TOKENS = 4096
GRAMS = 4


def held_out_set(pairs: list[dict], template: Template, max_seq_length: int, count: int, seed: int) -> list[dict]:
    """At most `count` pairs that fit, in the order in which the seed draws them. Raises ValueError when none fits."""
    candidates = prompts.truncate_histories(pairs, template, max_seq_length)
    fitting = [pair for pair in candidates if pair.example]
    if not fitting:
        raise ValueError(f"no validation pair fits in max_seq_length = {max_seq_length}: raise it")
    drawn = random.Random(seed).sample(fitting, min(count, len(fitting)))
    return [pair.example | {"pair": pair.pair} for pair in drawn]


def held_out_loss(model: torch.nn.Module, held_out: list[dict], template: Template) -> float:
    """Mean negative log-likelihood per token in the loss (responses and their EOS), in nats, over all examples."""
    total, tokens = 0.0, 0
    longest_first = sorted(held_out, key=lambda example: -len(example["input_ids"]))
    with mode.evaluating(model):
        for batch in _batches(longest_first):
            loss, count = _batch_loss(model, batch, template)
            total, tokens = total + loss, tokens + count
    return total / tokens


def _batches(examples: list[dict]) -> Iterator[list[dict]]:
    """Examples, longest first, in batches of at most BATCH_TOKENS tokens with their padding."""
    while examples:
        count = max(1, BATCH_TOKENS // len(examples[0]["input_ids"]))
        yield examples[:count]
        examples = examples[count:]


def _batch_loss(model: torch.nn.Module, batch: list[dict], template: Template) -> tuple[float, int]:
    """(summed negative log-likelihood, tokens in the loss) of a batch, padded on the right."""
    device = next(model.parameters()).device

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:  # (B, T)
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)

    ids = padded([example["input_ids"] for example in batch], template.tokenizer.eos_token_id)
    mask = padded([[1] * len(example["input_ids"]) for example in batch], 0)
    targets = padded([example["labels"] for example in batch], prompts.IGNORE_INDEX)[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    in_loss = targets != prompts.IGNORE_INDEX
    loss = torch.nn.functional.cross_entropy(logits[in_loss].float(), targets[in_loss], reduction="sum")
    return loss.item(), int(in_loss.sum())


def answers(model: torch.nn.Module, held_out: list[dict], template: Template, max_new_tokens: int) -> list[Answer]:
    """Greedy answers of a model in memory to the prompts of held-out examples, in their order."""
    asked = [prompts.question(example["pair"]) for example in held_out]
    with mode.evaluating(model):
        return Chat.of(model, template).generate_batch(asked, SamplingParameters(max_new_tokens=max_new_tokens))


def measure(model: torch.nn.Module, held_out: list[dict], template: Template, settings: Finetuning) -> dict:
    """One column of the scoreboard: loss, perplexity, stop_rate, repetition_rate, samples, maybe exact_match."""
    loss = held_out_loss(model, held_out, template)
    asked = held_out[: settings.eval_answers]
    given = answers(model, asked, template, settings.max_new_tokens)
    scores = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    if given:
        scores["stop_rate"] = mean(answer.ended_by == END for answer in given)
        scores["repetition_rate"] = mean(repetition(answer.text) for answer in given)
    scores["samples"] = [
        {
            "prompt": row["pair"]["prompt"],
            "reference": row["pair"]["response"],
            "text": answer.text,
            "stopped": answer.ended_by == END,
        }
        for row, answer in zip(asked, given, strict=True)
    ]
    if settings.judge_exact_match and given:
        scores["exact_match"] = mean(
            sample["text"].strip() == sample["reference"].strip() for sample in scores["samples"]
        )
    return scores


def repetition(text: str) -> float:
    """Share of an answer's word 4-grams that stood in it before (seq-rep-4 of arXiv 1908.04319, over words)."""
    words = text.split()
    grams = [tuple(words[i : i + GRAMS]) for i in range(len(words) - GRAMS + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def before(model: torch.nn.Module, held_out: list[dict], template: Template, settings: Finetuning) -> dict:
    """Measures the base without its adapters; returns the scoreboard."""
    with model.disable_adapter():
        return record(settings.folders.scoreboard, before=measure(model, held_out, template, settings))


def after(model: torch.nn.Module, held_out: list[dict], template: Template, settings: Finetuning) -> dict:
    """Measures the base with its trained adapters; returns the scoreboard."""
    return record(settings.folders.scoreboard, after=measure(model, held_out, template, settings))


def published(
    folder: Path, held_out: list[dict], template: Template, settings: Finetuning, dtype: torch.dtype, device: str
) -> dict:
    """Measures the published folder as read back, its checksums verified first; returns the scoreboard."""
    checksums.verify_checksums(folder)
    model = models.load_strict(folder, dtype, device)
    return record(settings.folders.scoreboard, merged=measure(model, held_out, template, settings))


def table(board: dict) -> pd.DataFrame:
    """Measures down, before / after / merged across."""
    names = ["loss", "perplexity", "stop_rate", "repetition_rate", "exact_match"]
    return pd.DataFrame(board).reindex(names).dropna(how="all").astype(float).round(4)


def side_by_side(board: dict, count: int = 5) -> pd.DataFrame:
    """The first prompts with the reference and each column's answer."""
    rows = []
    for samples in list(zip(*(scores["samples"] for scores in board.values()), strict=False))[:count]:
        told = dict(zip(board, map(_with_ending, samples), strict=True))
        rows.append({"prompt": samples[0]["prompt"], "reference": samples[0]["reference"], **told})
    return pd.DataFrame(rows)


def _with_ending(sample: dict) -> str:
    return sample["text"] + ("" if sample["stopped"] else " … (did not stop)")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(path: Path, **columns: dict) -> dict:
    """Adds or replaces columns of scoreboard.json, written atomically; returns all of it in order."""
    board = read(path) | columns
    board = {name: board[name] for name in ("before", "after", "merged") if name in board}
    write_json(path, board)
    return board
