"""Models on torch's meta device: their modules and shapes, without memory for weights."""

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llm_finetuning import models


def build_on_meta(model_config: PretrainedConfig, dtype: torch.dtype, attention: str = "eager") -> PreTrainedModel:
    """The model of a configuration with no storage behind its weights. Raises ValueError for other models."""
    from transformers import AutoModelForCausalLM

    if type(model_config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{model_config.model_type} is no causal language model to transformers: set model_name to another base"
        )
    with models.reading(model_config.name_or_path, "config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=attention)


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of a model's configuration with so many of its layers, the first ones."""
    found = copy.deepcopy(config)
    text = found.get_text_config()
    text.num_hidden_layers = layers
    if vars(text).get("layer_types"):  # of some families it is computed of other settings
        text.layer_types = text.layer_types[:layers]
    return found
