"""Counts a model's weights and saved activations from its configuration alone."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from llm_finetuning.settings import Finetuning
from llm_finetuning.training import activations, attention, experts, qlora
from llm_finetuning.training.on_meta import build_on_meta


@dataclass(frozen=True)
class Adapted:
    """Sums over the linear layers that get an adapter."""

    weights: int
    """in · out."""
    squares: int
    """in · in: of the unit matrix that PEFT multiplies DoRA's factors with."""
    outputs: int

    @classmethod
    def of(cls, modules: Collection[torch.nn.Linear]) -> "Adapted":
        """The sums of these layers."""
        return cls(
            sum(m.in_features * m.out_features for m in modules),
            sum(m.in_features**2 for m in modules),
            sum(m.out_features for m in modules),
        )


@dataclass(frozen=True)
class ModelSize:
    """Counts that memory and time follow from; taken from the configuration alone, on the meta device."""

    linear: int
    """Weights of the linear layers inside the decoder: stored in 4 bits, multiplied for every token."""
    other: int
    """Embeddings, head, norms, biases."""
    head: int
    """Weights of the output layer."""
    adapter: int
    experts: int
    """Weights of mixtures of experts that are one tensor for all experts of a layer: never in 4 bits."""
    largest_expert: int
    """Weights of the largest such tensor."""
    active_experts: int
    """Weights of the experts that a token goes through, of all layers."""
    layers: int
    hidden: int
    vocabulary: int
    adapted: "Adapted"
    largest_linear: int
    """Weights of the largest linear layer inside the decoder."""
    parallel_linears: int
    """Linear layers of that size in each decoder layer, less the one that leads back: 1, or 2 where one is a gate."""
    layer_bytes: float
    """Saved for backward, per token, in one layer: what activation checkpointing recomputes at a time."""
    heads: int
    """Attention heads of a layer that keeps their scores ("eager"); 0 where a kernel makes them as it goes."""
    score_bytes: float
    """Saved for backward of these scores, all heads, per layer and pair of tokens."""

    @property
    def total(self) -> int:
        return self.linear + self.other

    @property
    def activation_bytes(self) -> float:
        """Saved for backward, per token, all layers, without gradient checkpointing."""
        return self.layer_bytes * self.layers

    @property
    def multiplied(self) -> int:
        """Frozen weights that a token is multiplied with: of the experts those that it goes through."""
        return self.linear + self.head + self.active_experts


def measure_size(
    settings: Finetuning,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    on_gpu: bool,
    implementation: str = attention.NAME,
) -> ModelSize:
    """Sizes of a model from its configuration, built on the meta device: no weight is read and no memory used.

    implementation: of attention. Raises ValueError for a model that adapters cannot be added to.
    """
    model = build_on_meta(model_config, dtype)
    adapters, linears, head = adapter_weights(model, settings)
    total = sum(p.numel() for p in model.parameters())
    config = model_config.get_text_config()
    modules = qlora.linear_modules(model)
    adapted = Adapted.of(qlora.adapted_modules(model, settings).values())
    tensors = experts.expert_parameters(model).values()
    with torch.device("meta"):
        qlora.add_adapters(model, settings)  # what PEFT refuses is known before the base loads
    given = model_config, settings, dtype, on_gpu, implementation
    per_layer, scores = activations.of_layer(*given, modules.values())
    return ModelSize(
        linear=sum(linears),
        other=total - sum(linears),
        head=head,
        adapter=adapters,
        experts=sum(tensor.numel() for tensor in tensors),
        largest_expert=max((tensor.numel() for tensor in tensors), default=0),
        active_experts=_experts_taken(config) * sum(tensor[0].numel() for tensor in tensors),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        adapted=adapted,
        largest_linear=max(linears),
        parallel_linears=max(1, linears.count(max(linears)) // config.num_hidden_layers - 1),
        layer_bytes=per_layer,
        heads=activations.scored_heads(config, implementation),
        score_bytes=scores,
    )


def _experts_taken(config: PretrainedConfig) -> int:
    """Experts of each layer that a token goes through; the most where layers differ, one where it is not known."""
    names = ("num_experts_per_tok", "top_k_experts")
    taken = [getattr(layer, name, None) or 1 for layer in config.per_layer_config for name in names]
    return max(max(one) if isinstance(one, list) else one for one in taken)


def adapter_weights(model: torch.nn.Module, settings: Finetuning) -> tuple[int, list[int], int]:
    """(adapter weights, weights of each linear module, weights of the head).

    A·B has r·(in + out) weights, DoRA a length for each of out rows more; of experts each has such factors.
    """
    adapted = qlora.adapted_modules(model, settings).values()
    tensors = experts.expert_parameters(model).values() if settings.adapts_experts else ()
    return (
        sum(settings.lora_r * (m.in_features + m.out_features) + settings.use_dora * m.out_features for m in adapted)
        + sum(settings.lora_r * t.shape[0] * (t.shape[1] + t.shape[2]) for t in tensors),
        [m.weight.numel() for m in qlora.linear_modules(model).values()],
        model.get_output_embeddings().weight.numel(),
    )
