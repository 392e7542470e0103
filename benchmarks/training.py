"""Packed micro-batches against one row per step: the same 84,000 tokens of the sample, both in one run.

python benchmarks/training.py [--tokens 84000] [--output benchmarks/results]. Real NF4, the real trainer; forward,
backward and optimizer step on this machine. Prints tokens per second of both and their ratio.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import gpu
from transformers import AutoConfig

from llm_finetuning import bases, hardware, oasst, pairs, planning, prompts, qlora, training
from llm_finetuning.rows import Rows, rows_from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=84_000)
    parser.add_argument("--output", type=Path, default=gpu.RESULTS)
    options = parser.parse_args()
    machine = hardware.look("float32")
    with tempfile.TemporaryDirectory() as folder:
        base = gpu.make_base(Path(folder), "tiny")
        rows = sample_rows(base, options.tokens)
        speeds = {name: measure(packing, base, rows, Path(folder), machine) for name, packing in
                  (("one row per step", False), ("packed", True))}  # fmt: skip
    figures = [gpu.figure(f"training the sample: {name}", "tokens/s", [speed]) for name, speed in speeds.items()]
    for name, speed in speeds.items():
        print(f"{name:<20} {speed:>9,.0f} tokens/s")
    print(f"packed over one row per step: {speeds['packed'] / speeds['one row per step']:.1f}x")
    report = {"machine": gpu.describe(machine), "versions": hardware.versions(), "size": "sample", "figures": figures}
    gpu.write(report, options.output, machine, "sample")


def sample_rows(base: str, tokens: int) -> Rows:
    """Rows of the sample's English pairs, repeated until they have `tokens` tokens."""
    frame = oasst.flatten(oasst.read_messages("sample"), "best", languages=["en"]).pairs
    template = prompts.template_for(bases.tokenizer(base))
    encoded = rows_from(pairs.to_records(frame), template, 256).rows
    rows, total = [], 0
    while total < tokens:
        row = encoded[len(rows) % len(encoded)]
        rows.append(row)
        total += len(row["input_ids"])
    return Rows(rows, len(rows), 0, 0, {})


def measure(packing: bool, base: str, rows: Rows, folder: Path, machine) -> float:
    """Tokens per second of one epoch; a row, or 1,024 packed tokens, per optimizer step."""
    micro = 1024 if packing else 256
    chosen = gpu.settings_for(base, folder, micro, {"packing": packing, "lora_target_modules": "all-linear"})
    chosen = chosen_for_sample(chosen)
    plan = planning.plan(chosen, machine, AutoConfig.from_pretrained(base), rows.lengths)
    model = qlora.add_adapters(qlora.load_base(chosen, plan, base), chosen)
    trainer, _ = training.build(model, prompts.template_for(bases.tokenizer(base)), rows, chosen, plan, [])
    begun = time.perf_counter()
    trainer.train()
    return trainer.seen_tokens / (time.perf_counter() - begun)


def chosen_for_sample(chosen):
    return dataclasses.replace(chosen, max_seq_length=256, lora_r=16, max_steps=-1, num_train_epochs=1.0)


if __name__ == "__main__":
    main()
