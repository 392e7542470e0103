"""DoRA in the plan: its work is what torch counts of a step of PEFT's, and its time follows."""

import copy
import dataclasses

import dry_run
import pytest
from training_fixtures import small_settings

from llm_finetuning.hardware import GIB, Machine
from llm_finetuning.training import dora, planning

CPU = Machine("cpu", "cpu", None, 24 * GIB, 24 * GIB, 24 * GIB, 2, 1e11)
A100 = Machine("cuda:0", "A100", (8, 0), 79 * GIB, 79 * GIB, 12 * GIB, 2, 250e12, True)
CASES = [
    (A100, {"micro_batch_tokens": 2048}),
    pytest.param(A100, {"micro_batch_tokens": 512, "max_seq_length": 512, "lora_r": 8}, marks=pytest.mark.more),
    pytest.param(A100, {"micro_batch_tokens": 2048, "gradient_checkpointing": "on"}, marks=pytest.mark.more),
    pytest.param(CPU, {"micro_batch_tokens": 1024}, marks=pytest.mark.more),
]


@pytest.fixture
def chosen(tmp_path):
    steps = {
        "max_seq_length": 1024,
        "tokens_per_step": 16384,
        "micro_batch_tokens": 0,
        "gradient_checkpointing": "auto",
    }
    return small_settings(tmp_path, "m", lora_r=64, lora_dropout=0.0, **steps)


@pytest.mark.parametrize(("machine", "changed"), CASES)
def test_the_work_is_what_torch_counts(chosen, phi2, monkeypatch, machine, changed):
    """On a base in 16 or 32 bits: of one in 4 bits PEFT copies the layers, and a fake tensor is not copied."""
    config = copy.deepcopy(phi2)
    config.num_hidden_layers = 4  # in the first one few outputs of the base have a gradient
    counted = {}
    for use_dora in (False, True):
        settings = dataclasses.replace(chosen, use_4bit="no", use_dora=use_dora, **changed)
        plan = planning.plan(settings, machine, config, [400] * 1000)
        given = settings, plan, config, monkeypatch
        counted[use_dora] = dry_run.matrix_operations(*given), dry_run.moved_bytes(*given)
    (flops, moved), (dora_flops, dora_moved) = counted[False], counted[True]
    passes = 1 + plan.gradient_checkpointing
    work = dora.work(plan.size, settings.lora_r, plan.dtype.itemsize, plan.four_bit, passes)
    assert work.flops == pytest.approx(dora_flops - flops, rel=0.01)
    predicted = work.bytes + plan.micro_batch_tokens * work.bytes_per_token
    assert predicted == pytest.approx(dora_moved - moved, rel=0.1)


def test_the_time_follows(chosen, phi2):
    machine = dataclasses.replace(A100, float32_flops=19.5e12, bandwidth=1.5e12)
    given = [400] * 1000
    plain, with_dora, unknown = (
        planning.plan(dataclasses.replace(chosen, use_dora=use_dora), on, phi2, given)
        for use_dora, on in ((False, machine), (True, machine), (True, A100))
    )
    assert 1.2 * plain.seconds < with_dora.seconds < 3 * plain.seconds
    assert unknown.seconds == pytest.approx(plain.seconds, rel=0.02), "of a data sheet without these rates"
    short = dataclasses.replace(with_dora, micro_batch_tokens=512, accumulation=32)
    assert short.seconds > 1.1 * with_dora.seconds, "the weights are read once more for each micro-batch"
    searched = dataclasses.replace(with_dora, settings=dataclasses.replace(with_dora.settings, find_learning_rate=True))
    assert searched.search_seconds == pytest.approx(searched.seconds * 5 * searched.search_steps / searched.steps)
