"""Training speed on one GPU at Phi-2's true size: the original's settings, ours, and ours with one thing left out.

    python benchmarks/gpu.py                      on a GPU: random weights, under ten minutes, no network
    python benchmarks/gpu.py --size tiny          the same code on a CPU, to see that it works

Correctness comes first: variable-length attention against sdpa, a finite loss and gradient at every step. Then each
variant trains the same rows (lengths drawn from OASST1's, at most 512 tokens) from a model loaded afresh. "The
original" is written out from its description (`training_runs.ORIGINAL`).
"""

import tempfile
from pathlib import Path

import measuring
import numpy as np
import shapes
import torch
import training_runs
from training_runs import ORIGINAL, Run

from llm_finetuning import hardware
from llm_finetuning.training import attention

PART = "training variants"
ROWS = {"true": 4000, "tiny": 400}
MICRO = {"true": 16_384, "tiny": 1024}
WARM_UP = {"true": 3, "tiny": 1}
ORIGINAL_ROWS = 20_587
"""Rows of one epoch of the original (its flattening of OASST1's train split)."""
VARIANTS: dict[str, dict] = {
    "the original's settings": ORIGINAL,
    "ours": {},
    "ours, without packing": {"packing": False},
    "ours, without variable-length attention": {"attention": "sdpa"},
    "ours, with bf16 autocast": {"autocast": True},
    "ours, with bf16 adapters": {"adapter_dtype": torch.bfloat16},
    "ours, with gelu_new": {"gelu": True},
    "ours, with recomputation": {"gradient_checkpointing": "on"},
    "ours, with a quarter of the micro-batch": {"share": 0.25},
    "ours, with layers compiled": {"compile_layers": True},
    "ours, on all linear layers": {"lora_target_modules": "all-linear"},
}


def main() -> None:
    parser = measuring.options(__doc__, "true", "tiny")
    parser.add_argument("--seconds", type=float, default=15, help="measured per variant")
    parser.add_argument("--micro", type=int, default=0, help="tokens per micro-batch; 0 = 16,384, or 1,024 if tiny")
    parser.add_argument("--only", default="", help="part of a variant's name")
    given = parser.parse_args()
    figures = check_attention("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        base = shapes.base(Path(folder), given.size)
        found, failed = {}, []
        for name, changes in VARIANTS.items():
            if given.only not in name:
                continue
            try:
                found[name] = measure(name, changes, base, Path(folder), given)
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {error}")
                print(f"NOT MEASURED, {failed[-1]}", flush=True)
                continue
            figures += training_runs.figures(name, found[name])
            path = measuring.record(PART, given.size, figures + ratios(found), given.results)
            print(f"written to {path}", flush=True)
    if failed:
        raise SystemExit("not measured: " + "; ".join(failed))


def measure(name: str, changes: dict, base: Path, folder: Path, given) -> dict:
    """One variant: speed and memory, from a model loaded afresh."""
    rows = training_runs.rows_like_oasst(ROWS[given.size], shapes.SMALLER[given.size].get("vocab_size", 50_000), 512)
    micro = int((given.micro or MICRO[given.size]) * changes.get("share", 1))
    run = Run(base, folder, training_runs.step_of(max(micro, training_runs.LONGEST)) | changes, rows)
    found = run.train(rows, given.seconds, WARM_UP[given.size])
    run.close()
    minutes = ORIGINAL_ROWS * sum(rows.lengths) / len(rows.examples) / found["tokens_per_second"] / 60
    print(f"{name}: {training_runs.as_text(found)}, the original's epoch in {minutes:.1f} min", flush=True)
    return found


def ratios(found: dict[str, dict]) -> list[dict]:
    """How many times as many tokens per second ours has as the original's settings, where both were measured."""
    if not {"ours", "the original's settings"} <= set(found):
        return []
    speeds = [(side, [found[side]["tokens_per_second"]]) for side in ("ours", "the original's settings")]
    return measuring.compare("tokens per second", "tokens/s", *speeds)[-1:]


def check_attention(device: str) -> list[dict]:
    """Variable-length attention against sdpa on each document, output and gradients, in bf16; raises if far."""
    if not hardware.has_varlen_kernel(device):
        return []
    torch.manual_seed(0)
    lengths = [5, 131, 700, 64, 1]
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    shape = (sum(lengths), 32, 80)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
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
    return [measuring.figure("largest relative error, variable-length attention", "1", [max(errors)])]


def relative(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


if __name__ == "__main__":
    main()
