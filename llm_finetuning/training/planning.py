"""What a run will cost on this machine, before it starts: micro-batch, steps, memory, time and disk.

Everything comes from arithmetic on the model's configuration and the peak matmul throughput, which is measured, never
from a list of GPUs, and stands beside what was measured when the run is over.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from transformers import PretrainedConfig

from llm_finetuning import hardware, models
from llm_finetuning.hardware import Machine, as_gib, readable_seconds
from llm_finetuning.settings import AUTO, EXPERTS, Finetuning
from llm_finetuning.training import attention, base_weights, checkpoints, dora, model_size, preconditions, storage
from llm_finetuning.training.dataset import RunInputs
from llm_finetuning.training.identity import known_when_planned
from llm_finetuning.training.memory import StepMemory, shares_a_mask
from llm_finetuning.training.model_size import ModelSize

EFFICIENCY = 0.55
"""Share of the peak matmul throughput that a whole training step is expected to reach."""
RATE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""What the search for the learning rate multiplies the given one by."""
SEARCH_STEPS = 20, 60
"""Fewest and most optimizer steps of each of its trainings; in between a fifth of the run's."""


@dataclass(frozen=True)
class Plan:
    """The decisions for one run, and what they will cost."""

    settings: Finetuning
    machine: Machine
    size: ModelSize
    dtype: torch.dtype
    """Of the computation."""
    attention: str
    gradient_checkpointing: bool
    micro_batch_tokens: int
    accumulation: int
    """Micro-batches per optimizer step and process."""
    processes: int
    """Processes that train together, each on a device of its own; WORLD_SIZE as torchrun sets it."""
    shards: int
    """Ranks that the model is sharded across: all of them under FSDP, as accelerate launch sets it, else 1."""
    optimizer: str
    examples: int
    tokens: int
    """Of all examples together: of an epoch."""
    steps: int
    """Optimizer steps of the whole run."""
    memory: dict[str, float]
    """Bytes at the peak of a step, by what takes them."""
    model_path: Path | None = None
    """The local folder of the base; None in a prediction from a configuration alone."""
    four_bit: bool = True
    """Whether the base's linear layers are loaded in 4 bits."""

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
        """In bytes."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Of training, predicted."""
        return self._seconds_of(self.steps)

    @property
    def search_steps(self) -> int:
        """Optimizer steps of each training of the search for the learning rate."""
        fewest, most = SEARCH_STEPS
        return min(self.steps, max(fewest, min(most, self.steps // 5)))

    @property
    def search_seconds(self) -> float:
        """Of the search for the learning rate, predicted; 0 without one."""
        return self.settings.find_learning_rate * self._seconds_of(len(RATE_FACTORS) * self.search_steps)

    def _seconds_of(self, steps: int) -> float:
        flops = flops_per_token(self.size, self.attended_length, self.gradient_checkpointing)
        tokens = steps * min(self.step_tokens, self.tokens) / self.processes
        seconds = tokens * flops / (self.machine.flops * EFFICIENCY)
        if self.settings.use_dora:
            given = self.settings.lora_r, self.dtype.itemsize, self.four_bit, 1 + self.gradient_checkpointing
            batches = tokens / self.micro_batch_tokens
            seconds += dora.work(self.size, *given).seconds(self.machine, EFFICIENCY, batches, tokens)
        return seconds

    @property
    def attended_length(self) -> float:
        """The `length` of `flops_per_token` that attention is computed over: an example's, or a whole shared mask's.

        Under a mask nothing is skipped: twice the micro-batch, for `flops_per_token` counts half the square.
        """
        if shares_a_mask(self.settings.packing, self.attention):
            return 2 * self.micro_batch_tokens
        return self.tokens / max(1, self.examples)

    @property
    def checkpoint_bytes(self) -> int:
        """A checkpoint: the adapter and its two moments in 32 bits."""
        return self.size.adapter * (4 + 8)

    @property
    def disk_work(self) -> int:
        """Bytes on the local disk at its fullest, which is while both merged models lie there."""
        return sum(need.merging for need in storage.work_needs(self))

    @property
    def disk_drive(self) -> int:
        """Bytes that a first run writes where the results go; a later one has the model before beside its own."""
        return sum(need.publishing for need in storage.result_needs(self))

    @property
    def cost(self) -> float | None:
        """Of the planned time of training, as `cost_of` counts it."""
        return self.cost_of(self.seconds)

    def cost_of(self, seconds: float) -> float | None:
        """In the currency of rate_per_hour; None where that is not known."""
        return seconds / 3600 * self.settings.rate_per_hour if self.settings.rate_per_hour else None

    def mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation of a speed of all processes: 4N + attention a token over the peak throughput."""
        flops = flops_per_token(self.size, self.tokens / max(1, self.examples))
        return tokens_per_second * flops / (self.machine.flops * self.processes)

    def table(self) -> pd.DataFrame:
        """What was decided and what it will cost, one line each of at most 50 characters."""
        m = self.machine
        per_example = self.tokens / max(1, self.examples)
        lines = [
            ("machine", m.name),
            ("memory, peak matmul throughput", f"{as_gib(m.memory)}, {m.flops / 1e12:.2g} TFLOP/s"),
            ("computes in", f"{str(self.dtype).removeprefix('torch.')}; adapters trained in float32"),
            ("base", "in 4 bits" if self.four_bit else f"in {str(self.dtype).removeprefix('torch.')}"),
            ("attention", self.attention),
            ("optimizer", self.optimizer),
            ("gradient checkpointing", "on" if self.gradient_checkpointing else "off"),
            ("an epoch", f"{self.examples:,} examples × {per_example:,.0f} tokens on average = {self.tokens:,}"),
            (
                "optimizer step",
                f"{self.accumulation * self.processes} × {self.micro_batch_tokens:,} tokens ="
                f" {self.step_tokens:,} tokens" + (f", {self.processes} processes" * (self.processes > 1)),
            ),
            *[("the model is sharded across", f"{self.shards} ranks")] * (self.shards > 1),
            *[(f"experts: not in 4 bits, {self._adapted}", f"{self.size.experts / self.size.total:.0%} of the weights")]
            * (self.size.experts > 0),
            ("steps", f"{self.steps:,}"),
            *[(f"memory: {part}", as_gib(count)) for part, count in self.memory.items()],
            ("memory: peak, predicted", f"{as_gib(self.peak_memory)} of {as_gib(m.free_memory)} free"),
            ("time, predicted", f"{readable_seconds(self.seconds)}"),
            *[("search for the rate", self._search())] * self.settings.find_learning_rate,
            ("disk here", f"{as_gib(self.disk_work)} needed"),
            ("disk for results", f"{as_gib(self.disk_drive)} needed"),
        ]
        if self.cost is not None:
            lines.append(("cost, predicted", f"{self.cost:.2f}"))
        return pd.DataFrame(lines, columns=["what", "plan"])

    @property
    def _adapted(self) -> str:
        return "adapted" if self.settings.adapts_experts else "no adapters"

    def _search(self) -> str:
        """The search for the learning rate in the table: its trainings, their time and cost."""
        cost = self.cost_of(self.search_seconds)
        trainings = f"{len(RATE_FACTORS)} × {self.search_steps} steps, {readable_seconds(self.search_seconds)}"
        return trainings if cost is None else f"{trainings}, cost {cost:.2f}"


def plan_run(settings: Finetuning, inputs: RunInputs) -> Plan:
    """Plans a run on this machine, fetches or makes its base, and checks what the stages after this one need.

    A run that is to be continued keeps its micro-batch, its optimizer and its base's bits, whatever is free today. The
    base is fetched when all that can be known without it is known. Raises what `preconditions`, `models.locate` and
    `plan` raise, and OSError when a disk has too little room.
    """
    preconditions.check_names(settings)
    folders = settings.folders
    before = checkpoints.newest_run(folders.checkpoints, folders.mirrored) if settings.resume else None
    kept = {}
    if before:
        kept["micro_batch_tokens"] = settings.micro_batch_tokens or before["micro_batch_tokens"]
        kept["optim"] = before["optimizer"] if settings.optim == AUTO else settings.optim
        kept["use_4bit"] = before["use_4bit"] if settings.use_4bit == AUTO else settings.use_4bit
    made_here = settings.model_name in (models.SAMPLE, models.REHEARSAL)
    path = _base(settings) if made_here else None
    config = models.configuration(str(path or settings.model_name), settings.model_revision)
    preconditions.check_examples(settings, config, inputs)
    machine = hardware.with_least_memory(hardware.detect(settings.dtype))
    if settings.use_dora:
        machine = hardware.with_memory_rates(machine)
    made = inputs.planned(plan(replace(settings, **kept), machine, config, inputs.data.lengths))
    preconditions.check_machine(settings, made)
    storage.check(replace(made, model_path=path))
    path = path or _base(settings)
    base_weights.check_weights(made.settings, config, path)
    made = replace(made, settings=settings, model_path=path)
    if before:
        checkpoints.compare(folders.checkpoints, before, known_when_planned(settings, made, inputs))
    return made


def _base(settings: Finetuning) -> Path:
    folder = settings.folders.base
    return models.locate(settings.model_name, folder, settings.tokenizer_folder, settings.model_revision)


def plan(settings: Finetuning, machine: Machine, model_config: PretrainedConfig, lengths: list[int]) -> Plan:
    """Decides how to train examples of `lengths` tokens on `machine`, and predicts what it costs.

    Raises ValueError when the model cannot be trained in the memory there is, with the parameter to change.
    """
    dtype = hardware.choose_dtype(settings.dtype, machine.capability)
    implementation = attention.choose_attention(settings, machine, dtype, model_config)
    size = model_size.measure_size(settings, model_config, dtype, machine.on_gpu, implementation)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    shards = processes if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else 1
    if settings.use_dora and shards > 1:
        raise ValueError("use_dora = True: DoRA reads whole weights, and this model is sharded; set use_dora = False")
    if settings.adapts_experts and shards > 1:
        raise ValueError(
            f"lora_target_modules = {settings.lora_target_modules!r}: adapters of experts read whole weights, and this"
            f" model is sharded; leave {EXPERTS!r} out"
        )
    memory = StepMemory(settings, machine, size, dtype, implementation, shards, processes).with_base()
    checkpointing, micro = memory.choose_micro_batch()
    accumulation = max(1, round(settings.tokens_per_step / micro / processes))
    return Plan(
        settings=memory.settings,
        machine=machine,
        size=size,
        dtype=dtype,
        attention=implementation,
        gradient_checkpointing=checkpointing,
        micro_batch_tokens=micro,
        accumulation=accumulation,
        processes=processes,
        shards=shards,
        optimizer=choose_optimizer(settings, machine, processes, shards),
        examples=len(lengths),
        tokens=sum(lengths),
        steps=count_steps(-(-sum(lengths) // micro), settings, accumulation * processes),
        memory=memory.parts(checkpointing, micro),
        four_bit=memory.four_bit,
    )


def count_steps(batches: int, settings: Finetuning, together: int) -> int:
    """Optimizer steps of the whole run; batches: micro-batches of an epoch, so many of which `together` make a step."""
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(-(-batches // together) * settings.num_train_epochs)


def choose_optimizer(settings: Finetuning, machine: Machine, processes: int, shards: int) -> str:
    """AdamW with 32-bit moments: paged on one GPU (arXiv 2305.14314, section 3), else torch's own.

    Raises ValueError for a paged one on several GPUs, where a resumed one kills the process (bitsandbytes#782), and
    for any of bitsandbytes' where the model is sharded: its operators do not take shards.
    """
    if settings.optim == AUTO:
        return "paged_adamw_32bit" if machine.on_gpu and processes == 1 else "adamw_torch"
    if processes > 1 and settings.optim.startswith("paged"):
        raise ValueError(f"optim = {settings.optim!r} cannot be resumed on several GPUs; set optim = 'auto'")
    by_bitsandbytes = any(part in settings.optim for part in ("bit", "bnb", "ademamix"))
    if shards > 1 and by_bitsandbytes and "torch" not in settings.optim:
        raise ValueError(f"optim = {settings.optim!r}: bitsandbytes cannot update a sharded model; set optim = 'auto'")
    return settings.optim


def flops_per_token(size: ModelSize, length: float, checkpointing: bool = False) -> float:
    """Operations per token: 4 per frozen weight, 6 per adapter weight, and attention.

    A frozen weight is multiplied in the forward pass and once in the backward pass (2 + 2); checkpointing repeats
    the forward pass. Attention: 2·2·hidden per key in the forward pass and twice that in the backward pass, over
    half the square (causal). Formula as in arXiv 2204.02311, appendix B, less the weights' own gradients.
    """
    weights = size.multiplied
    attention = 6 * size.layers * size.hidden * length
    again = 2 * weights + 2 * size.layers * size.hidden * length if checkpointing else 0
    return 4 * weights + 6 * size.adapter + attention + again
