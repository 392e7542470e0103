"""Adapter + base → 16-bit shards, tensor by tensor, and the proof that the result is the trained model.

Two bases can carry the adapter: the NF4 weights it was trained on, dequantised, and the original 16-bit weights.
Both are merged and measured on the held-out set, and the better one is kept. Merging into the 4-bit weights
themselves would quantise again and lose more than a small adapter adds.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from llm_finetuning import hardware
from llm_finetuning.files.shards import Weights, write_shards
from llm_finetuning.prompts import Template

SHARD_BYTES = 2 * 10**9
BASES = ("dequantized", "original")
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by the name of the base weight they change: A (r, in), B (out, r), and the scaling."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: float
    config: dict

    def delta(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """scaling · B·A in float32, (out, in), multiplied on `device`."""
        a, b = (factor.to(device) for factor in self.factors[name])
        return (self.scaling * b.float()) @ a.float()


def read_adapter(folder: Path) -> Adapter:
    """An adapter folder as PEFT saves it. Raises FileNotFoundError or ValueError for one that is not LoRA."""
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} not found: train first, the notebook writes the adapter there")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    unsupported = [
        name for name in ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern") if config.get(name)
    ]
    if config.get("peft_type") != "LORA" or unsupported:
        raise ValueError(
            f"{config_file}: only plain LoRA can be merged here, found {unsupported or config['peft_type']}"
        )
    found: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
            found.setdefault(f"{name}.weight", {})[factor[0]] = file.get_tensor(key)
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter({name: (pair["A"], pair["B"]) for name, pair in found.items()}, scaling, config)


def quantize_dequantize(weight: torch.Tensor, settings, dtype: torch.dtype) -> torch.Tensor:
    """What the 4-bit layer computes with: quantised and dequantised as bitsandbytes does at loading, in `dtype`."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.to(dtype).contiguous(),
        quant_type=settings.bnb_4bit_quant_type,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        blocksize=64,
    )
    return functional.dequantize_4bit(packed, state)


@dataclass(frozen=True)
class Merge:
    """How one merged folder was made: dtypes of the run, and the base that carried the adapter."""

    base: str
    settings: object
    compute_dtype: torch.dtype
    save_dtype: torch.dtype
    device: str

    def start(self, weights: Weights, name: str, quantised: set[str]) -> torch.Tensor:
        """The base tensor that `name` starts from; those that were trained in 4 bits on the merge's device."""
        tensor = weights.read(name)
        if name not in quantised:
            return tensor
        tensor = tensor.to(self.device)
        return tensor if self.base == "original" else quantize_dequantize(tensor, self.settings, self.compute_dtype)


def write_merged(merge: Merge, weights: Weights, adapter: Adapter, quantised: set[str], folder: Path) -> None:
    """Writes the merged tensors to `folder` in shards of at most 2 GB, with their index.

    W' = round(W + scaling · B·A), see `add_and_round`. At no time is more than one shard in memory.
    Raises ValueError when the adapter changes a tensor that the base does not have.
    """
    missing = sorted(set(adapter.factors) - set(weights.names()))
    if missing:
        raise ValueError(f"{weights.folder} has no tensor {', '.join(missing[:3])}: this adapter is of another model")
    folder.mkdir(parents=True, exist_ok=True)

    def merged(name: str) -> torch.Tensor:
        tensor = merge.start(weights, name, quantised)
        if name in adapter.factors:
            tensor = add_and_round(tensor, adapter.delta(name, tensor.device), merge.save_dtype)
        tensor = tensor.to(merge.save_dtype).cpu()
        with hardware.kept_apart():  # it stays until its shard is written
            return tensor.clone(memory_format=torch.contiguous_format)

    shapes = {name: weights.shape(name) for name in weights.names()}
    write_shards(folder, shapes, merge.save_dtype, merged, SHARD_BYTES)


def add_and_round(weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight + delta, added in float32 and rounded once to `dtype`.

    To the nearest, unless the base lies on the 16-bit grid already, as dequantised weights do: there every change
    below half a step would be swallowed, so it is rounded up or down by chance in proportion (stochastic rounding,
    arXiv 1502.02551): the change survives in the mean. The chance is fixed by the tensor's shape, so a merge repeats.
    """
    exact = weight + delta  # float32, as delta is
    if weight.dtype != dtype and not torch.equal(weight.to(dtype).float(), weight.float()):
        return exact.to(dtype)
    return round_stochastically(exact, weight, dtype)


def round_stochastically(exact: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `exact` rounded up or down with the probability of its place between the two steps of `dtype`.

    Where it equals `weight`, which lies on such a step, it stays. bfloat16 is the upper half of a float32: a random
    number added to the lower half carries over with just that probability, and never from a step. For float16 the
    noise is added as a number, half a step either way.
    """
    chance = torch.Generator(device=exact.device).manual_seed(exact.numel())
    if dtype == torch.bfloat16:
        carried = random_low_bits(exact.shape, chance).add_(exact.view(torch.int32))
        return carried.bitwise_and_(-(2**16)).view(torch.float32).to(dtype)
    step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 1 - MANTISSA_BITS[dtype])
    noise = torch.rand(exact.shape, generator=chance, device=exact.device) - 0.5
    return (exact + noise * step * (exact != weight)).to(dtype)


def random_low_bits(shape: torch.Size, chance: torch.Generator) -> torch.Tensor:
    """int32 numbers below 2**16, all equally likely; a random int64 gives four, drawing is what takes the time."""
    count = shape.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=chance.device).random_(
        -(2**63), None, generator=chance
    )
    return drawn.view(torch.int16)[:count].view(shape).to(torch.int32).bitwise_and_(2**16 - 1)


def write_companions(folder: Path, base: Path, template: Template, save_dtype: torch.dtype) -> None:
    """Config, tokenizer with its chat template, and generation config with EOS, pad and suppressed ids."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(base)
    config.dtype = save_dtype
    config.use_cache = True
    config.save_pretrained(folder)
    template.tokenizer.save_pretrained(folder)
    eos = template.tokenizer.eos_token_id
    pad = template.tokenizer.pad_token_id
    unused = list(range(len(template.tokenizer), config.get_text_config().vocab_size))
    GenerationConfig(
        eos_token_id=sorted(template.stop_token_ids),
        pad_token_id=eos if pad is None else pad,
        suppress_tokens=unused or None,
    ).save_pretrained(folder)


def quantised_names(model) -> set[str]:
    """The weights that the trained model holds in 4 bits, by the names they have in the base."""
    import bitsandbytes as bnb

    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
