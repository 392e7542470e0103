"""What a run reads: pairs encoded as examples, with an account of what became of each, and the held-out set.

A pair file repeats every history: the pair of a chat's third prompt holds the two before it. So an example whose
tokens another one begins with is trained on as part of that one, and each history is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from llm_finetuning import models, prompts
from llm_finetuning.data import pairs, preferences
from llm_finetuning.evaluation import agreement, scoreboard
from llm_finetuning.prompts import Template
from llm_finetuning.settings import TRIAL_PAIRS, Finetuning

if TYPE_CHECKING:
    from llm_finetuning.training.planning import Plan

COMMON_LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True)
class TrainingData:
    """The encoded pairs of a run, and what became of the pairs that were read."""

    examples: list[dict]
    """{"input_ids": [T], "labels": [T]}, labels being -100 outside the responses (`conversations`)."""
    pairs: int
    """Pairs that are trained on: each response is in the loss of exactly one example."""
    tokens_as_pairs: int
    """What the pairs hold as one example each."""
    read: int
    truncated: int
    """Pairs that lost the oldest turns of their history."""
    dropped: int
    """Pairs whose prompt and response alone are too long."""
    too_long: dict[int, float]
    """Share of the pairs that are longer, before anything is cut, than 512, 1,024 and 2,048 tokens."""

    @property
    def lengths(self) -> list[int]:
        return [len(example["input_ids"]) for example in self.examples]

    @property
    def tokens_in_loss(self) -> int:
        return sum(label != prompts.IGNORE_INDEX for example in self.examples for label in example["labels"])

    def table(self) -> pd.DataFrame:
        """What became of the pairs, and how many of their tokens are in the loss."""
        tokens = sum(self.lengths)
        share = f"{self.tokens_in_loss:,} = {self.tokens_in_loss / tokens:.0%}"
        saved = f" ({1 - tokens / self.tokens_as_pairs:.0%} fewer than as pairs)" * (tokens < self.tokens_as_pairs)
        lines = [
            ("pairs read", f"{self.read:,}"),
            ("oldest turns cut from the history", f"{self.truncated:,}"),
            ("left out: prompt and response alone are too long", f"{self.dropped:,}"),
            ("pairs to train on", f"{self.pairs:,}"),
            ("examples (pairs of one conversation are one)", f"{len(self.examples):,}"),
            ("tokens", f"{tokens:,}{saved}"),
            ("tokens in the loss (responses and their EOS)", share),
            *[(f"longer than {length:,} tokens", f"{share:.1%}") for length, share in self.too_long.items()],
        ]
        return pd.DataFrame(lines, columns=["what", "count"])


def encode_pairs(pairs: list[dict], template: Template, max_seq_length: int, merge: bool = True) -> TrainingData:
    """Encodes pairs for training: histories are truncated to fit, responses never.

    max_seq_length: tokens of the longest example. merge: pairs of one conversation become one example
    (`conversations`), else each is one of its own. Raises ValueError when no pair fits.
    """
    truncated = prompts.truncate_histories(pairs, template, max_seq_length)
    examples = [pair.example for pair in truncated if pair.example is not None]
    full = [pair.full_length for pair in truncated]
    if not examples:
        raise ValueError(
            f"none of the {len(pairs)} pairs fits in max_seq_length = {max_seq_length} tokens (the shortest has"
            f" {min(full, default=0)}): raise max_seq_length"
        )
    return TrainingData(
        examples=conversations(examples) if merge else examples,
        pairs=len(examples),
        tokens_as_pairs=sum(len(example["input_ids"]) for example in examples),
        read=len(pairs),
        truncated=sum(pair.truncated for pair in truncated),
        dropped=len(pairs) - len(examples),
        too_long={length: sum(n > length for n in full) / len(full) for length in COMMON_LENGTHS},
    )


def conversations(examples: list[dict]) -> list[dict]:
    """Merges each example into one that begins with its tokens: every response in the loss once, fewer tokens.

    Under causal attention a token's loss depends on the tokens before it alone, so that the sum of the losses and of
    the gradients stays what it is. Where several examples begin with the same one, the first of them takes it. An
    example stays one of its own where the template writes a turn in the history otherwise than as a response, where
    its history was truncated, and where its response is in the loss already (the same pair twice).
    """
    beginnings, merged, taken = _beginnings(examples), [], set()
    for last in sorted(set(range(len(examples))) - set(beginnings.values())):
        labels, place = list(examples[last]["labels"]), beginnings.get(last)
        while place is not None and place not in taken:
            ids = examples[place]["input_ids"]
            start = _prompt_length(examples[place])
            labels[start : len(ids)] = ids[start:]
            taken.add(place)
            place = beginnings.get(place)
        merged.append(examples[last] | {"labels": labels})
    return merged


def _beginnings(examples: list[dict]) -> dict[int, int]:
    """Index of an example → index of the longest other one that the tokens of its prompt begin with."""
    keys = [np.asarray(example["input_ids"], np.uint32).tobytes() for example in examples]
    found, path = {}, []
    for place in sorted(range(len(keys)), key=keys.__getitem__):  # what begins with a key follows it
        while path and not keys[place].startswith(keys[path[-1]]):
            path.pop()
        if path and len(examples[path[-1]]["input_ids"]) <= _prompt_length(examples[place]):
            found[place] = path[-1]
        path.append(place)
    return found


def _prompt_length(example: dict) -> int:
    """Tokens before the response of an example as `prompts.encode` makes it."""
    return example["labels"].count(prompts.IGNORE_INDEX)


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before it plans: its prompt format, its training data and its held-out set."""

    template: Template
    data: TrainingData
    held_out: list[dict]
    """Examples with the pair beside them: {"input_ids", "labels", "pair"} (`scoreboard.held_out_set`)."""
    ranked: list[dict] = field(default_factory=list)
    """Held-out replies that people ranked (`agreement.drawn`)."""

    def planned(self, plan: "Plan") -> "Plan":
        """The plan as it suits these inputs: packed examples fill what was planned."""
        return plan


def read_inputs(settings: Finetuning) -> RunInputs:
    """The inputs of a run from the files that the data preparation wrote. Raises FileNotFoundError or ValueError."""
    folders = settings.folders
    train = pairs.read_prepared(folders.train_file, "Training")
    held_out = pairs.read_prepared(folders.val_file, "Validation")
    if settings.quick_trial:
        train = pairs.draw(train, TRIAL_PAIRS, settings.seed)
    tokenizer = models.tokenizer(settings.model_name, settings.tokenizer_folder, settings.model_revision)
    return encode_inputs(settings, tokenizer, train, held_out, preferences.read(folders.val_preferences))


def encode_inputs(
    settings: Finetuning,
    tokenizer: PreTrainedTokenizerBase,
    train: list[dict],
    held_out: list[dict],
    ranked: Sequence[dict] = (),
) -> RunInputs:
    """The inputs of a run from pair records in memory."""
    template = prompts.template_for(tokenizer, settings.system_message, settings.chat_template, prompts.FIXED_DATE)
    length = settings.max_seq_length
    return RunInputs(
        template,
        encode_pairs(train, template, length, settings.train_on == "every response"),
        scoreboard.held_out_set(held_out, template, length, settings.eval_pairs, settings.seed),
        agreement.drawn(ranked, template, length, settings.eval_pairs, settings.seed),
    )
