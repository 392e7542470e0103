"""What a run will cost on this machine, before it starts: micro-batch, steps, memory, time and disk.

Everything comes from arithmetic on the model's configuration and one measured matrix rate, never from a list of
GPUs, and stands beside what was measured when the run is over.
"""

import math
import os
from dataclasses import dataclass, replace

import pandas as pd
import torch

from llm_finetuning import hardware
from llm_finetuning.hardware import Machine, as_gib, readable_seconds
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import attention, model_size
from llm_finetuning.training.memory import StepMemory, shares_a_mask
from llm_finetuning.training.model_size import ModelSize

EFFICIENCY = 0.55
"""Share of the measured matrix rate that a whole training step is expected to reach."""


@dataclass(frozen=True)
class Plan:
    """The decisions for one run. Bytes, seconds and tokens; `dtype` of computation, `adapter_dtype` of training."""

    machine: Machine
    size: ModelSize
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    attention: str
    gradient_checkpointing: bool
    micro_batch_tokens: int
    accumulation: int
    """Micro-batches per optimizer step and process."""
    processes: int
    """Processes that train together, each on a device of its own; WORLD_SIZE as torchrun sets it."""
    shards: int
    """Processes that share one copy of the model: all of them under FSDP, as accelerate launch sets it, else 1."""
    optimizer: str
    rows: int
    tokens: int
    steps: int
    memory: dict[str, float]
    seconds: float
    disk_work: int
    disk_drive: int
    cost: float | None

    @property
    def device(self) -> str:
        return self.machine.device

    @property
    def save_dtype(self) -> torch.dtype:
        """16 bits, of the kind that the run computes in; bfloat16 after a run in float32."""
        return torch.float16 if self.dtype == torch.float16 else torch.bfloat16

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step over all processes."""
        return self.accumulation * self.processes * self.micro_batch_tokens

    @property
    def peak_memory(self) -> float:
        return sum(self.memory.values())

    def table(self) -> pd.DataFrame:
        """What was decided and what it will cost, one line each of at most 50 characters."""
        m = self.machine
        per_row = self.tokens / max(1, self.rows)
        lines = [
            ("machine", m.name),
            ("memory, measured matrix rate", f"{as_gib(m.memory)}, {m.flops / 1e12:.2g} TFLOP/s"),
            ("computes in", f"{_name(self.dtype)}; adapters trained in {_name(self.adapter_dtype)}"),
            ("attention", self.attention),
            ("optimizer", self.optimizer),
            ("gradient checkpointing", "on" if self.gradient_checkpointing else "off"),
            ("an epoch", f"{self.rows:,} pairs × {per_row:,.0f} tokens on average = {self.tokens:,}"),
            (
                "optimizer step",
                f"{self.accumulation * self.processes} × {self.micro_batch_tokens:,} tokens ="
                f" {self.step_tokens:,} tokens" + (f", {self.processes} processes" * (self.processes > 1)),
            ),
            *[("the model is shared by", f"{self.shards} processes")] * (self.shards > 1),
            ("steps", f"{self.steps:,}"),
            *[(f"memory: {part}", as_gib(count)) for part, count in self.memory.items()],
            ("memory: peak, predicted", f"{as_gib(self.peak_memory)} of {as_gib(m.free_memory)} free"),
            ("time, predicted", f"{readable_seconds(self.seconds)}"),
            ("disk here", f"{as_gib(self.disk_work)} needed"),
            ("disk for results", f"{as_gib(self.disk_drive)} needed"),
        ]
        if self.cost is not None:
            lines.append(("cost, predicted", f"{self.cost:.2f}"))
        return pd.DataFrame(lines, columns=["what", "plan"])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan(settings: Finetuning, machine: Machine, model_config, lengths: list[int]) -> Plan:
    """Decides how to train rows of `lengths` tokens on `machine`, and predicts what it costs.

    Raises ValueError when the model cannot be trained in the memory there is, with the parameter to change.
    """
    dtype = hardware.choose_dtype(settings.dtype, machine.capability)
    adapter_dtype = torch.bfloat16 if machine.on_gpu and dtype == torch.bfloat16 else torch.float32
    chosen = attention.choose_attention(settings.attention, machine, dtype, settings.packing)
    size = model_size.measure_size(settings, model_config, dtype, adapter_dtype, machine.on_gpu)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    shards = processes if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else 1
    memory = StepMemory(settings, machine, size, dtype, adapter_dtype, chosen, shards)
    checkpointing, micro = memory.fit()
    accumulation = max(1, round(settings.tokens_per_step / micro / processes))
    tokens = sum(lengths)
    batches = math.ceil(tokens / micro)
    epoch_steps = math.ceil(batches / (accumulation * processes))
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(epoch_steps * settings.num_train_epochs)
    draft = Plan(
        machine=machine,
        size=size,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        attention=chosen,
        gradient_checkpointing=checkpointing,
        micro_batch_tokens=micro,
        accumulation=accumulation,
        processes=processes,
        shards=shards,
        optimizer=choose_optimizer(settings, machine, shards),
        rows=len(lengths),
        tokens=tokens,
        steps=steps,
        memory=memory.parts(checkpointing, micro),
        seconds=0.0,
        disk_work=0,
        disk_drive=0,
        cost=None,
    )
    return with_costs(draft, settings)


def with_costs(draft: Plan, settings: Finetuning) -> Plan:
    """The plan with time, disk and cost for its number of steps."""
    trained = draft.steps * min(draft.step_tokens, draft.tokens)
    flops = trained * flops_per_token(draft.size, attended_length(draft, settings), draft.gradient_checkpointing)
    seconds = flops / (draft.machine.flops * EFFICIENCY * draft.processes)
    checkpoint = draft.size.adapter * (draft.adapter_dtype.itemsize + 8)
    merged = draft.size.total * 2
    return replace(
        draft,
        seconds=seconds,
        disk_work=int(checkpoint * (settings.save_total_limit + 1) + 2 * merged),
        disk_drive=int(checkpoint * settings.save_total_limit + merged),
        cost=seconds / 3600 * settings.rate_per_hour if settings.rate_per_hour else None,
    )


def choose_optimizer(settings: Finetuning, machine: Machine, shards: int) -> str:
    """AdamW with 32-bit moments: paged on a GPU (arXiv 2305.14314, section 3), else and for shards torch's own.

    Raises ValueError for one of bitsandbytes' where the model is sharded: its operators do not take shards.
    """
    if settings.optim == "auto":
        return "paged_adamw_32bit" if machine.on_gpu and shards == 1 else "adamw_torch"
    by_bitsandbytes = any(part in settings.optim for part in ("bit", "bnb", "ademamix"))
    if shards > 1 and by_bitsandbytes and "torch" not in settings.optim:
        raise ValueError(f"optim = {settings.optim!r}: bitsandbytes cannot update a sharded model; set optim = 'auto'")
    return settings.optim


def attended_length(draft: Plan, settings: Finetuning) -> float:
    """The `length` of `flops_per_token` that attention is computed over: a row's, or the whole of a shared mask.

    Under a mask nothing is skipped: twice the micro-batch, for `flops_per_token` counts half the square.
    """
    if shares_a_mask(settings.packing, draft.attention):
        return 2 * draft.micro_batch_tokens
    return draft.tokens / max(1, draft.rows)


def flops_per_token(size: ModelSize, length: float, checkpointing: bool = False) -> float:
    """Operations per trained token: 4 per frozen weight, 6 per adapter weight, and attention.

    A frozen weight is multiplied in the forward pass and once in the backward pass (2 + 2); checkpointing repeats
    the forward pass. Attention: 2·2·hidden per key in the forward pass and twice that in the backward pass, over
    half the square (causal). Formula as in arXiv 2204.02311, appendix B, less the weights' own gradients.
    """
    weights = size.linear + size.head
    attention = 6 * size.layers * size.hidden * length
    again = 2 * weights + 2 * size.layers * size.hidden * length if checkpointing else 0
    return 4 * weights + 6 * size.adapter + attention + again
