"""Counts what a model's layers keep for the backward pass, on torch's meta device, which has shapes and no memory."""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from llm_finetuning import models
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import attention, experts, qlora
from llm_finetuning.training.on_meta import build_on_meta, with_layers

PROBE_TOKENS = 64


def of_layer(
    model_config: PretrainedConfig,
    settings: Finetuning,
    dtype: torch.dtype,
    on_gpu: bool,
    implementation: str,
    linears: Collection[torch.nn.Linear],
) -> tuple[float, float]:
    """`layer_activation_bytes`, or an upper estimate from the model's linear layers where it cannot be probed."""
    try:
        return layer_activation_bytes(model_config, settings, dtype, on_gpu, implementation)
    except Exception as error:  # of any library: not every model runs on the meta device, or with the probe's attention
        print(f"activations are estimated, for {model_config.model_type} cannot be probed ({error})")
    config = model_config.get_text_config()
    # of scores softmax in float32, its copy, and soft-capping before it
    per_pair = scored_heads(config, implementation) * (4 + 2 * dtype.itemsize)
    return estimated_bytes(linears, settings, dtype) / config.num_hidden_layers, per_pair


def scored_heads(config: PretrainedConfig, implementation: str) -> int:
    """Attention heads of a layer that keeps their scores, the most where layers differ; 0 where a kernel computes."""
    if implementation != attention.EAGER:
        return 0
    return max(getattr(layer, "num_attention_heads", None) or 0 for layer in config.per_layer_config)


def layer_activation_bytes(
    model_config: PretrainedConfig, settings: Finetuning, dtype: torch.dtype, on_gpu: bool, implementation: str
) -> tuple[float, float]:
    """Bytes that one decoder layer with adapters keeps for the backward pass: (per token, per pair of tokens).

    Counted as the difference between two layers and one in a training forward pass on the meta device, each
    tensor once, parameters left out. Pairs are what eager attention keeps scores of: twice the tokens have four times
    as many, and what does not depend on the tokens, as a norm's weight in float32, is told apart by three times as
    many. Of a mixture of experts in bfloat16, which its operators on that device ask for.
    """
    if dtype == torch.float32 and _is_mixture(model_config):
        kept = layer_activation_bytes(model_config, settings, torch.bfloat16, on_gpu, implementation)
        return 2 * kept[0], 2 * kept[1]

    def keeps(tokens: int) -> int:
        given = settings, dtype, on_gpu, implementation, tokens
        one, two = (_saved_bytes(model_config, layers, *given) for layers in (1, 2))
        return two - one

    with _FusedDropout() if on_gpu else nullcontext():
        if implementation != attention.EAGER:
            return keeps(PROBE_TOKENS) / PROBE_TOKENS, 0.0
        once, twice, thrice = (keeps(times * PROBE_TOKENS) for times in (1, 2, 3))
    per_pair = (thrice - 2 * twice + once) / (2 * PROBE_TOKENS**2)
    return (twice - once) / PROBE_TOKENS - 3 * PROBE_TOKENS * per_pair, per_pair


def _is_mixture(model_config: PretrainedConfig) -> bool:
    return bool(experts.expert_parameters(build_on_meta(model_config, torch.bfloat16)))


def estimated_bytes(linears: Collection[torch.nn.Linear], settings: Finetuning, dtype: torch.dtype) -> float:
    """An upper estimate for all layers without a forward pass: each linear layer keeps what goes in and what comes out.

    Twice each for what stands between linear layers.
    """
    widths = sum(2 * (linear.in_features + linear.out_features) + settings.lora_r for linear in linears)
    return widths * dtype.itemsize


class _FusedDropout(TorchFunctionMode):
    """Dropout as on a GPU, whose kernel keeps a byte per value; elsewhere the mask is of the values' dtype."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.dropout:
            return fused_dropout(*args, **kwargs)
        return function(*args, **kwargs)


def fused_dropout(values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """`torch.nn.functional.dropout` through the operator that a GPU uses."""
    return torch.native_dropout(values, p, True)[0] if training and p else values


class _Kept:
    """A tensor as autograd keeps it: gone with the graph that needed it, as DoRA's B·A, whose gradient is cut off."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    storage = property(lambda self: self.tensor.untyped_storage())


def _saved_bytes(
    model_config: PretrainedConfig,
    layers: int,
    settings: Finetuning,
    dtype: torch.dtype,
    on_gpu: bool,
    implementation: str,
    tokens: int,
) -> int:
    config = with_layers(model_config, layers)
    name = implementation if implementation == attention.EAGER else _register_probe(on_gpu, dtype)
    model = build_on_meta(models.one_kernel_gelu(config), dtype, name)
    model = _with_adapters(model, settings)
    _cast_factors(model, dtype)
    model.train()
    if dtype == torch.float16:
        _as_under_autocast(model, settings.use_4bit != "no")
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: WeakSet[_Kept] = WeakSet()

    def keep(tensor: torch.Tensor) -> _Kept:
        held = _Kept(tensor)
        kept.add(held)
        return held

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        out = _decoder(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    sizes = {held.storage._cdata: held.storage.nbytes() for held in kept}
    del out
    return sum(count for storage, count in sizes.items() if storage not in parameters)


def _with_adapters(model: PreTrainedModel, settings: Finetuning) -> torch.nn.Module:
    """The model with adapters on its linear layers; experts that get some are trained themselves.

    What a layer keeps of its input is the same then, and their copies are no activations (`memory`).
    """
    linears = ", ".join(qlora.target_names(model, settings.lora_target_modules))
    tensors = experts.expert_parameters(model).values() if settings.adapts_experts else ()
    model.requires_grad_(False)
    if linears:
        with torch.device("meta"):
            model = qlora.add_adapters(model, replace(settings, lora_target_modules=linears))
    for tensor in tensors:
        tensor.requires_grad_(True)
    return model


def _decoder(model: torch.nn.Module) -> torch.nn.Module:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def _cast_factors(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts A and B, the copies of which would else count for each token; DoRA's lengths compute in float32."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude" not in name:
            parameter.data = parameter.data.to(dtype)


def _as_under_autocast(model: torch.nn.Module, four_bit: bool) -> None:
    """Has layers give what they give under float16 autocast on a GPU.

    torch's layer norm computes in float32. Linear layers compute in float16; those in 4 bits cast what comes out to
    the dtype of what came in (bitsandbytes' `Linear4bit`).
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float().register_forward_pre_hook(lambda module, values: (values[0].float(), *values[1:]))
        elif isinstance(module, torch.nn.Linear):
            module.forward = _in_float16(module.forward, casts_back=four_bit and ".lora_" not in name)


def _in_float16(forward: Callable, casts_back: bool) -> Callable:
    def cast(values: torch.Tensor) -> torch.Tensor:
        out = forward(values.to(torch.float16))
        return out.to(values.dtype) if casts_back else out

    return cast


class _ProbeAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: queries, keys, values and output.

    On a GPU the output's heads lie side by side for each token; elsewhere they are copied there afterwards.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, on_gpu: bool) -> torch.Tensor:
        shape = query.transpose(1, 2).shape
        out = query.new_empty(shape).transpose(1, 2) if on_gpu else query.new_empty(query.shape)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return gradient, gradient, gradient, None


def _register_probe(on_gpu: bool, dtype: torch.dtype) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    def probe(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        key, value = attention.for_every_head(query, key, value)
        width = value.shape[-1]
        query, key, value = attention.one_width(query, key, value)
        if dtype == torch.float16:  # autocast does so for attention
            query, key, value = (x.to(dtype) for x in (query, key, value))
        return _ProbeAttention.apply(query, key, value, on_gpu)[..., :width].transpose(1, 2), None

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", lambda *args, **kwargs: None)
    return "probe"
