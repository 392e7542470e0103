"""Merging an adapter into its base: 16-bit shards, written tensor by tensor.

Two bases can carry the adapter: the NF4 weights it was trained on, dequantised, and the original 16-bit weights.
Both are merged and measured on the held-out set, and the better one is kept. Merging into the 4-bit weights
themselves would quantise again and lose more than a small adapter adds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_finetuning import bitsandbytes_cpu, hardware, models
from llm_finetuning.files.shards import SHARD_BYTES, Weights, write_shards
from llm_finetuning.release import adapter_checks
from llm_finetuning.release.expert_adapter import PEFT_PREFIX, ExpertAdapter
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import on_meta, qlora

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit

    from llm_finetuning.release.held_weights import HeldWeights

BASES = ("dequantized", "original")
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
BLOCK = 2**18
"""Numbers of a block of rows: a MiB in float32, of which a few are in use at a time."""


@dataclass(frozen=True)
class Adapter:
    """The LoRA factors A (r, in) and B (out, r) by the name of the base weight they change, and their scaling.

    lengths: of a DoRA adapter, the trained length (out,) of each row of the merged weight; experts: of an adapter that
    changes tensors of a mixture's experts too.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: float
    lengths: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: ExpertAdapter | None = None

    @property
    def names(self) -> set[str]:
        """The names of the base's tensors that get something added."""
        return {*self.factors, *(self.experts.places if self.experts else ())}

    @property
    def count(self) -> int:
        """How many tensors of the model have adapters; a checkpoint may hold those of experts in many parts."""
        return len(self.factors) + (len(self.experts.products) if self.experts else 0)

    def merged(self, name: str, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Returns the merged weight in float32 of the base's `weight`, which are those `rows` of it: (rows, in).

        W + scaling · B·A; with DoRA m · (W + scaling · B·A) / |W + scaling · B·A|, row by row (arXiv 2402.09353).
        """
        if name not in self.factors:
            return weight + self.experts.delta(name, weight.device)[rows]
        a, b = self.factors[name]
        a, b = (factor.to(weight.device).float() for factor in (a, b[rows]))
        merged = torch.addmm(weight.float(), self.scaling * b, a)
        if name in self.lengths:
            merged *= (self.lengths[name][rows].to(weight.device).float() / merged.norm(dim=1))[:, None]
        return merged

    def renamed(self, names: dict[str, str]) -> "Adapter":
        """The same adapter for a base whose tensors have other names."""
        factors, lengths = ({names[n]: value for n, value in old.items()} for old in (self.factors, self.lengths))
        return Adapter(factors, self.scaling, lengths, self.experts)


def read_adapter(folder: Path, base: Weights | None = None) -> Adapter:
    """Reads an adapter as PEFT saves it; base: what it changes, needed for an adapter of experts.

    Raises FileNotFoundError or ValueError for what is neither LoRA nor DoRA.
    """
    config_file, config = folder / adapter_checks.CONFIG, adapter_checks.read_config(folder)
    unsupported = qlora.beyond_lora(config)
    if config.get("peft_type") != "LORA" or unsupported:
        raise ValueError(
            f"{config_file}: only LoRA and DoRA on an unchanged base can be merged here, found"
            f" {unsupported or config.get('peft_type')}"
        )
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    on_experts = _read_experts(folder, scaling, base) if config.get("target_parameters") else None
    parts = _factors(folder, on_experts.wrappers if on_experts else set())
    needed = {"A", "B", "magnitude_vector"} if config.get("use_dora") else {"A", "B"}
    if other := [name for name, found in parts.items() if found.keys() != needed]:
        raise ValueError(
            f"{folder}: the adapter of {other[0]} holds {', '.join(sorted(parts[other[0]]))}, and needs"
            f" {', '.join(sorted(needed))} (use_dora is {bool(config.get('use_dora'))} in {config_file.name})"
        )
    adapter_checks.check_factors(parts, rank, folder)
    lengths = {name: found["magnitude_vector"] for name, found in parts.items() if "magnitude_vector" in found}
    return Adapter({name: (found["A"], found["B"]) for name, found in parts.items()}, scaling, lengths, on_experts)


def _factors(folder: Path, without: set[str]) -> dict[str, dict[str, torch.Tensor]]:
    """{weight: {"A" or "B" or "magnitude_vector": tensor}} of an adapter's file, the modules `without` left out."""
    saved, parts = Weights(folder, "adapter_model.safetensors"), {}
    adapter_checks.check_keys(saved)
    for key, tensor in saved:
        name, _, part = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if name not in without:
            parts.setdefault(f"{name}.weight", {})[part.partition(".")[0]] = tensor
    return parts


def _read_experts(folder: Path, scaling: float, base: Weights) -> ExpertAdapter:
    config = models.configuration(str(base.folder))
    return ExpertAdapter(folder, scaling, on_meta.build_on_meta(config, torch.float32), base)


def quantize_dequantize(weight: torch.Tensor, settings: Finetuning, dtype: torch.dtype) -> torch.Tensor:
    """Returns the weight that the 4-bit layer computes with: quantised as bitsandbytes does at loading, in `dtype`."""
    from bitsandbytes import functional

    bitsandbytes_cpu.mend()
    packed, state = functional.quantize_4bit(
        weight.to(dtype).contiguous(),
        quant_type=settings.bnb_4bit_quant_type,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        blocksize=64,
    )
    return functional.dequantize_4bit(packed, state)


@dataclass(frozen=True)
class Merge:
    """What is merged and how: the adapter, its base and which form of it carries the adapter, and the dtypes."""

    base: str
    """One of BASES."""
    settings: Finetuning
    compute_dtype: torch.dtype
    save_dtype: torch.dtype
    device: str
    weights: Weights
    adapter: Adapter
    quantised: set[str]
    """Names of the weights that were trained in 4 bits (`quantised_names`)."""
    held: "HeldWeights | None" = None
    """The file with those weights; without one they are quantised anew, to the same bytes."""

    def start(self, name: str) -> torch.Tensor:
        """Returns the base tensor that the adapter is added to; one that was trained in 4 bits lies on `device`."""
        if name not in self.quantised:
            return self.weights.read(name)
        if self.held and self.base == "dequantized":
            return self.held.read(name, self.device)
        tensor = self.weights.read(name).to(self.device)
        return tensor if self.base == "original" else quantize_dequantize(tensor, self.settings, self.compute_dtype)


def write_merged(merge: Merge, folder: Path) -> None:
    """Writes the merged tensors to `folder` in shards of at most 2 GB, with their index.

    W' = round(W + change), see `Adapter.merged` and `merge_tensor`. At no time is more than one tensor in memory.
    Raises ValueError when the adapter changes a tensor that the base does not have, or has in another shape.
    """
    weights, adapter = merge.weights, merge.adapter
    adapter_checks.check_shapes(adapter.factors, adapter.lengths, weights)
    if missing := sorted(adapter.names - set(weights.names())):
        raise ValueError(f"{weights.folder} has no tensor {', '.join(missing[:3])}: this adapter is of another model")
    folder.mkdir(parents=True, exist_ok=True)
    hardware.keep_large_blocks()  # the training has had them returned
    changed = adapter.names

    def merged(name: str) -> torch.Tensor:
        tensor = merge.start(name)
        if name in changed:
            tensor = merge_tensor(adapter, name, tensor, merge.save_dtype)
        return tensor.to(merge.save_dtype)

    write_shards(folder, weights.shapes(), merge.save_dtype, merged, SHARD_BYTES)


def merge_tensor(adapter: Adapter, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the merged tensor of the base's `weight`: added in float32, rounded once to `dtype`.

    To the nearest, unless all of `weight` lies on the 16-bit grid already, as dequantised weights do: there every
    change below half a step would be lost. Stochastic rounding (arXiv 1502.02551) keeps it in the mean. Its seed is the
    tensor's size, so a merge repeats.
    """
    on_grid = weight.dtype == dtype or torch.equal(weight.to(dtype).float(), weight.float())
    generator = torch.Generator(device=weight.device).manual_seed(weight.numel())
    result = torch.empty_like(weight, dtype=dtype)
    for rows in row_blocks(weight) if name in adapter.factors else [slice(None)]:
        exact = adapter.merged(name, weight[rows], rows)
        result[rows] = round_stochastically(exact, weight[rows], dtype, generator) if on_grid else exact
    return result


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """The rows of a matrix (out, in) in blocks that stay in a CPU core's cache while they are merged.

    Each step on the whole matrix would go through the memory, which takes longer than to compute. A GPU takes it whole.
    """
    count, width = weight.shape
    step = max(1, BLOCK // width) if weight.device.type == "cpu" else count
    return [slice(start, start + step) for start in range(0, count, step)]


def round_stochastically(
    exact: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Rounds float32 `exact` up or down with the probability of its place between the two steps of `dtype`.

    Where it equals `weight`, which lies on such a step, it stays.
    """
    if dtype == torch.bfloat16:
        # The upper 16 bits of a float32 are the bfloat16 below it in magnitude, the lower 16 bits say how far it is on
        # its way to the next: k of 2**16. A random number below 2**16, added as an integer, carries into the upper bits
        # in k of 2**16 cases; for k = 0, a weight that did not change, it never does.
        carried = random_low_bits(exact.shape, generator).add_(exact.view(torch.int32))
        # -(2**16) has its upper 16 bits set: it clears the lower ones, and nothing is left to round in `to`.
        return carried.bitwise_and_(-(2**16)).view(torch.float32).to(dtype)
    # A float16 has another exponent, so here noise of half a step either way is added, then rounded to the nearest.
    # frexp gives exact = m · 2**e with 0.5 <= m < 1: its leading bit is worth 2**(e - 1), the mantissa's last `step`.
    step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 1 - MANTISSA_BITS[dtype])
    noise = torch.rand(exact.shape, generator=generator, device=exact.device) - 0.5
    return (exact + noise * step * (exact != weight)).to(dtype)


def random_low_bits(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Returns int32 numbers below 2**16, all equally likely; four from each random int64, as drawing takes longest."""
    count = shape.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    drawn.random_(-(2**63), None, generator=generator)  # None: all 64 bits are random
    return drawn.view(torch.int16)[:count].view(shape).to(torch.int32).bitwise_and_(2**16 - 1)  # int16 is signed


def stored_names(names: Iterable[str], weights: Weights) -> dict[str, str]:
    """The names under which the base's checkpoint holds the model's tensors `names` (`models.stored_name`)."""
    config, stored = models.configuration(str(weights.folder)), set(weights.names())
    return {name: models.stored_name(name, stored, config) or name for name in names}


def quantised_names(model: torch.nn.Module) -> set[str]:
    """Returns the names, as in the base, of the weights that the trained model holds in 4 bits."""
    return set(quantised_layers(model))


def quantised_layers(model: torch.nn.Module) -> "dict[str, Linear4bit]":
    """The 4-bit layers of the trained model, by the names of their weights as in the base."""
    from bitsandbytes.nn import Linear4bit

    return {
        name.removeprefix(PEFT_PREFIX).removesuffix(".base_layer") + ".weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
