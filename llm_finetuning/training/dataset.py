"""What a run reads: pairs encoded as examples, with an account of what became of each, and the held-out set."""

from dataclasses import dataclass

import pandas as pd
from transformers import PreTrainedTokenizerBase

from llm_finetuning import models, prompts
from llm_finetuning.data import pairs
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.prompts import Template
from llm_finetuning.settings import Finetuning

COMMON_LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True)
class TrainingData:
    """The encoded pairs of a run, and what became of the pairs that were read."""

    examples: list[dict]
    """One a pair: {"input_ids": [T], "labels": [T]}, labels being -100 outside the response (`prompts.encode`)."""
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
        lines = [
            ("pairs read", f"{self.read:,}"),
            ("oldest turns cut from the history", f"{self.truncated:,}"),
            ("left out: prompt and response alone are too long", f"{self.dropped:,}"),
            ("pairs to train on", f"{len(self.examples):,}"),
            ("tokens", f"{tokens:,}"),
            ("tokens in the loss (responses and their EOS)", share),
            *[(f"longer than {length:,} tokens", f"{share:.1%}") for length, share in self.too_long.items()],
        ]
        return pd.DataFrame(lines, columns=["what", "count"])


def encode_pairs(pairs: list[dict], template: Template, max_seq_length: int) -> TrainingData:
    """Encodes pairs for training: histories are truncated to fit, responses never.

    max_seq_length: tokens of the longest example. Raises ValueError when no pair fits.
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
        examples=examples,
        read=len(pairs),
        truncated=sum(pair.truncated for pair in truncated),
        dropped=len(pairs) - len(examples),
        too_long={length: sum(n > length for n in full) / len(full) for length in COMMON_LENGTHS},
    )


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before it plans: its prompt format, its training data and its held-out set."""

    template: Template
    data: TrainingData
    held_out: list[dict]
    """Examples with the pair beside them: {"input_ids", "labels", "pair"} (`scoreboard.held_out_set`)."""


def read_inputs(settings: Finetuning) -> RunInputs:
    """The inputs of a run from the files that the data preparation wrote. Raises FileNotFoundError or ValueError."""
    folders = settings.folders
    for file, part in ((folders.train_file, "Training"), (folders.val_file, "Validation")):
        if not file.is_file():
            raise FileNotFoundError(
                f'{file} not found: run "Data Prep/OpenAssistant Finetuning {part} Data Prep.ipynb" first, with the'
                " same drive_folder (and a validation_share above 0), or set drive_folder to where its results are"
            )
    train, held_out = (pairs.to_records(pairs.read_jsonl(file)) for file in (folders.train_file, folders.val_file))
    tokenizer = models.tokenizer(settings.model_name, settings.tokenizer_folder, settings.model_revision)
    return encode_inputs(settings, tokenizer, train, held_out)


def encode_inputs(
    settings: Finetuning, tokenizer: PreTrainedTokenizerBase, train: list[dict], held_out: list[dict]
) -> RunInputs:
    """The inputs of a run from pair records in memory."""
    template = prompts.template_for(tokenizer, settings.system_message, settings.chat_template)
    length = settings.max_seq_length
    return RunInputs(
        template,
        encode_pairs(train, template, length),
        scoreboard.held_out_set(held_out, template, length, settings.eval_pairs, settings.seed),
    )
