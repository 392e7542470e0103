"""Packed micro-batches against one row per step: twelve times the same 7,000 tokens of the sample, in turn.

Then an epoch of the sample with each conversation as one example against each pair as one: tokens and time.

python benchmarks/training.py [--tokens 7000]. The sample's tiny Phi in NF4, the real trainer; forward, backward and
optimizer step on this machine.
"""

import math
from pathlib import Path

import measuring
import training_runs

from llm_finetuning import models, prompts
from llm_finetuning.data import oasst, pairs
from llm_finetuning.sample import making, phi
from llm_finetuning.training.dataset import TrainingData, encode_pairs

PART = "packing"
TOKENS = {"small": 7000, "tiny": 2000}
ROUNDS = {"small": 5, "tiny": 1}
EPOCHS = {"small": 3, "tiny": 1}
PAIRS = {"small": None, "tiny": 12}
"""Pairs of an epoch; None = all of the sample's."""
LONGEST = 256
SIDES = {
    "packed": {"packing": True} | training_runs.step_of(1024),
    "one row per step": {"packing": False} | training_runs.step_of(LONGEST),
}
SAMPLE = {"lora_target_modules": "all-linear", "max_seq_length": LONGEST, "lora_r": 16} | training_runs.ONCE


def main() -> None:
    parser = measuring.options(__doc__, "small", "tiny")
    parser.add_argument("--tokens", type=int, default=0, help="0 = 7,000")
    given = parser.parse_args()
    tokens = given.tokens or TOKENS[given.size]
    base = make_base(given.work)
    rows = sample_rows(base, tokens)
    turns = {name: turn(name, base, rows, given.work) for name in SIDES}
    (packed, alone) = measuring.in_turn(turns, ROUNDS[given.size]).items()
    figures = measuring.compare(f"{tokens:,} tokens of the sample, tokens per second", "tokens/s", packed, alone)
    figures += epochs(base, PAIRS[given.size], EPOCHS[given.size], given.work)
    print(f"written to {measuring.record(PART, given.size, figures, given.results)}")


def make_base(folder: Path) -> Path:
    """The sample's base after one step of pretraining: what it knows does not matter here."""
    return making.make_sample(folder / "base-sample", phi.Recipe(steps=1))


def epochs(base: Path, count: int | None, rounds: int, folder: Path) -> list[dict]:
    """Tokens that an epoch computes, and its time, with conversations and with pairs as examples."""
    merged = {"each pair an example": False, "each conversation an example": True}
    data = {name: sample_data(base, merge, count) for name, merge in merged.items()}
    tokens = {name: [sum(side.lengths)] for name, side in data.items()}
    turns = {name: turn("packed", base, side, folder, "seconds") for name, side in data.items()}
    seconds = measuring.in_turn(turns, rounds)
    title = "an epoch of the sample"
    return [
        *measuring.compare(f"{title}, tokens computed", "tokens", *tokens.items()),
        *measuring.compare(f"{title}, time", "s", *seconds.items()),
    ]


def sample_data(base: Path, merge: bool = True, count: int | None = None) -> TrainingData:
    """The sample's English pairs, encoded; merge: those of one conversation as one example."""
    frame = oasst.flatten(oasst.read_messages("sample"), "best", languages=["en"]).pairs
    template = prompts.template_for(models.tokenizer(str(base)))
    return encode_pairs(pairs.to_records(frame)[:count], template, LONGEST, merge)


def sample_rows(base: Path, tokens: int) -> TrainingData:
    """Rows of the sample's English pairs, repeated until they have `tokens` tokens."""
    encoded = sample_data(base).examples
    rows, total = [], 0
    while total < tokens:
        row = encoded[len(rows) % len(encoded)]
        rows.append(row)
        total += len(row["input_ids"])
    return training_runs.as_data(rows)


def turn(name: str, base: Path, rows: TrainingData, folder: Path, what: str = "tokens_per_second"):
    """A turn of one side: tokens per second, or seconds, of one pass over the rows."""
    run = training_runs.Run(base, folder / "training", SAMPLE | SIDES[name], rows)
    run.train(training_runs.as_data(rows.examples[:8]), math.inf, 0)
    return lambda: run.train(rows, math.inf, 0)[what]


if __name__ == "__main__":
    main()
