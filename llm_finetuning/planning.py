"""What a run will cost on this machine, before it starts: micro-batch, steps, memory, time and disk.

Everything comes from arithmetic on the model's configuration and one measured matrix rate, never from a list of
GPUs, and stands beside what was measured when the run is over.
"""

import math
import os
from dataclasses import dataclass, replace

import pandas as pd
import torch

from llm_finetuning import attention, hardware
from llm_finetuning.hardware import Machine, as_gib, readable_seconds
from llm_finetuning.settings import Finetuning

EFFICIENCY = 0.55
"""Share of the measured matrix rate that a whole training step is expected to reach."""
HEADROOM = 0.9
"""Share of the free memory that the plan uses: the rest is fragmentation and what other processes take."""
MASKED_TOKENS = 2048
"""Largest micro-batch where packed rows share one attention mask: there attention costs its whole square."""
VARLEN_TOKENS = 16_384
"""Largest micro-batch otherwise: from there on nothing more is gained by amortising 4-bit dequantisation."""
OVERHEAD = {"cuda": 0.3 * hardware.GIB, "cpu": 0.9 * hardware.GIB}
"""Memory of a process without a model. On a GPU an estimate of the kernels and libraries that are loaded while it
trains: CUDA's context is there before the free memory is read. On a CPU Python with torch."""
HEAD_TILE = (4096, 32_768)
"""Tokens and vocabulary of the tile of logits that TRL's fused head computes at a time (trl.kernels)."""


@dataclass(frozen=True)
class ModelSize:
    """Counts that memory and time follow from; taken from the configuration alone, on the meta device."""

    linear: int
    """Weights of the linear layers inside the decoder: stored in 4 bits, multiplied for every token."""
    other: int
    """Embeddings, head, norms, biases."""
    head: int
    """Weights of the output layer."""
    adapter: int
    layers: int
    hidden: int
    vocabulary: int
    largest_linear: int
    activation_bytes: float
    """Saved for backward, per token, all layers, without gradient checkpointing."""
    layer_bytes: float
    """The same for one layer: what is rebuilt at a time with checkpointing."""

    @property
    def total(self) -> int:
        return self.linear + self.other


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
    chosen = hardware.choose_attention(settings.attention, machine, dtype, settings.packing)
    size = measure_size(settings, model_config, dtype, adapter_dtype, machine.on_gpu)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    shards = processes if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else 1
    checkpointing, micro = fit_memory(settings, machine, size, dtype, adapter_dtype, chosen, shards)
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
        memory=memory_parts(settings, machine, size, dtype, adapter_dtype, chosen, checkpointing, micro, shards),
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
    """AdamW with 32-bit moments: paged on a GPU (arXiv 2305.14314, section 3), else and for shards torch's own."""
    if settings.optim != "auto":
        return settings.optim
    return "paged_adamw_32bit" if machine.on_gpu and shards == 1 else "adamw_torch"


def shares_a_mask(settings: Finetuning, attention_name: str) -> bool:
    """Whether the packed rows of a micro-batch are kept apart by one mask over all of it."""
    return settings.packing and attention_name != attention.NAME


def attended_length(draft: Plan, settings: Finetuning) -> float:
    """The `length` of `flops_per_token` that attention is computed over: a row's, or the whole of a shared mask.

    Under a mask nothing is skipped: twice the micro-batch, for `flops_per_token` counts half the square.
    """
    if shares_a_mask(settings, draft.attention):
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


def fit_memory(settings, machine, size, dtype, adapter_dtype, attention_name, shards: int = 1) -> tuple[bool, int]:
    """(gradient checkpointing, tokens per micro-batch): the fastest that fits.

    Large micro-batches amortise 4-bit dequantisation; recomputation costs half as much again. So: no
    checkpointing if at least two longest rows fit, else checkpointing.
    """
    options = {"on": [True], "off": [False], "auto": [False, True]}[settings.gradient_checkpointing]
    largest = MASKED_TOKENS if shares_a_mask(settings, attention_name) else VARLEN_TOKENS
    largest = largest if machine.on_gpu else settings.max_seq_length  # arithmetic is slow there: nothing to amortise
    wanted = settings.micro_batch_tokens or min(settings.tokens_per_step, largest)
    wanted = max(wanted, settings.max_seq_length)
    smallest = settings.micro_batch_tokens or settings.max_seq_length
    given = (settings, machine, size, dtype, adapter_dtype, attention_name)
    for checkpointing in options:
        divisors = [wanted // k for k in range(1, 65) if wanted // k >= smallest]
        for micro in divisors:
            parts = memory_parts(*given, checkpointing, micro, shards)
            enough = sum(parts.values()) <= machine.free_memory * HEADROOM
            roomy = checkpointing or len(options) == 1 or micro >= min(wanted, 2 * settings.max_seq_length)
            if enough and roomy:
                return checkpointing, micro
    parts = memory_parts(*given, options[-1], smallest, shards)
    raise ValueError(
        f"this run needs about {as_gib(sum(parts.values()))} and {as_gib(machine.free_memory)} are free on"
        f" {machine.name}: {', '.join(f'{k} {as_gib(v)}' for k, v in parts.items())}."
        f" Lower max_seq_length ({settings.max_seq_length}) or lora_r ({settings.lora_r})"
        + ("" if settings.use_4bit else ", or set use_4bit = True")
    )


def memory_parts(
    settings, machine, size, dtype, adapter_dtype, attention_name, checkpointing, micro, shards: int = 1
) -> dict[str, float]:
    """Predicted bytes of one process by what takes them, at the peak of a training step of `micro` tokens.

    With shards a process keeps its part of the weights, the layer that computes and the next one are whole, and the
    base is loaded whole before it is shared out.
    """
    byte = dtype.itemsize
    per_weight = (4 + (0.127 if settings.bnb_4bit_use_double_quant else 0.5)) / 8 if settings.use_4bit else byte
    gradients_and_moments = adapter_dtype.itemsize + 8
    between_layers = 4 if dtype == torch.float16 else byte  # under fp16 autocast norms give float32
    at_head, at_layer = working_space(size, byte, micro, machine.on_gpu, settings.use_4bit)
    if checkpointing:  # a layer is rebuilt when the head is done with its own
        alive = size.hidden * between_layers * size.layers + size.layer_bytes
        at_head -= size.layer_bytes * micro
    else:
        alive = size.activation_bytes
    masks = 1 + byte * (1 if checkpointing else size.layers)  # of booleans; sdpa makes numbers of it in every layer
    mask = micro**2 * masks if shares_a_mask(settings, attention_name) else 0
    base, adapters = size.linear * per_weight + size.other * byte, size.adapter * adapter_dtype.itemsize
    parts = {
        "process": OVERHEAD["cuda" if machine.on_gpu else "cpu"],
        "base weights": base / shards,
        "adapters": adapters / shards,
        "gradients and moments": size.adapter * gradients_and_moments / shards,
        "activations": alive * micro + mask,
        "working space": max(at_head, at_layer),
    }
    if shards > 1:
        parts["layers gathered"] = 2 * (size.linear * per_weight + adapters) / size.layers + size.head * byte
        parts["more, to load the base"] = max(0.0, base + adapters - (sum(parts.values()) - parts["process"]))
    return parts


def working_space(size: ModelSize, byte: int, micro: int, on_gpu: bool, use_4bit: bool) -> tuple[float, float]:
    """Bytes that live only for a moment of the backward pass: (in the head, in a layer).

    The head: a tile of logits (without Triton TRL folds it in torch, and holds eight and a mask of them), the hidden
    states and their gradient, once in float32. A layer: its largest weight dequantised, twice, and the gradients at
    its widest place.
    """
    tile = min(micro, HEAD_TILE[0]) * min(size.vocabulary, HEAD_TILE[1]) * byte
    head = tile * (1 if on_gpu else 8.25) + micro * size.hidden * (4 + 3 * byte)
    widest = size.largest_linear / size.hidden
    return head, 2 * size.largest_linear * byte * use_4bit + 2 * micro * widest * byte


def measure_size(settings: Finetuning, model_config, dtype, adapter_dtype, on_gpu: bool) -> ModelSize:
    """Sizes of a model from its configuration, built on the meta device: no weight is read and no memory used."""
    from llm_finetuning.sizing import adapter_weights, build_on_meta, layer_activation_bytes

    model = build_on_meta(model_config, dtype)
    adapters, linears, head = adapter_weights(model, settings)
    total = sum(p.numel() for p in model.parameters())
    config = model_config.get_text_config()
    per_layer = layer_activation_bytes(model_config, settings, dtype, adapter_dtype, on_gpu)
    return ModelSize(
        linear=sum(linears),
        other=total - sum(linears),
        head=head,
        adapter=adapters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        largest_linear=max(linears),
        activation_bytes=per_layer * config.num_hidden_layers,
        layer_bytes=per_layer,
    )
