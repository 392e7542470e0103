"""What an adapter's files must be so that its merge is what was trained; known before anything is computed."""

import json
import math
import re
from pathlib import Path

import torch

from llm_finetuning.files.shards import Weights

CONFIG = "adapter_config.json"
KEY = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(\.(?!bias$)[^.]+)?(\.weight)?")
"""Name of a module, kind of the tensor, name of the adapter (not in a file that PEFT saved)."""


def read_config(folder: Path) -> dict:
    """Reads adapter_config.json. Raises FileNotFoundError, or ValueError for one whose rank or scaling is no number."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: train first, the notebook writes the adapter there")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of an adapter ({error}): bring an undamaged copy back") from error
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") == "LORA" and not (_is_number(rank) and rank == int(rank) > 0):
        raise ValueError(f"{path}: r is {rank!r}, and a rank is a whole number above 0: bring an undamaged copy back")
    if config.get("peft_type") == "LORA" and not (_is_number(alpha) and alpha):
        raise ValueError(
            f"{path}: lora_alpha is {alpha!r}, by which nothing of the adapter would be added: train with another"
        )
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_keys(weights: Weights) -> None:
    """Raises ValueError for a tensor that is no factor of LoRA, or belongs to a second adapter in the same file."""
    if not weights.names():
        raise ValueError(f"{weights.folder} holds an adapter without tensors: train again, or bring a whole copy back")
    found: dict[tuple[str, str], str] = {}
    for key in weights.names():
        match = KEY.fullmatch(key)
        if not match:
            raise ValueError(
                f"{weights.folder} holds {key}, which is no factor of LoRA: only what adapters add to linear layers can"
                " be merged here, no biases, embeddings or whole layers that were trained beside them"
            )
        first = found.setdefault((match[1], match[2]), key)
        if first != key:
            raise ValueError(f"{weights.folder} holds two adapters, {first} and {key}: save the one to merge alone")


def check_factors(parts: dict[str, dict[str, torch.Tensor]], rank: int, folder: Path) -> None:
    """Raises ValueError for factors of another rank than the configuration's, or numbers that are not finite.

    parts: {name of the weight: {"A": (r, in), "B": (out, r), with DoRA "magnitude_vector": (out,)}}.
    """
    for name, found in parts.items():
        a, b = found["A"], found["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(
                f"{folder}: the adapter of {name} has factors of the shapes {list(a.shape)} and {list(b.shape)}, and r"
                f" is {rank} in {CONFIG}: they are of different adapters, or a layer that is not linear"
            )
        if broken := [part for part, tensor in found.items() if not tensor.isfinite().all()]:
            raise ValueError(
                f"{folder}: lora_{broken[0]} of {name} holds numbers that are not finite: the training diverged. Go on"
                " from an earlier checkpoint with a lower learning_rate, or train again"
            )


def check_shapes(
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]], lengths: dict[str, torch.Tensor], weights: Weights
) -> None:
    """Raises ValueError unless the base has every weight that an adapter changes, in the adapter's shape."""
    stored = weights.shapes()
    if missing := sorted(set(factors) - set(stored)):
        raise ValueError(f"{weights.folder} has no tensor {', '.join(missing[:3])}: this adapter is of another model")
    for name, (a, b) in factors.items():
        changed = [len(lengths.get(name, b)), a.shape[1]]
        if stored[name] != changed or len(b) != changed[0]:
            raise ValueError(
                f"{weights.folder}: {name} is {stored[name]}, and the adapter's product {[len(b), a.shape[1]]}: this"
                " adapter is of another model"
            )
