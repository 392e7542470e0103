"""The rehearsal's base: Phi-2's true configuration with random weights, written shard by shard."""

import hashlib
import math
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerBase

from llm_finetuning.files.shards import write_shards
from llm_finetuning.sample import phi
from llm_finetuning.sample.making import make_once

SHARD_BYTES = 10**9
SEED = 20


def make_rehearsal(target: Path, tokenizer: PreTrainedTokenizerBase, config: PhiConfig | None = None) -> Path:
    """Makes Phi-2's true configuration with random weights in bf16 (5.6 GB) in `target` unless it is there.

    Memory holds one tensor, never the model. `config` replaces Phi-2's (in tests). Raises ValueError for a tokenizer
    with more tokens than the model has rows, OSError where the disk is too small.
    """
    config = config or phi2_config(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer.name_or_path} has {len(tokenizer)} tokens, Phi-2 only"
            f" {config.vocab_size} rows"
        )
    recipe = config.to_json_string() + tokenizer.backend_tokenizer.to_str() + str(SEED)
    shapes = weight_shapes(config)

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generator = torch.Generator().manual_seed(SEED)
        with tqdm(total=len(shapes), desc="Making Phi-2 with random weights", unit="tensor") as bar:

            def weight(name: str) -> torch.Tensor:
                bar.update()
                return random_weight(name, shapes[name], config.initializer_range, generator)

            write_shards(folder, shapes, torch.bfloat16, weight, SHARD_BYTES)

    size = sum(2 * math.prod(shape) for shape in shapes.values()) + 50 * 10**6
    return make_once(target, hashlib.sha256(recipe.encode()).hexdigest(), size, write)


def phi2_config(tokenizer: PreTrainedTokenizerBase) -> PhiConfig:
    """Returns the published configuration of microsoft/phi-2: 2,779,683,840 parameters."""
    config = phi.config(phi.Recipe(layers=32, heads=32), tokenizer)
    config.update({"vocab_size": 51200, "resid_pdrop": 0.1, "dtype": "bfloat16"})
    return config


def weight_shapes(config: PhiConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by name, without allocating one."""
    with torch.device("meta"):
        model = PhiForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def random_weight(name: str, shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    """Draws a tensor in bf16 as transformers initialises Phi: biases 0, norms 1, all else normal with `std`."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if "layernorm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(std=std, generator=generator).to(torch.bfloat16)
