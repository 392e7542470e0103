"""The 4-bit weights of the trained model in a file, from which the merge takes them.

To quantise the base once more takes longer than the rest of a merge. The file lies beside the merged models and goes
with them; where there is none, of this base and quantised in this way, the merge quantises anew, to the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm_finetuning import bitsandbytes_cpu, models
from llm_finetuning.files.atomic import writing
from llm_finetuning.files.shards import Weights
from llm_finetuning.release import merging

if TYPE_CHECKING:
    from llm_finetuning.training.planning import Plan

NAME = "weights-4bit.safetensors"


@dataclass(frozen=True)
class HeldWeights:
    """The weights in the file `path`, by their names in the base, as bitsandbytes lays out a 4-bit checkpoint."""

    path: Path

    def read(self, name: str, device: str) -> torch.Tensor:
        """Returns a weight (out, in), dequantised on `device`, in the dtype that the trained model computed in."""
        from bitsandbytes import functional

        bitsandbytes_cpu.mend()
        with safe_open(self.path, "pt") as file:
            packed = file.get_tensor(name).to(device)
            parts = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")}  # noqa: SIM118
        return functional.dequantize_4bit(packed, functional.QuantState.from_dict(parts, torch.device(device)))


def save(model: torch.nn.Module, plan: "Plan") -> None:
    """Writes the 4-bit weights of the trained model atomically, unless the 16-bit base alone is to be merged into."""
    if plan.four_bit and plan.settings.merge_base != "original":
        write(model, Weights(plan.model_path), plan.settings.folders.merged / NAME, _made_of(plan))


def write(model: torch.nn.Module, base: Weights, path: Path, about: dict[str, str]) -> None:
    """Writes the 4-bit weights of `model` to one file under their names in `base`, with `about` in its header."""
    layers = merging.quantised_layers(model)
    places = merging.stored_names(layers, base)
    tensors = {
        places[name] + key.removeprefix("weight"): tensor.cpu()
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
        if key.startswith("weight")
    }
    with writing(path) as partial:
        save_file(tensors, partial, metadata=about)


def find(plan: "Plan") -> HeldWeights | None:
    """The file that `save` wrote for this base and these settings; None where there is none, or it is damaged."""
    path = plan.settings.folders.merged / NAME
    try:
        with safe_open(path, "pt") as file:
            return HeldWeights(path) if file.metadata() == _made_of(plan) else None
    except (FileNotFoundError, SafetensorError):
        return None


def remove(plan: "Plan") -> None:
    """Removes the file once the merge is verified."""
    (plan.settings.folders.merged / NAME).unlink(missing_ok=True)


def _made_of(plan: "Plan") -> dict[str, str]:
    """What decides the 4-bit weights: the base, and how it is quantised."""
    settings = plan.settings
    return {
        "base": models.fingerprint(plan.model_path),
        "quant_type": settings.bnb_4bit_quant_type,
        "double_quant": str(settings.bnb_4bit_use_double_quant),
        "dtype": str(plan.dtype),
    }
