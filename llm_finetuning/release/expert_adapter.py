"""The adapters of a mixture's experts, as changes of the tensors that the base's checkpoint holds."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llm_finetuning.files.shards import Weights
from llm_finetuning.training import experts

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""
Product = Callable[[torch.device], torch.Tensor]
"""B·A of every expert, multiplied on a device: float32, of the shape of the tensor that it is added to."""


class ExpertAdapter:
    """The adapters on tensors of experts, and what they change in a checkpoint that holds the experts apart."""

    def __init__(self, folder: Path, scaling: float, base: PreTrainedModel, weights: Weights):
        """Reads an adapter as PEFT saves it. base: the model that it adapts, on the meta device.

        Raises ValueError for a base whose checkpoint has no such tensors.
        """
        self.base, self.stored, self.scaling = base, set(weights.names()), scaling
        described = experts.expert_parameters(base)
        self.wrappers, self.products = read_products(folder, base)
        """Modules that PEFT wrapped, by the names of their factors; products by the model's name of the tensor."""
        self.places: dict[str, str] = {}
        """Name in the checkpoint → name in the model of the tensor that it is a part of."""
        for name in self.products:
            parts = experts.stored_parts(base, name, described[name], self.stored)
            if parts is None:
                raise ValueError(f"{weights.folder} has no tensor {name}: this adapter is of another model")
            self.places |= dict.fromkeys(parts, name)
        self._parts = lru_cache(maxsize=2)(self._all_parts)  # a layer's experts are two tensors, whose parts alternate

    def delta(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Returns what is added to the tensor `name` of the checkpoint, in float32."""
        return self._parts(self.places[name], torch.device(device))[name]

    def silent(self) -> set[str]:
        """Names of the tensors that nothing is added to: of experts that no token came to in the training."""
        return {name for name in sorted(self.places) if not self.delta(name).any()}

    def _all_parts(self, name: str, device: torch.device) -> dict[str, torch.Tensor]:
        return experts.stored_parts(self.base, name, self.scaling * self.products[name](device), self.stored)


def read_products(folder: Path, base: PreTrainedModel) -> tuple[set[str], dict[str, Product]]:
    """(names of PEFT's wrappers, the product of each tensor of experts by its name in the model).

    Which factors are of which tensor is told by the order in which PEFT wraps them, so it wraps them here again.
    """
    from peft import PeftConfig, get_peft_model, load_peft_weights

    saved = load_peft_weights(str(folder), device="cpu")
    with torch.device("meta"):
        model = get_peft_model(base, PeftConfig.from_pretrained(folder))
    wrappers = {name.removeprefix(PEFT_PREFIX): wrapper for name, wrapper in experts.wrappers(model).items()}
    found = {}
    for place, wrapper in wrappers.items():
        a, b = (saved[f"{PEFT_PREFIX}{place}.lora_{letter}.weight"] for letter in "AB")
        transposed = getattr(wrapper.get_base_layer(), "is_transposed", False)
        module = place.replace(".base_layer", "")
        found[f"{module}.{wrapper.parameter_name}"] = product(a, b, wrapper.num_experts, transposed)
    model.unload()
    return set(wrappers), found


def product(a: torch.Tensor, b: torch.Tensor, count: int, transposed: bool) -> Product:
    """B·A of each of `count` experts from PEFT's factors A (count · r, in) and B (out, r · count).

    Its shape is (count, out, in), or (count, in, out) where `transposed`.
    """

    def multiplied(device: torch.device) -> torch.Tensor:
        of_a, of_b = a.to(device).float().view(count, -1, a.shape[1]), b.to(device).float().view(b.shape[0], -1, count)
        whole = torch.einsum("ore,eri->eoi", of_b, of_a)
        return whole.transpose(1, 2) if transposed else whole

    return multiplied
