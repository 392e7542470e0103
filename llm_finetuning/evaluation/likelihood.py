"""How probable a model holds given tokens: held-out responses, replies that people ranked, plain text."""

from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import pad_sequence

from llm_finetuning import prompts
from llm_finetuning.evaluation import mode
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.prompts import Template

BATCH_TOKENS = 4096
LOGIT_BYTES = 4
"""Of a token and an entry of the vocabulary, in float32."""
BATCH_BYTES = 7 * 2**27
"""Of a batch's logits: with up to 57,000 entries, such as Phi-2's, BATCH_TOKENS have room in it."""
SLICE = 256
"""Tokens whose distributions are in memory at once, in float32: of Gemma 3 they are 0.3 GB."""


def losses(model: torch.nn.Module, examples: list[dict], template: Template) -> Sample:
    """Negative log-likelihood of each example's tokens in the loss, in nats, weighted by their number.

    examples: {"input_ids": [T], "labels": [T]} as `prompts.encode` gives them, computed in batches, longest first.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    found: dict[int, tuple[float, int]] = {}
    with mode.evaluating(model):
        for batch in _batches(order, examples, model.config.get_text_config().vocab_size):
            found |= zip(batch, _losses_of_batch(model, [examples[i] for i in batch], template), strict=True)
    return Sample(*(list(column) for column in zip(*(found[i] for i in range(len(examples))), strict=True)))


def _batches(order: list[int], examples: list[dict], vocabulary: int) -> Iterator[list[int]]:
    """Indices of examples, longest first, in batches whose logits have room in memory, padding included.

    vocabulary: its entries. An example that is longer is a batch of its own.
    """
    most = min(BATCH_TOKENS, BATCH_BYTES // (LOGIT_BYTES * vocabulary))
    while order:
        count = max(1, most // len(examples[order[0]]["input_ids"]))
        yield order[:count]
        order = order[count:]


def _losses_of_batch(model: torch.nn.Module, batch: list[dict], template: Template) -> list[tuple[float, int]]:
    """(summed negative log-likelihood, tokens in the loss) of each example of a batch, padded on the right."""
    device = next(model.parameters()).device

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:  # (B, T)
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)

    ids = padded([example["input_ids"] for example in batch], template.tokenizer.eos_token_id)
    mask = padded([[1] * len(example["input_ids"]) for example in batch], 0)
    targets = padded([example["labels"] for example in batch], prompts.IGNORE_INDEX)[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    in_loss = targets != prompts.IGNORE_INDEX
    each = torch.cat([_loss_at(logits, targets, places) for places in in_loss.nonzero().split(SLICE)])
    counts = in_loss.sum(1).tolist()
    return [(part.double().sum().item(), count) for part, count in zip(each.split(counts), counts, strict=True)]


def _loss_at(logits: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods (N) at `places` (N, 2) of targets (B, T) under logits (B, T, V)."""
    at = places.unbind(1)
    return torch.nn.functional.cross_entropy(logits[at].float(), targets[at], reduction="none")
