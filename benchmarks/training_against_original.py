"""Training: ours against the original's settings and PEFT's LoRA layers; how a step grows with the tokens of a row.

    python benchmarks/training_against_original.py

With a GPU at Phi-2's true size, without one on a small Phi; random weights, real NF4, the real trainer. The
original's settings are written out from its description (`training_runs.ORIGINAL`). Each side has a process of its
own, and all train the same rows in turn, lengths drawn from OASST1's, at most 512 tokens.
"""

import math
from pathlib import Path

import measuring
import shapes
import torch
import training_runs
from training_runs import ONCE, ORIGINAL, Run

PART = "training"
ROWS = {"true": 4000, "small": 6, "tiny": 4}
SECONDS = {"true": 20.0, "small": math.inf, "tiny": math.inf}
"""Longest turn; without an end the rows are trained once."""
WARM_UP = {"true": 3, "small": 0, "tiny": 0}
"""Steps of a turn before its clock starts; small sides warm up once, while they prepare."""
STEP = {"true": 16_384, "small": 2048, "tiny": 1024}
"""Tokens of an optimizer step of ours; how many of them go at a time is for the plan to decide."""
ROUNDS = {"true": 3, "small": 3, "tiny": 2}
GROWTH_ROUNDS = {"true": 2, "small": 2, "tiny": 1}
LENGTHS = {"true": (128, 256, 512, 1024, 2048), "small": (128, 256, 512, 1024, 2048), "tiny": (16, 32, 64, 128, 256)}
"""Tokens per row, and per step, of the growth."""
STEPS = {"true": 8, "small": 1, "tiny": 1}
"""Steps at the longest; at the others so many more that every turn has as many tokens."""
SIDES = {"ours": {}, "the original's settings": ORIGINAL, "ours, with PEFT's LoRA layers": {"fused_lora": False}}


def job(side: str, size: str, work: Path):
    """The turn of a side: one pass over the rows, or steps of one row of `length` tokens."""
    base, vocabulary = shapes.base(work, size), shapes.config(size).vocab_size
    rows = training_runs.rows_like_oasst(ROWS[size], min(vocabulary, 50_000), training_runs.LONGEST)
    run = Run(base, work / "training", {"tokens_per_step": STEP[size], "micro_batch_tokens": 0} | SIDES[side], rows)

    def turn(length: int = 0) -> dict:
        if length == 0:
            return run.train(rows, SECONDS[size], WARM_UP[size], **({} if WARM_UP[size] else ONCE))
        row = {"packing": False, "max_seq_length": length} | training_runs.step_of(length) | ONCE
        lengths = [length] * (STEPS[size] * LENGTHS[size][-1] // length)
        return run.train(training_runs.random_rows(lengths, vocabulary), math.inf, 0, **row)

    turn(length=LENGTHS[size][0])
    return turn


def measure(size: str, work: Path) -> list[dict]:
    """Both sides, and the growth of ours."""
    shapes.base(work, size)
    arguments, alone = ["--size", size, "--work", str(work)], size == "true"
    with measuring.sides(Path(__file__).name, list(SIDES), arguments, alone) as turns:
        found = measuring.in_turn(turns, ROUNDS[size])
        steps = {n: (lambda n=n: turns["ours"](length=n)) for n in LENGTHS[size]}
        grown = measuring.in_turn(steps, GROWTH_ROUNDS[size])
    return [*comparison(found), *how_it_grows(grown)]


def comparison(found: dict[str, list[dict]]) -> list[dict]:
    """Speed and memory of all sides, the ratios of ours and each other, and what predicts each side."""
    speeds = {side: [turn["tokens_per_second"] for turn in turns] for side, turns in found.items()}
    peaks = {side: [turn["peak_gib"] for turn in turns] for side, turns in found.items()}
    mine, *others = found
    figures = {}
    for other in others:
        both = [
            *measuring.compare("tokens per second", "tokens/s", (mine, speeds[mine]), (other, speeds[other])),
            *measuring.compare("peak memory", "GiB", (other, peaks[other]), (mine, peaks[mine])),
        ]
        figures |= {entry["name"]: entry for entry in both}
    figures["MFU"] = measuring.figure("MFU, ours", "1", [turn["mfu"] for turn in found[mine]])
    known = {side: turns[-1]["inputs"] for side, turns in found.items()}
    return [entry | {"inputs": known[side]} if (side := _side(entry, known)) else entry for entry in figures.values()]


def _side(entry: dict, known: dict) -> str:
    """The side whose speed or memory this is; "" for ratios and shares."""
    side = entry["name"].partition(", ")[2]
    return side if entry["unit"] in ("tokens/s", "GiB") and side in known else ""


def how_it_grows(grown: dict[int, list[dict]]) -> list[dict]:
    """Seconds of a step of one row by its tokens, with what predicts each."""
    seconds = {length: [turn["step_seconds"] for turn in turns] for length, turns in grown.items()}
    figures = measuring.growth("time of a step of one row", "tokens", "s", seconds)
    return [entry | {"inputs": grown[entry["at"]][-1]["inputs"]} if "at" in entry else entry for entry in figures]


def main() -> None:
    given = measuring.options(__doc__, "small", "tiny").parse_args()
    size = "true" if given.size == "small" and torch.cuda.is_available() else given.size
    if given.side:
        measuring.serve(lambda: job(given.side, size, given.work))
        return
    print(f"written to {measuring.record(PART, size, measure(size, given.work), given.results)}")


if __name__ == "__main__":
    main()
