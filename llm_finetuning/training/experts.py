"""Mixtures of experts whose weights are one tensor for all experts of a layer, which PEFT adapts as a parameter.

PEFT adds the adapters' product to such a tensor before a layer computes with it (its `ParamWrapper`): one copy of all
experts of a layer, in the dtype of the weights.
"""

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import revert_weight_conversion

from llm_finetuning import models
from llm_finetuning.settings import EXPERTS

if TYPE_CHECKING:
    from peft.tuners.lora import ParamWrapper
    from transformers import PreTrainedModel


def expert_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The tensors (experts, …, …) of a model's mixtures by their full name; the weight of a convolution is none."""
    return {
        f"{place}.{name}": parameter
        for place, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1
    }


def names(model: torch.nn.Module) -> list[str]:
    """The full names of `expert_parameters`. Raises ValueError for a model that has none."""
    if not (found := expert_parameters(model)):
        raise ValueError(
            f"lora_target_modules: {model.config.model_type} has no experts that are one tensor for all of a layer:"
            f" leave {EXPERTS!r} out"
        )
    return list(found)


def check_linears(model: "PreTrainedModel", linears: list[str]) -> None:
    """Raises ValueError for names of linear layers that PEFT takes for those of experts, as transformers 4 had them.

    It would adapt the experts in their place, and so it would again for all who load the adapter.
    """
    if taken := [name for name in linears if _is_taken(model, name)]:
        rest = ", ".join(name for name in linears if name not in taken) or EXPERTS
        raise ValueError(
            f"lora_target_modules: PEFT takes {', '.join(taken)} of {model.config.model_type} for its experts, and"
            f" cannot adapt the linear layers of that name: set lora_target_modules = {rest!r}"
        )


def _is_taken(model: "PreTrainedModel", name: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one of two that were joined cannot be taken alone
        return True
    return name not in config.target_modules


def wrappers(model: torch.nn.Module) -> dict[str, "ParamWrapper"]:
    """PEFT's wrappers of tensors by the full name of the wrapper; those of one module lie in one another."""
    from peft.tuners.lora import ParamWrapper

    return {name: module for name, module in model.named_modules() if isinstance(module, ParamWrapper)}


def coverage(model: torch.nn.Module) -> list[dict]:
    """The rows of `qlora.coverage` for tensors of experts; none where they have no adapters."""
    wrapped = list(wrappers(model).values())
    of = Counter(name.rpartition(".")[-1] for name in expert_parameters(model))
    return [
        {"module": f"{EXPERTS}.{name}", "adapted": len(same), "of": of[name], "parameters": sum(map(_trained, same))}
        for name in sorted(of)
        if (same := [wrapper for wrapper in wrapped if wrapper.parameter_name == name])
    ]


def _trained(wrapper: "ParamWrapper") -> int:
    return sum(side["default"].weight.numel() for side in (wrapper.lora_A, wrapper.lora_B))


def stored_parts(
    model: "PreTrainedModel", name: str, tensor: torch.Tensor, stored: Collection[str]
) -> dict[str, torch.Tensor] | None:
    """A tensor of the model as the checkpoint with the tensors `stored` holds it: {name there: part}.

    Most checkpoints hold each expert apart, and transformers joins them on loading: its own way back is taken. None
    where the checkpoint holds no such tensors. The model may be on the meta device, and so may the tensor.
    """
    if place := models.stored_name(name, stored, model.config):
        return {place: tensor}
    parts = revert_weight_conversion(model, {name: tensor})
    places = {part: models.stored_name(part, stored, model.config) for part in parts}
    return None if None in places.values() else {places[part]: value for part, value in parts.items()}


def not_stored(model: "PreTrainedModel", stored: dict[str, list[int]]) -> list[str]:
    """The names of `expert_parameters` of which a checkpoint does not hold all parts; stored: its tensors' shapes."""

    def whole(name: str, parameter: torch.nn.Parameter) -> bool:
        parts = stored_parts(model, name, parameter, stored) or {name: None}
        return all(part is not None and list(part.shape) == stored[place] for place, part in parts.items())

    return [name for name, parameter in expert_parameters(model).items() if not whole(name, parameter)]
