"""Adapters: master weights in float32, whatever the base computes in."""

import copy
import json

import pytest
import torch
from inference_fixtures import make_model
from training_fixtures import prepare, small_settings
from transformers import get_cosine_schedule_with_warmup

from llm_finetuning.training import qlora

STEPS, RATE = 220, 5e-5


def optimizing(parameters) -> list:
    """AdamW on them and a cosine schedule, to be stepped one after the other."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    return [optimizer, get_cosine_schedule_with_warmup(optimizer, 7, STEPS)]


def swallowed(model, dtype, chosen) -> float:
    """Error of the adapters' whole change after 220 steps, against float32 parameters that got the same gradients."""
    model = qlora.cast_trainable(qlora.add_adapters(copy.deepcopy(model), chosen), dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    exact = [torch.nn.Parameter(p.detach().float().clone()) for p in trained]
    before = [p.detach().clone() for p in exact]
    steps = [*optimizing(trained), *optimizing(exact)]
    ids = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        for mine, reference in zip(trained, exact, strict=True):
            reference.grad = mine.grad.float()
        for step in steps:
            step.step()
        model.zero_grad()

    def moved(parameters):
        return torch.cat([(p.detach().float() - b).flatten() for p, b in zip(parameters, before, strict=True)])

    return float((moved(trained) - moved(exact)).norm() / moved(exact).norm())


def test_small_updates_are_not_swallowed(tmp_path):
    """The adapters of a bfloat16 model, whose updates shrink with the schedule, move as float32 parameters do."""
    chosen, in_16_bits = small_settings(tmp_path, "m", lora_dropout=0.0, lora_r=8), make_model(rows=320).bfloat16()
    master, half = (swallowed(in_16_bits, dtype, chosen) for dtype in (torch.float32, torch.bfloat16))
    print(f"error of the whole change: master weights {master:.2%}, bfloat16 weights {half:.2%}")
    assert master < 0.02
    assert half > 0.2, "what the master weights are for"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_trained_parameter_is_a_float32_master_weight(dtype, tiny_base, tmp_path):
    small = prepare(small_settings(tmp_path, tiny_base, dtype=dtype))
    trained = [p for p in small.trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    ids = torch.tensor([[1, 2, 3]])
    assert small.model(input_ids=ids).logits.dtype == getattr(torch, dtype), "the model computes in its own dtype"


@pytest.mark.parametrize("order", [0, 1])
def test_an_adapter_s_configuration_is_the_same_in_every_process(order, tmp_path):
    """PEFT keeps the names of the targets in a set, whose order changes with the process."""
    model = qlora.add_adapters(make_model(rows=320), small_settings(tmp_path, "m"))
    names = sorted(model.peft_config["default"].target_modules, reverse=order)
    model.peft_config["default"].target_modules = set(names)
    qlora.save_adapter_weights(model, qlora.gather_adapter(model), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
