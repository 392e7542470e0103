"""The memory of a training step before it runs: what takes it, and the largest step that fits.

Every part follows from `model_size.ModelSize`, the settings and the kind of machine.
"""

from dataclasses import dataclass, replace

import torch

from llm_finetuning import hardware
from llm_finetuning.files.shards import SHARD_BYTES
from llm_finetuning.hardware import Machine, as_gib
from llm_finetuning.settings import AUTO, Finetuning
from llm_finetuning.training import attention
from llm_finetuning.training.model_size import ModelSize

STEP_TOLERANCE = 0.1
"""How much of tokens_per_step a step may lack, so that it is made of fewer and larger micro-batches."""
STRIDE = 16
"""Tokens between two sizes of a micro-batch that are tried."""
HEADROOM = 0.9
"""Share of the free memory that the plan uses: the rest is fragmentation and what other processes take."""
MASKED_TOKENS = 2048
"""Largest micro-batch where packed examples share one attention mask: there attention costs its whole square."""
VARLEN_TOKENS = 16_384
"""Largest micro-batch otherwise: from there on nothing more is gained by amortising 4-bit dequantisation."""
OVERHEAD = {"cuda": 0.3 * hardware.GIB, "cpu": 0.9 * hardware.GIB}
"""Memory of a process without a model. On a GPU an estimate of the kernels and libraries that are loaded while it
trains: CUDA's context is there before the free memory is read. On a CPU Python with torch."""
VERIFIED_EXAMPLES = 4
"""Held-out examples whose logits a merge is verified with."""
HEAD_TILE = (4096, 32_768)
"""Tokens and vocabulary of the tile of logits that TRL's fused head computes at a time (trl.kernels)."""


@dataclass(frozen=True)
class StepMemory:
    """What decides a step's memory beside its length; the settings' use_4bit is decided (`with_base`) or "auto".

    shards: ranks that the model is sharded across (FSDP); processes: that share a step's tokens.
    """

    settings: Finetuning
    machine: Machine
    size: ModelSize
    dtype: torch.dtype
    attention: str
    shards: int = 1
    processes: int = 1

    def choose_micro_batch(self) -> tuple[bool, int]:
        """(gradient checkpointing, tokens per micro-batch): the fastest that fits.

        Large micro-batches amortise 4-bit dequantisation; activation checkpointing costs half as much again. So: no
        checkpointing if at least two of the longest examples fit, else checkpointing. Raises ValueError when nothing
        fits, with the parameter to change.
        """
        settings, sizes = self.settings, self._sizes()
        options = {"on": [True], "off": [False], "auto": [False, True]}[settings.gradient_checkpointing]
        for checkpointing in options:
            for micro in sizes:
                enough = sum(self.parts(checkpointing, micro).values()) <= self.machine.free_memory * HEADROOM
                roomy = checkpointing or len(options) == 1 or micro >= min(sizes[0], 2 * settings.unit_tokens)
                if enough and roomy:
                    return checkpointing, micro
        raise ValueError(self._too_much(self.parts(options[-1], sizes[-1])))

    def with_base(self) -> "StepMemory":
        """The same where use_4bit is decided; "auto": 16 bits where the micro-batch and checkpointing stay the same."""
        if self.settings.use_4bit != AUTO:
            return self
        whole, packed = (replace(self, settings=replace(self.settings, use_4bit=bits)) for bits in ("no", "yes"))
        try:
            return whole if whole.choose_micro_batch() == packed.choose_micro_batch() else packed
        except ValueError:
            return packed

    def _sizes(self) -> list[int]:
        """Tokens of the micro-batches to try, the largest first: k of them make up a step, or at least nine tenths."""
        settings = self.settings
        if settings.micro_batch_tokens:
            return [max(settings.micro_batch_tokens, settings.unit_tokens)]
        share, smallest = settings.tokens_per_step / self.processes, settings.unit_tokens
        sizes = range(max(min(int(share), self._largest()), smallest), smallest, -STRIDE)
        return [m for m in sizes if 0 <= 1 - round(share / m) * m / share <= STEP_TOLERANCE] + [smallest]

    def _largest(self) -> int:
        """Tokens of the largest useful micro-batch; a CPU's arithmetic is slow, there is nothing to amortise."""
        if not self.machine.on_gpu:
            return self.settings.unit_tokens
        return MASKED_TOKENS if shares_a_mask(self.settings.packing, self.attention) else VARLEN_TOKENS

    def _too_much(self, parts: dict[str, float]) -> str:
        settings, machine = self.settings, self.machine
        return (
            f"this run needs about {as_gib(sum(parts.values()))} and {as_gib(machine.free_memory)} are free on"
            f" {machine.name}: {', '.join(f'{k} {as_gib(v)}' for k, v in parts.items())}."
            f" Lower max_seq_length ({settings.max_seq_length}) or lora_r ({settings.lora_r})"
            + ("" if self.four_bit else ", or set use_4bit = 'yes'")
        )

    def parts(self, checkpointing: bool, micro: int) -> dict[str, float]:
        """Predicted bytes of one process by what takes them, at the peak of a step of `micro` tokens.

        With shards a process keeps its part of the weights, the layer that computes and the next one are whole, and
        the base is loaded whole before it is shared out.
        """
        size = self.size
        base, adapters = self.linear_weights + size.other * self.dtype.itemsize, size.adapter * 4
        activations, working_space = self._computing(checkpointing, micro)
        parts = {
            "process": OVERHEAD["cuda" if self.machine.on_gpu else "cpu"],
            "base weights": base / self.shards,
            "adapters": adapters / self.shards,
            "gradients and moments": size.adapter * (4 + 8) / self.shards,  # AdamW: two moments of 4 bytes
            "activations": activations,
            "working space": working_space,
        }
        if self.shards > 1:
            layer = (self.linear_weights + adapters) / size.layers
            # FSDP gathers the next layer while one computes
            parts["layers gathered"] = 2 * layer + size.head * self.dtype.itemsize
            parts["more, to load the base"] = max(0.0, base + adapters - (sum(parts.values()) - parts["process"]))
        return parts

    @property
    def four_bit(self) -> bool:
        return self.settings.use_4bit != "no"

    @property
    def _adapted_experts(self) -> int:
        return self.size.experts * self.settings.adapts_experts

    @property
    def linear_weights(self) -> float:
        """Bytes of the frozen linear layers: 4 bits a weight and the constants of its block, or whole."""
        if not self.four_bit:
            return self.size.linear * self.dtype.itemsize
        # bits a weight for the constants of its block of 64: 32/64, or 8/64 + 32/(64·256) (arXiv 2305.14314, section 3)
        constants = 0.127 if self.settings.bnb_4bit_use_double_quant else 0.5
        return self.size.linear * (4 + constants) / 8

    def _computing(self, checkpointing: bool, micro: int) -> tuple[float, float]:
        """Bytes of (activations, working space): what is kept for the backward pass, and what comes and goes in it."""
        size, byte = self.size, self.dtype.itemsize
        at_head, at_layer = self._working_space(micro)
        scores = size.score_bytes * self._pairs(micro)
        if checkpointing:  # a layer is recomputed when the head's tensors are freed: the two peaks do not add up
            between_layers = 4 if self.dtype == torch.float16 else byte  # under fp16 autocast norms give float32
            per_token = size.hidden * between_layers * size.layers + size.layer_bytes
            at_head -= size.layer_bytes * micro + scores
        else:
            per_token = size.activation_bytes
            scores *= size.layers
        # one boolean mask (a byte each), and its numbers in the computation's dtype, which sdpa makes in every layer
        once = checkpointing or self.attention == attention.EAGER
        masks = micro**2 * (1 + byte * (1 if once else size.layers))
        masked = shares_a_mask(self.settings.packing, self.attention)
        # of the master weights in the dtype of the computation, and of experts with their product added, kept for the
        # backward pass
        copies = size.adapter * byte * (self.dtype != torch.float32) + self._adapted_experts * byte
        if checkpointing:
            copies /= size.layers
        return per_token * micro + scores + masks * masked + copies, max(at_head, at_layer)

    def _pairs(self, micro: int) -> int:
        """Pairs of tokens whose scores are computed: all of a packed micro-batch, else of each padded example."""
        return micro * (micro if self.settings.packing else self.settings.max_seq_length)

    def _working_space(self, micro: int) -> tuple[float, float]:
        """Bytes that live only for a moment of the backward pass: (in the head, in a layer).

        The head: a tile of logits (without Triton TRL folds it in torch, and holds eight and a mask of them), the
        hidden states and their gradient, once in float32. A layer: its largest weight dequantised, twice, and the
        gradients at its widest place, in float32 with DoRA and behind 4-bit layers under autocast; two with PEFT's own
        layers in place of `fused_lora`.
        """
        size, byte, dora = self.size, self.dtype.itemsize, self.settings.use_dora
        tile = min(micro, HEAD_TILE[0]) * min(size.vocabulary, HEAD_TILE[1]) * byte
        head = tile * (1 if self.machine.on_gpu else 8.25) + micro * size.hidden * (4 + 3 * byte)
        dequantised = 2 * size.largest_linear * byte * self.four_bit
        widest = size.largest_linear / size.hidden
        fused = self.dtype != torch.float16 and self.settings.lora_dropout == 0 and not dora
        wide = size.parallel_linears if fused else max(2, size.parallel_linears)
        # DoRA makes B·A out of a unit matrix in float32, adds it to the weight, and measures the rows of the sum
        rows = (4 * widest**2 + (4 + 4 * byte) * size.largest_linear) * dora
        rows += byte * size.largest_expert * self.settings.adapts_experts  # the gradient of the sum
        gradient = 4 if dora or (self.dtype == torch.float16 and self.four_bit) else byte
        at_widest = wide * micro * widest * gradient
        # of the scores and their gradient, in float32, when what lies behind attention, more than half, is gone
        at_scores = 2 * 4 * size.heads * self._pairs(micro) - size.layer_bytes * micro / 2
        return head, dequantised + rows + max(at_widest, at_scores)


def verification_memory(settings: Finetuning, size: ModelSize, on_gpu: bool) -> tuple[float, float]:
    """Bytes of (device, host) at the peak of the merge and its verification, when the trained model has been freed.

    The merged model is loaded whole in 16 bits; two sets of logits wait on the host; the merge holds one tensor, a
    shard's bytes at most. On a CPU the device is the host.
    """
    model = 2 * size.total
    logits = VERIFIED_EXAMPLES * settings.max_seq_length * size.vocabulary * 4
    waiting = OVERHEAD["cpu"] + 2 * logits
    if on_gpu:
        return OVERHEAD["cuda"] + model + logits / VERIFIED_EXAMPLES, waiting + SHARD_BYTES
    return waiting + max(model, SHARD_BYTES), 0.0


def shares_a_mask(packing: bool, attention_name: str) -> bool:
    """Whether the packed examples of a micro-batch are isolated by one mask over all of it."""
    return packing and attention_name != attention.NAME
