"""What preference tuning reads: pairs of a chosen and a rejected response, and the held-out ones among them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from llm_finetuning import models, prompts
from llm_finetuning.data import leaks, pairs, preferences
from llm_finetuning.evaluation import agreement, scoreboard
from llm_finetuning.prompts import Template
from llm_finetuning.settings import TRIAL_PAIRS, PreferenceTuning
from llm_finetuning.training.dataset import RunInputs

if TYPE_CHECKING:
    from llm_finetuning.training.planning import Plan
    from llm_finetuning.training.preference_plan import PreferencePlan


@dataclass(frozen=True)
class PreferenceData:
    """The encoded preference pairs of a run, and what became of the records that were read."""

    pairs: list[dict]
    """{"chosen": example, "rejected": example, "record"} (`agreement.ranked_pairs`)."""
    read: int

    @property
    def examples(self) -> list[dict]:
        """Both responses of each pair in turn, as examples of their own."""
        return [pair[side] for pair in self.pairs for side in preferences.SIDES]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example["input_ids"]) for example in self.examples]

    @property
    def padded(self) -> list[int]:
        """Tokens of each pair in a batch of its own: both responses as long as the longer one."""
        lengths = self.lengths
        return [2 * max(two) for two in zip(lengths[::2], lengths[1::2], strict=True)]

    def rows(self) -> Iterator[dict]:
        """The pairs as TRL's collator takes them: {"prompt_ids", "chosen_ids", "rejected_ids"}."""
        for pair in self.pairs:
            asked = pair["chosen"]["labels"].count(prompts.IGNORE_INDEX)
            ids = {f"{side}_ids": pair[side]["input_ids"][asked:] for side in preferences.SIDES}
            yield {"prompt_ids": pair["chosen"]["input_ids"][:asked]} | ids

    def table(self) -> pd.DataFrame:
        """What became of the records, and how the responses that people preferred differ in length."""
        longer = sum(len(pair["chosen"]["input_ids"]) > len(pair["rejected"]["input_ids"]) for pair in self.pairs)
        means = [sum(lengths) / len(self.pairs) for lengths in (self.lengths[::2], self.lengths[1::2])]
        lines = [
            ("preference pairs read", f"{self.read:,}"),
            ("left out: too long without any history", f"{self.read - len(self.pairs):,}"),
            ("pairs to train on", f"{len(self.pairs):,}"),
            ("tokens, chosen / rejected, on average", f"{means[0]:,.0f} / {means[1]:,.0f}"),
            ("the chosen response is the longer one", f"{longer / len(self.pairs):.0%}"),
        ]
        return pd.DataFrame(lines, columns=["what", "count"])


@dataclass(frozen=True)
class PreferenceInputs(RunInputs):
    """What preference tuning reads before it plans; `ranked` are the held-out preference pairs."""

    data: PreferenceData
    rows: Dataset | None = None
    """The rows of the pairs with the reference's log-probabilities, once a trainer has computed them."""
    compared: Dataset | None = None
    """Those of the held-out pairs, where learning rates are compared."""

    def planned(self, plan: "Plan") -> "PreferencePlan":
        """The plan in pairs, with their padding."""
        from llm_finetuning.training.preference_plan import in_pairs

        return in_pairs(plan, self.data)


class ByLength(Sampler):
    """Pairs of like length side by side, in another order each epoch that seed and epoch alone decide."""

    def __init__(self, lengths: list[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


def padded_tokens(data: PreferenceData, batch: int, seed: int) -> int:
    """Tokens of an epoch in batches of `batch` pairs, padding included."""
    lengths = data.padded
    ordered = [lengths[i] for i in ByLength(lengths, batch, seed)]
    batches = [ordered[start : start + batch] for start in range(0, len(ordered), batch)]
    return sum(len(together) * max(together) for together in batches)


def read_inputs(settings: PreferenceTuning) -> PreferenceInputs:
    """The inputs of preference tuning from the files that the data preparation wrote.

    Raises FileNotFoundError, or ValueError for records that are no preference and for what stands in both splits.
    """
    folders = settings.folders
    train = preferences.read_prepared(folders.train_preferences, "Training")
    ranked = preferences.read_prepared(folders.val_preferences, "Validation")
    held_out = pairs.read_prepared(folders.val_file, "Validation")
    check_leaks(train, [*held_out, *map(_as_pair, ranked)], folders.train_preferences.name)
    if settings.quick_trial:
        train = pairs.draw(train, TRIAL_PAIRS, settings.seed)
    tokenizer = models.tokenizer(settings.model_name, settings.tokenizer_folder, settings.model_revision)
    return encode_inputs(settings, tokenizer, train, held_out, ranked)


def _as_pair(record: dict) -> dict:
    return record | {"response": record["chosen"]}


def check_leaks(train: list[dict], held_out: list[dict], name: str) -> None:
    """Raises ValueError for preference pairs whose tree or prompt stands in the held-out set too."""
    found, _ = leaks.overlaps(preferences.as_pairs(train), pairs.to_frame(held_out))
    if not (leaked := found[::2].dropna()).empty:  # both sides of a pair have one prompt
        first = train[leaked.index[0] // 2]["prompt"]
        raise ValueError(
            f"{len(leaked)} of {len(train)} pairs of {name} are in the held-out set too, by {leaked.iloc[0]} (such as"
            f" {first!r:.60}): what is measured there would say nothing. Run the validation data notebook again with"
            " remove_leaks = True, or take them out of one of the files"
        )


def encode_inputs(
    settings: PreferenceTuning,
    tokenizer: PreTrainedTokenizerBase,
    train: list[dict],
    held_out: list[dict],
    ranked: list[dict],
) -> PreferenceInputs:
    """The inputs of preference tuning from records in memory."""
    template = prompts.template_for(tokenizer, settings.system_message, settings.chat_template, prompts.FIXED_DATE)
    length, count, seed = settings.max_seq_length, settings.eval_pairs, settings.seed
    return PreferenceInputs(
        template,
        encode_preferences(train, template, length),
        scoreboard.held_out_set(held_out, template, length, count, seed),
        agreement.sampled(encode_preferences(ranked, template, length, "held-out ").pairs, count, seed),
    )


def encode_preferences(records: list[dict], template: Template, max_seq_length: int, which: str = "") -> PreferenceData:
    """Encodes preference records; a history is cut to fit, a response never.

    which: what an error calls them. Raises ValueError where none fits, and for one whose responses are the same tokens.
    """
    encoded = agreement.ranked_pairs(records, template, max_seq_length)
    if not encoded:
        raise ValueError(
            f"none of the {len(records)} {which}preference pairs fits in max_seq_length = {max_seq_length} tokens a"
            " response: raise it"
        )
    for pair in encoded:
        if pair["chosen"]["input_ids"] == pair["rejected"]["input_ids"]:
            raise ValueError(
                f"chosen and rejected of the {which}pair {pair['record']['prompt']!r:.60} are the same tokens: that is"
                " no preference. Take the pair out"
            )
    return PreferenceData(encoded, len(records))
