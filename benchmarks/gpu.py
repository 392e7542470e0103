"""Training speed on one GPU at Phi-2's true size: the original's settings, ours, and ours with one thing left out.

    python benchmarks/gpu.py                      on a GPU: random weights, under ten minutes, no network
    python benchmarks/gpu.py --size tiny          the same code on a CPU, to see that it works

Correctness comes first: variable-length attention against sdpa, a finite loss and gradient at every step. Then each
variant trains the same rows (lengths drawn from OASST1's, at most 512 tokens) and writes tokens per second, rows per
second, MFU, peak memory and the time of one epoch to benchmarks/results/<machine>.json. "The original" is written
out from its description: batch 1, no packing, fp16 autocast, adapters on q, k, v and dense, paged AdamW.
"""

import argparse
import dataclasses
import gc
import json
import platform
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, TrainerCallback

from llm_finetuning import attention, bases, hardware, planning, prompts, qlora, settings, training
from llm_finetuning.rows import Rows

RESULTS = Path(__file__).parent / "results"
ORIGINAL_ROWS = 20_587
"""Rows of one epoch of the original (its flattening of OASST1's train split)."""
PERCENTILES = [(0, 20), (5, 80), (25, 193), (50, 396), (75, 673), (90, 1098), (95, 1502), (99, 2870), (100, 3000)]
"""Token lengths of OASST1's threads along the best path, Phi-2's tokenizer."""
ORIGINAL_TARGETS = "q_proj, k_proj, v_proj, dense"

OURS = {"packing": True, "attention": "auto", "dtype": "auto", "lora_target_modules": ORIGINAL_TARGETS}
VARIANTS: dict[str, dict] = {
    "the original": {"packing": False, "dtype": "float16", "micro": "row", "optim": "paged_adamw_32bit", "gelu": True},
    "ours": {},
    "ours, without packing": {"packing": False},
    "ours, without variable-length attention": {"attention": "sdpa"},
    "ours, with bf16 autocast": {"autocast": True},
    "ours, with fp32 adapters": {"adapter_dtype": torch.float32},
    "ours, with gelu_new": {"gelu": True},
    "ours, with recomputation": {"gradient_checkpointing": "on"},
    "ours, with a quarter of the micro-batch": {"micro": 0.25},
    "ours, with layers compiled": {"compile_layers": True},
    "ours, on all linear layers": {"lora_target_modules": "all-linear"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=["phi-2", "tiny"], default="phi-2")
    parser.add_argument("--seconds", type=float, default=25, help="measured per variant")
    parser.add_argument("--micro", type=int, default=0, help="tokens per micro-batch; 0 = 16,384, or 1,024 if tiny")
    parser.add_argument("--only", default="", help="part of a variant's name")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = hardware.look("auto")
    figures = check_attention(machine)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), options.size)
        for name, changes in VARIANTS.items():
            if options.only in name:
                figures.append(measure(name, changes, base, Path(folder), machine, options))
                print_row(figures[-1])
    report = {"machine": describe(machine), "versions": hardware.versions(), "size": options.size, "figures": figures}
    write(report, options.output, machine, options.size)


def make_base(folder: Path, size: str) -> str:
    if size == "phi-2":
        return bases.locate("rehearsal", folder)
    from llm_finetuning.sample import phi

    return str(bases.make_sample(folder / "sample", dataclasses.replace(phi.Recipe(), steps=1)))


def check_attention(machine: hardware.Machine) -> list[dict]:
    """Variable-length attention against sdpa on each document, output and gradients, in bf16; raises if far."""
    if not attention.available(machine.device):
        return []
    torch.manual_seed(0)
    lengths = [5, 131, 700, 64, 1]
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=machine.device)
    shape = (sum(lengths), 32, 80)
    q, k, v = (torch.randn(shape, device=machine.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = attention.causal_varlen(q, k, v, borders, max(lengths), 80**-0.5)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    a, b, c = (x.detach().double().requires_grad_() for x in (q, k, v))
    parts = []
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        one = [x[start:end].transpose(0, 1)[None] for x in (a, b, c)]
        parts.append(torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)[0].transpose(0, 1))
    reference = torch.cat(parts)
    expected = torch.autograd.grad((reference * weights.double()).sum(), (a, b, c))
    errors = [relative(out, reference), *(relative(x, y) for x, y in zip(found, expected, strict=True))]
    print(f"variable-length attention against fp64: output {errors[0]:.1e}, gradients {max(errors[1:]):.1e}")
    if not max(errors) < 1e-2:
        raise SystemExit(f"variable-length attention is wrong: {errors}")
    return [figure("varlen attention, largest relative error", "1", [max(errors)])]


def relative(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def rows_like_oasst(count: int, vocabulary: int, longest: int) -> list[dict]:
    """Random tokens with OASST1's lengths, cut at `longest`; the last 60% of each row is the answer."""
    chance = random.Random(0)
    at, lengths = zip(*PERCENTILES, strict=True)
    rows = []
    for _ in range(count):
        length = min(longest, int(np.interp(chance.uniform(0, 100), at, lengths)))
        ids = [chance.randrange(vocabulary) for _ in range(length)]
        cut = int(length * 0.4)
        rows.append({"input_ids": ids, "labels": [prompts.IGNORED] * cut + ids[cut:]})
    return rows


def settings_for(base: str, folder: Path, micro: int, changes: dict) -> settings.Finetuning:
    """The notebook's defaults, with adapters, micro-batch and the variant's changes put in."""
    cell = json.loads((Path(__file__).parents[1] / "Finetuning" / "Phi-2 QLoRA Finetuning.ipynb").read_text())
    source = next("".join(c["source"]) for c in cell["cells"] if "parameters" in c["metadata"].get("tags", []))
    values: dict = {}
    exec(source, values)  # literals only
    own = {name: value for name, value in (OURS | changes).items() if name in values}
    values |= own | {
        "drive_folder": str(folder / "run"),
        "work_folder": str(folder / "run"),
        "model_name": base,
        "max_seq_length": 512,
        "tokens_per_step": micro,
        "micro_batch_tokens": micro,
        "save_steps": 10**9,
        "eval_steps": 0,
        "report_to": "none",
        "resume": False,
        "logging_steps": 10**6,
        "max_steps": 10**6,
    }
    return settings.from_cell(settings.Finetuning, values)


class Clock(TrainerCallback):
    """Warm-up steps, then steps until `seconds` are over; the device is waited for at both ends only."""

    def __init__(self, trainer, device: str, seconds: float, warm_up: int):
        self.trainer, self.device, self.seconds, self.warm_up = trainer, device, seconds, warm_up
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < self.warm_up:
            return
        if state.global_step == self.warm_up:
            hardware._wait(self.device)
            self.start, self.tokens, self.step = time.perf_counter(), self.trainer.seen_tokens, state.global_step
        elif time.perf_counter() - self.start > self.seconds:
            hardware._wait(self.device)
            self.elapsed = time.perf_counter() - self.start
            self.tokens, self.step = self.trainer.seen_tokens - self.tokens, state.global_step - self.step
            control.should_training_stop = True


def measure(name: str, changes: dict, base: str, folder: Path, machine, options) -> dict:
    """One variant: speed and memory, from a model loaded afresh."""
    micro = options.micro or (16_384 if options.size == "phi-2" else 1024)
    micro = 512 if changes.get("micro") == "row" else max(512, int(micro * changes.get("micro", 1)))
    changes = changes if machine.on_gpu else {k: v for k, v in changes.items() if k != "dtype"}
    chosen = settings_for(base, folder, micro, changes)
    config = AutoConfig.from_pretrained(base)
    rows = rows_like_oasst(4000 if options.size == "phi-2" else 400, min(config.vocab_size, 50_000), 512)
    plan = planning.plan(chosen, machine, config, [len(row["input_ids"]) for row in rows])
    plan = dataclasses.replace(plan, adapter_dtype=changes.get("adapter_dtype", plan.adapter_dtype))
    template = prompts.template_for(bases.tokenizer(base))
    peak = hardware.PeakMemory(plan.device).start()
    model = qlora.add_adapters(load(chosen, plan, base, changes), chosen)
    encoded = Rows(rows, len(rows), 0, 0, {})
    trainer, _ = training.build(model, template, encoded, chosen, plan, [])
    if changes.get("autocast"):
        trainer.compute_loss_context_manager = lambda: torch.autocast(plan.device.split(":")[0], torch.bfloat16)
    clock = Clock(trainer, plan.device, options.seconds, 3 if options.size == "phi-2" else 1)
    trainer.add_callback(clock)
    trainer.train()
    loss = trainer.state.log_history[-1]["train_loss"]
    if not np.isfinite(loss):
        raise SystemExit(f"{name}: the loss is {loss}")
    result = summary(name, clock, plan, rows, peak.read())
    del trainer, model, clock
    gc.collect()
    if machine.on_gpu:
        torch.cuda.empty_cache()
    return result


def load(chosen, plan, base: str, changes: dict):
    model = qlora.load_base(chosen, plan, base)
    if changes.get("gelu"):
        from transformers.activations import ACT2FN

        for layer in model.model.layers:
            layer.mlp.activation_fn = ACT2FN["gelu_new"]
    return model


def summary(name: str, clock: Clock, plan, rows: list[dict], peak: int) -> dict:
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    speed = clock.tokens / clock.elapsed
    flops = planning.flops_per_token(plan.size, mean)
    return figure(f"training: {name}", "tokens/s", [speed]) | {
        "rows_per_second": speed / mean,
        "mfu": speed * flops / plan.machine.flops,
        "model_tflops": speed * flops / 1e12,
        "peak_memory_gib": peak / hardware.GIB,
        "predicted_memory_gib": plan.peak_memory / hardware.GIB,
        "epoch_minutes": ORIGINAL_ROWS * mean / speed / 60,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "attention": plan.attention,
        "steps": clock.step,
    }


def figure(name: str, unit: str, values: list[float]) -> dict:
    return {
        "name": name,
        "unit": unit,
        "values": values,
        "median": float(np.median(values)),
        "spread": float(max(values) - min(values)),
    }


def print_row(row: dict) -> None:
    print(
        f"{row['name']:<55} {row['median']:>9,.0f} tokens/s  {row['rows_per_second']:>7.1f} rows/s"
        f"  MFU {row['mfu']:>5.1%}  {row['peak_memory_gib']:>6.1f} GiB (planned {row['predicted_memory_gib']:.1f})"
        f"  epoch {row['epoch_minutes']:.1f} min",
        flush=True,
    )


def describe(machine) -> dict:
    return {
        "name": machine.name,
        "memory_gib": machine.memory / hardware.GIB,
        "measured_tflops": machine.flops / 1e12,
        "system": platform.platform(),
    }


def write(report: dict, folder: Path, machine, size: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in machine.name).strip("-").lower()
    path = folder / f"training-{size}-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows = {row["name"]: row for row in report["figures"] if row["name"].startswith("training")}
    if {"training: ours", "training: the original"} <= set(rows):
        ratio = rows["training: ours"]["rows_per_second"] / rows["training: the original"]["rows_per_second"]
        print(f"ours over the original, rows per second: {ratio:.1f}x")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
