"""A LoRA layer as one operation against PEFT's own: results, gradients, and everything that it leaves to PEFT."""

import copy

import pytest
import torch
from inference_fixtures import make_model
from peft import LoraConfig, get_peft_model
from training_fixtures import prepare, small_settings

from llm_finetuning.training import fused_lora, qlora

VALUES = torch.randn(2, 24, 80, generator=torch.Generator().manual_seed(3))


def adapted(**changes) -> torch.nn.Module:
    """Two linear layers with adapters that are not zero, as PEFT makes them."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(80, 200), torch.nn.GELU(), torch.nn.Linear(200, 80, bias=False))
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["0", "2"], init_lora_weights=False, **changes)
    return get_peft_model(layers, config)


def step(model, values) -> list[torch.Tensor]:
    """The output, and the gradients of the values and of all adapters."""
    values = values.detach().requires_grad_()
    model.zero_grad()
    out = model(values)
    (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    return [out.detach(), values.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def error(found, exact) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_output_and_gradients_are_peft_s(dtype, bound):
    """And in 16 bits they are no further from float64 than PEFT's, which rounds three times more."""
    plain = adapted().to(dtype)
    exact = step(copy.deepcopy(plain).double(), VALUES.to(dtype).double())
    theirs, ours = (error(step(model, VALUES.to(dtype)), exact) for model in (plain, fused_lora.fuse(plain)))
    assert ours < bound
    assert ours <= theirs * 1.1


@pytest.mark.parametrize("kind", ["plain", "recomputed"])
def test_a_4_bit_model_trains_as_with_peft_s_layers(kind, tiny_base, tmp_path):
    recomputed = "on" if kind == "recomputed" else "off"
    small = prepare(small_settings(tmp_path, tiny_base, gradient_checkpointing=recomputed, lora_dropout=0.0))
    model, ids = small.model, torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(1))
    layers = [m for m in model.modules() if isinstance(m, fused_lora.FusedLinear4bit)]
    assert len(layers) == qlora.coverage(model)["adapted"].sum()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()
        torch.manual_seed(4)  # the base has dropout of its own
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.double() for p in model.parameters() if p.requires_grad]

    ours = gradients()
    for layer in layers:
        layer.__class__ = fused_lora.Linear4bit
    assert error(ours, gradients()) < 1e-5


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}, {"use_rslora": True}]
)
def test_other_kinds_of_lora_compute_as_peft_has_them(changes):
    plain = adapted(**changes)
    torch.manual_seed(5)
    expected = step(plain, VALUES)
    torch.manual_seed(5)
    assert error(step(fused_lora.fuse(plain), VALUES), expected) < 1e-6


def test_disabled_merged_and_several_adapters_compute_as_peft_has_them():
    model = fused_lora.fuse(adapted())
    with model.disable_adapter():
        assert torch.equal(model(VALUES), model.get_base_model()(VALUES))
        base = model(VALUES)
    alone = model(VALUES)
    assert not torch.allclose(alone, base)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    assert torch.equal(model(VALUES), alone), "an adapter that is not active adds nothing"
    model.set_adapter("other")
    assert not torch.allclose(model(VALUES), alone)
    model.base_model.set_adapter(["default", "other"])
    both = model(VALUES)
    model.merge_adapter()
    assert torch.allclose(model(VALUES), both, atol=1e-5)


def test_layers_compile_without_a_break_in_the_graph(torch_compiles):
    model = fused_lora.fuse(adapted())
    expected = step(model, VALUES)
    graphs = []
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    assert error(step(model, VALUES), expected) < 1e-6
    assert len(graphs) == 1


def test_an_embedding_keeps_the_layer_that_peft_gave_it():
    model = make_model(rows=320)
    adapters = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    kinds = {type(m).__name__ for m in fused_lora.fuse(adapters).modules() if hasattr(m, "lora_embedding_A")}
    assert kinds == {"Embedding", "FusedLinear"}
