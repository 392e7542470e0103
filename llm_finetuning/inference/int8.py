"""Linear layers in int8 with a scale for each output feature: the output embedding, and the prefill of an NF4 model.

One token is computed with the activations as they are. Of many tokens the activations become integers too, which
processors multiply several times faster. A single int8 for an activation would lose what stands beside an outlier
(arXiv 2208.07339, table 1: 3.8% of perplexity at 2.7 billion parameters), so each is the sum of two, 15 bits together.
"""

import torch
from torch import nn

MANY = 16
"""Rows from which on the product of integers is quicker than the product with bfloat16 activations."""
FINE = 254
"""Fine steps in a coarse one: the rest after rounding, at most 1/2, becomes at most 127."""
COLUMNS = 16
"""Input features are a multiple of it: of others torch's product for few rows is wrong, or crashes."""
CHUNK = 128
"""Rows that are quantised at once, which bounds the memory of the float32 values."""


class Int8Linear(nn.Module):
    """A linear layer whose weight (N, K) is int8: `packed` (N, K) int8, `scales` (N,) bfloat16."""

    def __init__(self, out_features: int, in_features: int, bias: bool):
        super().__init__()
        with torch.device("meta"):
            self.register_buffer("packed", torch.empty(out_features, in_features, dtype=torch.int8))
            self.register_buffer("scales", torch.empty(out_features, dtype=torch.bfloat16))
            self.register_buffer("bias", torch.empty(out_features, dtype=torch.bfloat16) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        multiply = integer_product if len(flat) >= MANY else torch.ops.aten._weight_int8pack_mm
        y = multiply(flat, self.packed, self.scales)
        y = y if self.bias is None else y.add_(self.bias)
        return y.reshape(*x.shape[:-1], -1)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a weight (N, K) to int8; returns (packed (N, K), scales (N,))."""
    scales = (weight.abs().amax(1).float() / 127).to(torch.bfloat16)
    steps = scales.float().clamp(min=1e-30)[:, None]
    parts = [
        (w.float() / s).round().clamp(-127, 127).to(torch.int8)
        for w, s in zip(weight.split(CHUNK), steps.split(CHUNK), strict=True)
    ]
    return torch.cat(parts), scales


def integer_product(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiplies activations x (M, K) with an int8 weight (N, K) of `scales` (N,) in integers; returns (M, N) like x.

    A row of x is step * (coarse + fine / 254) with coarse and fine in int8 and a step of its own.
    """
    values = x.float()
    step = values.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    values = values / step
    coarse = values.round()
    both = torch.cat([coarse, (values - coarse).mul_(FINE).round_()]).to(torch.int8)
    y, fine = torch._int_mm(both, packed.T).float().chunk(2)
    return y.add_(fine, alpha=1 / FINE).mul_(step).mul_(scales).to(x.dtype)
