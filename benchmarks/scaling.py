"""docs/scaling.md: what no machine here can show, predicted by the finetuning notebook's plan, and those predictions
beside every point that was measured."""

import inspect
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import measuring
import shapes
import training_runs
from transformers import AutoConfig, LlamaConfig

from llm_finetuning import settings
from llm_finetuning.hardware import GIB, Machine
from llm_finetuning.training import planning
from llm_finetuning.training.memory import StepMemory


@dataclass(frozen=True)
class Sheet:
    """A GPU by its data sheet: dense matmul throughput in TFLOP/s (bf16; fp16 on the T4), memory in GB, GB/s."""

    name: str
    capability: tuple[int, int]
    tflops: float
    memory: float
    bandwidth: float
    rate: float
    """Dollars an hour: an assumption, to be replaced by what yours costs."""


SHEETS = [
    Sheet("T4", (7, 5), 65, 16, 320, 0.4),
    Sheet("L4", (8, 9), 121, 24, 300, 0.8),
    Sheet("A100 40 GB", (8, 0), 312, 40, 1555, 1.5),
    Sheet("A100 80 GB", (8, 0), 312, 80, 2039, 2.0),
    Sheet("H100", (9, 0), 989, 80, 3350, 3.0),
    Sheet("H200", (9, 0), 989, 141, 4800, 4.0),
]
ROWS = 20_587
"""Conversations of an epoch: as many as OASST1's train split has pairs by the original's flattening. Their lengths are
those of its threads, from the first message to the last response."""
GPUS = (1, 2, 4, 8)
PHI2 = "Phi-2"
LLAMA = {"7B": (4096, 11008, 32), "13B": (5120, 13824, 40)}
"""Larger base → hidden size, size of the MLP, layers (and heads) of Llama-2."""
BASES = (PHI2, *LLAMA)
HEAD = """# What no machine here can show

Written by `make tables`. **Every number below is a prediction** by the formulas in
[`planning.py`](../llm_finetuning/training/planning.py), the ones that the finetuning notebook prints before it starts.
Where something was measured, the last section holds the formulas against it.

## The formulas

- FLOPs of a token: `planning.flops_per_token`. {flops}
- Time = tokens × FLOPs of a token ÷ (matmul throughput × {efficiency} × GPUs). Here the rate is the data sheet's;
  on a real machine the plan measures it, and a GPU reaches less than its data sheet. GPUs share the rows, each holds
  the whole base, and what they tell one another is not counted.
- Memory = `memory.StepMemory.parts`: process + base weights + adapters + gradients and moments + activations + working
  space; the micro-batch is the largest that leaves a tenth free, with recomputation only where nothing else fits. In
  bf16 and fp32 all but the process is within 3% of what the operators of a true-size training step keep alive, counted
  without a GPU on fake tensors (`tests/support/dry_run.py`); fp16 autocast, as on a T4, is not among what is counted
  there.
- Dollars = hours × GPUs × the rate per hour of the first table, **which is an assumption, not a price list**.
- Answering one question at a time: at most bandwidth ÷ bytes of the weights tokens per second, as every token reads
  every weight once.

An epoch is {rows:,} conversations, each with every response in the loss: as many as the first version made pairs of
OASST1's train split, with the lengths of OASST1's threads cut at {longest:,} tokens: {tokens:,} tokens. Settings are
the finetuning notebook's: {step:,} tokens a step, {epochs:g} epochs, r = {rank} on {targets} layers
({kind}), NF4 with double quantisation.
Time and dollars are those of one epoch where nothing else is said.
"""


def document(reports: list[dict]) -> str:
    """The whole page, from the formulas and the results files."""
    chosen, lengths = notebook_settings(), oasst_lengths(notebook_settings().max_seq_length)
    head = HEAD.format(
        flops=" ".join(inspect.getdoc(planning.flops_per_token).split()),
        efficiency=planning.EFFICIENCY,
        rows=ROWS,
        longest=chosen.max_seq_length,
        tokens=sum(lengths),
        step=chosen.tokens_per_step,
        epochs=chosen.num_train_epochs,
        rank=chosen.lora_r,
        targets=chosen.lora_target_modules,
        kind="DoRA" if chosen.use_dora else "LoRA as one operation with its base, without DoRA",
    )
    parts = [head, the_gpus(), one_gpu(), limits(), several_gpus(), larger_bases(), byte_counts(), answering()]
    parts.append(checked(reports))
    return "\n".join(parts)


def notebook_settings(**changes) -> settings.Finetuning:
    return settings.from_cell(settings.Finetuning, measuring.defaults() | changes)


@cache
def oasst_lengths(longest: int) -> tuple[int, ...]:
    """Tokens of ROWS rows, evenly over OASST1's percentiles."""
    return tuple(training_runs.oasst_length(100 * (row + 0.5) / ROWS, longest) for row in range(ROWS))


@cache
def config_of(base: str):
    """The configuration of a base of BASES."""
    if base == PHI2:
        return shapes.config("true")
    hidden, mlp, layers = LLAMA[base]
    return LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=layers)


def machine_of(sheet: Sheet) -> Machine:
    count = int(sheet.memory * 1e9)
    varlen = sheet.capability >= (8, 0)
    return Machine("cuda:0", sheet.name, sheet.capability, count, count, count, 8, sheet.tflops * 1e12, varlen)


@contextmanager
def processes(count: int):
    """As if torchrun had started `count` processes: `planning.plan` reads WORLD_SIZE."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(count)
    try:
        yield
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


@cache
def planned(base: str, sheet: Sheet, gpus: int = 1) -> planning.Plan | None:
    """The plan of an epoch, or None where the base does not fit into one of the GPUs."""
    chosen = notebook_settings(rate_per_hour=sheet.rate * gpus, num_train_epochs=1.0)
    try:
        with processes(gpus):
            return planning.plan(chosen, machine_of(sheet), config_of(base), list(oasst_lengths(chosen.max_seq_length)))
    except ValueError:
        return None


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column left, the others right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def section(title: str, text: str, heads: list[str], rows: list[list[str]]) -> str:
    return f"## {title}\n\n{text}\n\n{table(heads, rows)}"


def the_gpus() -> str:
    rows = [[s.name, f"{s.tflops:g}", f"{s.memory:g} GB", f"{s.bandwidth:,.0f} GB/s", f"{s.rate:.2f}"] for s in SHEETS]
    text = "Data sheets: dense matmul throughput (bf16; fp16 on the T4), memory, bandwidth. The last column is assumed."
    return section("The GPUs", text, ["GPU", "TFLOP/s", "memory", "bandwidth", "assumed dollars an hour"], rows)


def one_gpu() -> str:
    rows = []
    for sheet in SHEETS:
        plan = planned(PHI2, sheet)
        rows.append(
            [
                sheet.name,
                str(plan.dtype).removeprefix("torch."),
                plan.attention,
                "yes" if plan.gradient_checkpointing else "no",
                f"{plan.micro_batch_tokens:,}",
                gib(plan.peak_memory),
                f"{flops(plan) / plan.tokens / 1e9:.1f} G",
                f"{flops(plan) / 1e15:.0f} P",
                planning.readable_seconds(plan.seconds),
                f"{plan.cost:.2f}",
            ]
        )
    heads = ["GPU", "computes in", "attention", "recomputation", "tokens per micro-batch"]
    heads += ["memory", "FLOPs a token", "FLOPs an epoch", "time an epoch", "dollars"]
    return section("An epoch of Phi-2 on one GPU", "Predicted: the plan that the notebook would print.", heads, rows)


def flops(plan: planning.Plan) -> float:
    """Operations of an epoch: recomputation, and under a mask all of its square, included."""
    attended = plan.attended_length
    per_token = planning.flops_per_token(plan.size, attended, plan.gradient_checkpointing)
    return plan.tokens * per_token


def limits() -> str:
    """The planned time of an epoch, which is the goal, beside what no program can go below on that GPU."""
    chosen, rows = notebook_settings(), []
    for sheet in SHEETS:
        plan = planned(PHI2, sheet)
        computing, reading = flops(plan) / (sheet.tflops * 1e12), weight_traffic(plan) / (sheet.bandwidth * 1e9)
        times = [plan.seconds, chosen.num_train_epochs * plan.seconds, computing, reading]
        ratio = plan.seconds / max(computing, reading)
        rows.append([sheet.name, *map(planning.readable_seconds, times), f"{ratio:.2f}"])
    heads = ["GPU", "goal: an epoch", f"goal: {chosen.num_train_epochs:g} epochs", "an epoch's FLOPs at the peak"]
    heads += ["an epoch's bytes of weights", "goal ÷ limit"]
    text = (
        f"The goal is what the plan predicts, {planning.EFFICIENCY:.0%} of the peak. The physical limit of an epoch is"
        " the longer of two times: its FLOPs at the data sheet's peak, and the bytes of its weights at the data sheet's"
        " bandwidth. In each pass of each micro-batch the 4-bit weights are read, and written and read again in 16"
        " bits. Where the second time is far below the first, the micro-batches are large enough. Nothing here has run"
        " on a GPU yet."
    )
    return section("The goal beside the physical limit", text, heads, rows)


def weight_traffic(plan: planning.Plan) -> float:
    """Bytes of weights that an epoch moves: a forward and a backward pass of each micro-batch, or two and one."""
    passes = (3 if plan.gradient_checkpointing else 2) * plan.tokens / plan.micro_batch_tokens
    return passes * (plan.memory["base weights"] + 2 * 2 * plan.size.linear)


def several_gpus() -> str:
    rows = []
    for sheet in SHEETS:
        plans = [planned(PHI2, sheet, gpus) for gpus in GPUS]
        rows.append([sheet.name, *(f"{planning.readable_seconds(p.seconds)}, {p.cost:.2f}" for p in plans)])
    text = (
        "Predicted time and dollars of an epoch with `torchrun`. The optimizer step stays near the notebook's"
        f" {notebook_settings().tokens_per_step:,} tokens as long as each GPU can take a smaller share of it; time"
        " divides by the number of GPUs, so this is the best case."
    )
    return section("Phi-2 on several GPUs", text, ["GPU", *(f"{gpus} of them" for gpus in GPUS)], rows)


def larger_bases() -> str:
    rows = []
    for sheet in SHEETS:
        plans = [planned(base, sheet) for base in BASES]
        rows.append([sheet.name, *("does not fit" if p is None else in_short(p) for p in plans)])
    text = "Predicted memory, time and dollars of an epoch on one GPU; 7B and 13B with Llama-2's shapes."
    return section("Larger bases", text, ["GPU", *BASES], rows)


def in_short(plan: planning.Plan) -> str:
    return f"{gib(plan.peak_memory)}, {planning.readable_seconds(plan.seconds)}, {plan.cost:.2f}"


def byte_counts() -> str:
    rows = []
    for base in BASES:
        plan = planned(base, SHEETS[-1])
        size, parts = plan.size, plan.memory
        trained = parts["adapters"] + parts["gradients and moments"]
        rows.append([base, f"{size.total:,}", f"{size.adapter:,}", gib(parts["base weights"]), gib(trained)])
        rows[-1] += [f"{size.activation_bytes / 1e6:.1f} MB", gib(plan.disk_work), gib(plan.disk_drive)]
    heads = ["base", "parameters", "of the adapters", "base in 4 bits", "adapters with gradients and moments"]
    heads += ["activations a token", "disk while it runs", "disk for the results"]
    text = (
        "Predicted from the configurations alone (`model_size.measure_size`, `memory.StepMemory`, `planning.Plan`),"
        " in bf16."
    )
    return section("Bytes", text, heads, rows)


def answering() -> str:
    rows = []
    for sheet in SHEETS:
        limits = [f"{sheet.bandwidth * 1e9 / weights(base, four):,.0f}" for base in BASES for four in (False, True)]
        rows.append([sheet.name, *limits])
    heads = ["GPU", *(f"{base}, {kind}" for base in BASES for kind in ("16 bits", "NF4"))]
    text = (
        "Predicted upper bound of tokens per second for one question at a time: bandwidth ÷ bytes of the weights"
        " (`base weights` of `StepMemory.parts`). Reading the prompt and the cache is not counted, nor whether it fits."
    )
    return section("Answering", text, heads, rows)


def weights(base: str, four_bit: bool) -> float:
    """Bytes of a base in memory, in 4 or in 16 bits."""
    plan = planned(base, SHEETS[-1])
    chosen = notebook_settings(use_4bit=four_bit)
    step = StepMemory(chosen, plan.machine, plan.size, plan.dtype, plan.attention)
    return step.parts(False, plan.micro_batch_tokens)["base weights"]


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def checked(reports: list[dict]) -> str:
    """Every measured point that the formulas can predict, beside its prediction."""
    rows = [
        [report["machine"]["name"], entry["name"], *beside(entry)]
        for report in reports
        for entry in report["figures"]
        if "inputs" in entry
    ]
    if not rows:
        return ""
    text = (
        "Predicted by today's formulas from the peak matmul throughput that was measured at the start of the run. A"
        " plan is made for a model that keeps the machine busy: a small one also pays for everything that is no matrix"
        " product."
    )
    return section(
        "Predicted and measured", text, ["machine", "what", "predicted", "measured", "measured ÷ predicted"], rows
    )


def beside(entry: dict) -> list[str]:
    """Prediction, measurement and their ratio, in the figure's unit."""
    plan, measured = again(entry["inputs"]), entry["median"]
    trained = plan.steps * min(plan.step_tokens, plan.tokens)
    found = {
        "tokens/s": trained / plan.seconds,
        "s": plan.seconds / plan.steps,
        "GiB": plan.peak_memory / GIB,
    }[entry["unit"]]
    return [f"{found:,.3g} {entry['unit']}", f"{measured:,.3g} {entry['unit']}", f"{measured / found:.2f}"]


def again(inputs: dict) -> planning.Plan:
    """The plan of a measured run, made anew from what was noted."""
    machine = inputs["machine"]
    capability = None if machine["capability"] is None else tuple(machine["capability"])
    config = AutoConfig.for_model(**inputs["config"])
    mean, rows = inputs["tokens"] / inputs["rows"], inputs["rows"]
    lengths = [math.floor(mean * (row + 1)) - math.floor(mean * row) for row in range(rows)]
    chosen = notebook_settings(**inputs["settings"])
    return planning.plan(chosen, Machine(**machine | {"capability": capability}), config, lengths)
