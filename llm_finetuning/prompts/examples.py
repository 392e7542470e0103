"""Pairs as training examples: token ids, labels with the response alone in the loss, histories cut to a length."""

from dataclasses import dataclass

from llm_finetuning.prompts.rendering import Template, encode_texts, question, rendered, rendered_pairs

IGNORE_INDEX = -100
"""Label of a token that is masked out of the loss (torch.nn.CrossEntropyLoss's default ignore_index)."""


def encode(pair: dict, template: Template) -> dict:
    """`{"input_ids": [T], "labels": [T]}`: the response and its EOS are in the loss, all other labels are -100."""
    return encode_all([pair], template)[0]


def encode_all(pairs: list[dict], template: Template) -> list[dict]:
    """`encode` of many pairs at once. The last label of every example is an id that ends an answer.

    Raises ValueError for a pair whose response the template does not write as it is.
    """
    turns = rendered_pairs(pairs, template)
    prompts = encode_texts(((prompt, mark) for prompt, _, mark in turns), template)
    wholes = encode_texts(((prompt + response, mark) for prompt, response, mark in turns), template)
    examples = []
    for (_, response, mark), prompt, ids in zip(turns, prompts, wholes, strict=True):
        # Blank space at the seam may merge into one token; but the model is asked with the prompt's own tokens.
        seamless = ids[: len(prompt)] == prompt
        labels = ids[len(prompt) :] if seamless else encode_texts([(response, mark)], template)[0]
        examples.append(_masked(prompt, labels, template))
    return examples


def _masked(prompt: list[int], response: list[int], template: Template) -> dict:
    """An example with its loss mask: -100 over the prompt, the ids themselves over the response and its end.

    EOS is added to a response that the template does not end.
    """
    if not response or response[-1] not in template.stop_token_ids:
        response = [*response, template.tokenizer.eos_token_id]
    return {"input_ids": prompt + response, "labels": [IGNORE_INDEX] * len(prompt) + response}


@dataclass(frozen=True)
class Truncated:
    """A pair on its way to a length: its history cut as far as it had to be, and what that gave."""

    pair: dict
    example: dict | None
    """As `encode` gives it; None where prompt and response alone are too long."""
    full_length: int
    """Tokens before anything was cut."""

    @property
    def truncated(self) -> bool:
        return self.example is not None and len(self.example["input_ids"]) < self.full_length


def truncate_histories(pairs: list[dict], template: Template, max_length: int) -> list[Truncated]:
    """Encodes each pair, without the oldest turns of its history where it is too long; no response is ever cut."""
    pairs, examples = list(pairs), dict(enumerate(encode_all(pairs, template)))
    full_lengths = [len(example["input_ids"]) for example in examples.values()]
    while too_long := [i for i, example in examples.items() if len(example["input_ids"]) > max_length]:
        examples = {i: example for i, example in examples.items() if len(example["input_ids"]) <= max_length}
        shorter = [i for i in too_long if pairs[i].get("history")]
        for i in shorter:
            pairs[i] = pairs[i] | {"history": without_oldest_turns(pairs[i]["history"])}
        examples |= zip(shorter, encode_all([pairs[i] for i in shorter], template), strict=True)
    return [Truncated(pair, examples.get(i), full_lengths[i]) for i, pair in enumerate(pairs)]


def without_oldest_turns(history: list[dict], number: int = 1) -> list[dict]:
    """Without the oldest user messages and their answers; a system message goes when no turn is left to cut."""
    start = 1 if history and history[0]["role"] == "system" else 0
    return [] if start and 2 * number > len(history) - start else history[:start] + history[start + 2 * number :]


def lengths(pairs: list[dict], template: Template) -> list[dict]:
    """Token counts of each pair: `prompt` (with what the template adds), `history`, `response`, `total`."""
    bare = encode_texts(rendered((question({"prompt": pair["prompt"]}) for pair in pairs), template, True), template)
    rows = []
    for alone, example in zip(map(len, bare), encode_all(pairs, template), strict=True):
        asked, total = example["labels"].count(IGNORE_INDEX), len(example["labels"])
        rows.append({"prompt": alone, "history": asked - alone, "response": total - asked, "total": total})
    return rows
