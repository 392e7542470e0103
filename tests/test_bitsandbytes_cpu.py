"""Weights in 4 bits on a CPU against the definition of NF4: sixteen values, and a scale for each 64 of them."""

import pytest
import torch
from bitsandbytes import functional, nn

from llm_finetuning import models

SHAPES = [(160, 160), (640, 160), (160, 640), (320, 96), (3, 50), (256, 128)]


def defined(packed: torch.Tensor, state: functional.QuantState) -> torch.Tensor:
    """What the packed weights mean."""
    nested = state.nested and functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    scales = nested if state.nested else state.absmax
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    values = state.code[halves]
    return (values * scales.repeat_interleave(state.blocksize)[: len(values)]).view(state.shape)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_comes_back_as_its_blocks_say(shape, dtype, double_quant):
    models.four_bit(dtype)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    found = functional.dequantize_4bit(packed, state)
    assert found.dtype == dtype and found.shape == shape
    torch.testing.assert_close(found.float(), defined(packed, state).to(dtype).float(), rtol=1e-2, atol=1e-6)
    assert (found.float() - weight.float()).norm() < 0.11 * weight.float().norm()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("learns", [True, False])
def test_a_layer_computes_with_them_forward_and_backward(rows, learns):
    models.four_bit(torch.float32)
    weight = torch.randn(320, 160, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear4bit(160, 320, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    expected = defined(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(rows, 160, requires_grad=learns)
    y = layer(x)
    torch.testing.assert_close(y, x @ expected.t(), rtol=1e-4, atol=1e-3)
    if learns:
        y.sum().backward()
        torch.testing.assert_close(x.grad, expected.sum(0).expand(rows, -1), rtol=1e-4, atol=1e-3)
