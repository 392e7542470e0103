"""Training speed on one GPU: the notebook's plan, with one thing changed at a time, and the original's settings.

Every variant is planned anew, as the notebook would, and trains the same rows: conversations with OASST1's lengths, at
most 1,024 tokens. What the plan predicted stands beside what was measured.
"""

import argparse
import re
import time

import measuring
import scaling
import shapes
import torch
import training_runs
from training_runs import ORIGINAL, Run

from llm_finetuning import hardware

PART = "training variants"
ROWS = {"true": 4000, "tiny": 160}
LONGEST = {"true": 1024, "tiny": 512}
WARM_UP = {"true": 3, "tiny": 1}
OURS = {"lora_target_modules": "all-linear", "max_seq_length": 1024, "micro_batch_tokens": 0}
"""What `training_runs.OURS` has otherwise: there the original's targets and length, to compare like with like."""
ROW = LONGEST["true"]
VARIANTS: dict[str, dict] = {
    "ours": {},
    "the original's settings": ORIGINAL
    | {"lora_target_modules": training_runs.ORIGINAL_TARGETS}
    | training_runs.step_of(ROW),
    "ours, with torch's fused AdamW": {"optim": "adamw_torch_fused"},
    "ours, steps of 4,096 tokens": {"tokens_per_step": 4096},
    "ours, steps of 16,384 tokens": {"tokens_per_step": 16_384},
    "ours, with sdpa": {"attention": "sdpa"},
    "ours, with recomputation": {"gradient_checkpointing": "on"},
    "ours, on the 16-bit base": {"use_4bit": "no"},
    "ours, with PEFT's LoRA layers": {"fused_lora": False},
    "ours, with bf16 adapters": {"adapter_dtype": torch.bfloat16},
    "ours, with bf16 autocast": {"autocast": True},
    "ours, with gelu_new": {"gelu": True},
    "ours, without packing": {"packing": False, "micro_batch_tokens": ROW},
    "ours, as on a T4 (float16, sdpa)": {"dtype": "float16", "attention": "sdpa"},
    "ours, with layers compiled": {"compile_layers": "yes"},
}
"""Name → what differs from OURS. The last one compiles for minutes: how long it takes is to stop no other."""


def rows_for(size: str, count: int):
    """Conversations of random tokens with OASST1's lengths."""
    vocabulary = shapes.SMALLER[size].get("vocab_size", 50_000)
    return training_runs.rows_like_oasst(count, vocabulary, LONGEST[size])


def measure(given: argparse.Namespace) -> list[str]:
    """Every variant in turn, as long as there is time; returns what could not be measured, as sentences."""
    wrong, longest = [], 0.0
    for name, changes in VARIANTS.items():
        if given.only not in name:
            continue
        if time.perf_counter() + longest > given.ends:
            wrong.append(f"{name}: not begun, the time is up")
            continue
        begun = time.perf_counter()
        try:
            found = one(name, changes, given)
        except Exception as error:  # a variant that fails costs its own number alone
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            print(f"NOT MEASURED, {wrong[-1]}", flush=True)
            found = {}
        hardware.free_memory()  # what a variant that failed held would be missing in the next one's plan
        if not found:
            continue
        longest = max(longest, time.perf_counter() - begun)
        path = measuring.record_side(PART, given.size, name, figures_of(name, found), given.results)
        print(f"written to {path}", flush=True)
    return wrong


def one(name: str, changes: dict, given: argparse.Namespace) -> dict:
    """One variant: speed and memory, from a model loaded afresh."""
    rows = rows_for(given.size, ROWS[given.size])
    run = Run(given.base, given.folder, settings_of(changes, given.size), rows)
    found = run.train(rows, given.seconds, WARM_UP[given.size])
    run.close()
    print(f"{name}: {training_runs.as_text(found)}", flush=True)
    return found


def settings_of(changes: dict, size: str) -> dict:
    """What a variant changes in the notebook's settings."""
    return OURS | {"max_seq_length": LONGEST[size]} | changes


def figures_of(name: str, found: dict) -> list[dict]:
    """What was measured and what the plan had said, in tokens and rows a second, GiB and shares of the throughput."""
    tokens = found["inputs"]["tokens"] / found["inputs"]["rows"]
    figures = [
        *training_runs.figures(name, found),
        measuring.figure(f"planned tokens per second, {name}", "tokens/s", [found["planned_tokens_per_second"]]),
        measuring.figure(f"planned memory, {name}", "GiB", [found["planned_gib"]]),
        measuring.figure(f"rows per second, {name}", "1/s", [found["tokens_per_second"] / tokens]),
    ]
    if sheet := data_sheet(found["inputs"]["machine"]["name"]):
        share = found["mfu"] * found["inputs"]["machine"]["flops"] / (sheet.tflops * 1e12)
        figures.append(measuring.figure(f"MFU over the data sheet, {name}", "1", [share]))
    return figures


def data_sheet(name: str) -> "scaling.Sheet | None":
    """The data sheet of a GPU by its name; None for a CPU and for one that has none here."""
    words = re.findall(r"[A-Z]+\d+", name.upper())  # also of "NVIDIA A100-SXM4-40GB"
    return next((sheet for sheet in scaling.SHEETS if sheet.name.split()[0] in words), None)
