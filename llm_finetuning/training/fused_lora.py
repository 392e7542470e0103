"""LoRA on a frozen linear layer as one operation: nothing at the layer's full width is copied, scaled or added apart.

PEFT clones the base's output, multiplies the adapters' by the scale and adds the two: three passes over memory at full
width, and two more in the backward pass. Here the product with B is accumulated into the base's output, scale included.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.bnb import Linear4bit


class AdaptedLinear(torch.autograd.Function):
    """values, a, b, base, scale → base(values) + scale · values aᵀ bᵀ; (T, in), (r, in), (out, r) → (T, out).

    base: a frozen linear layer, in 4 bits or not. The backward pass reads its weight again, as bitsandbytes does.
    """

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: torch.nn.Linear, scale: float
    ) -> torch.Tensor:
        """See the class."""
        inner = values @ a.t()
        ctx.save_for_backward(values, a, b, inner)
        ctx.base, ctx.scale = base, scale
        return base(values).addmm_(inner, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        """The gradients of values, a and b."""
        values, a, b, inner = ctx.saved_tensors
        at_inner = (gradient @ b).mul_(ctx.scale)
        at_b = (gradient.t() @ inner).mul_(ctx.scale)
        at_values = None
        if ctx.needs_input_grad[0]:
            at_values = (gradient @ frozen_weight(ctx.base, gradient.dtype)).addmm_(at_inner, a)
        return at_values, at_inner.t() @ values, at_b, None, None


def frozen_weight(base: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a layer (out, in), dequantised where it is in 4 bits."""
    # a weight that FSDP gathered again has lost what bitsandbytes noted on it; the layer keeps it too
    state = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight, state).to(dtype)


class _Fused:
    """The forward pass of a LoRA layer through `AdaptedLinear`, where it is plain LoRA with one adapter."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if args or kwargs or not self._is_plain(name) or any(map(torch.is_autocast_enabled, ("cuda", "cpu"))):
            return super().forward(x, *args, **kwargs)
        weights = [side[name].weight.to(x.dtype) for side in (self.lora_A, self.lora_B)]
        flat = x.reshape(-1, x.shape[-1])
        return AdaptedLinear.apply(flat, *weights, self.base_layer, self.scaling[name]).view(*x.shape[:-1], -1)

    def _is_plain(self, name: str | None) -> bool:
        """Whether nothing but a scaled product is to be added to the base's output."""
        if name not in self.lora_A or self.disable_adapters or self.merged or self.lora_variant.get(name):
            return False
        return not self.lora_bias[name] and isinstance(self.lora_dropout[name], torch.nn.Identity)


class FusedLinear(_Fused, Linear):
    """PEFT's LoRA layer on a linear layer in 16 or 32 bits."""


class FusedLinear4bit(_Fused, Linear4bit):
    """PEFT's LoRA layer on a 4-bit layer of bitsandbytes."""


FUSED = {Linear: FusedLinear, Linear4bit: FusedLinear4bit}


def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Has the LoRA layers of a model compute in one operation; other kinds of layers stay PEFT's."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
    return model
