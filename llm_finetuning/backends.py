"""The ways to run a model here: 16- or 32-bit torch, 4-bit NF4."""

from pathlib import Path

import torch

from . import hardware
from .engines import TorchEngine

NAMES = ("float32", "bfloat16", "float16")


def load(folder: Path, backend: str, hashes: dict[str, str] | None):
    """An engine for the model in `folder`. `hashes`: of its files, as checked; None = not published."""
    if backend == "auto":
        backend = default()
    if backend not in NAMES:
        raise ValueError(f"backend = {backend!r}: auto, {', '.join(NAMES)}")
    return TorchEngine(load_torch(folder, getattr(torch, backend)), backend)


def default() -> str:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return str(hardware.choose_dtype("auto", capability)).removeprefix("torch.")


def load_torch(folder: Path, dtype: torch.dtype):
    """The model in `dtype` on the GPU, or on the CPU where there is none."""
    from transformers import AutoModelForCausalLM

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, device_map={"": device}, attn_implementation="sdpa", use_safetensors=True
    )
