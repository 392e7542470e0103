"""The plan: sizes from the configuration alone, and decisions that follow the machine."""

import copy
import dataclasses

import bitsandbytes as bnb
import dry_run
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_fixtures import small_settings

from llm_finetuning import hardware
from llm_finetuning.hardware import GIB, Machine
from llm_finetuning.training import model_size, planning
from llm_finetuning.training.memory import StepMemory


def gpu(name: str, capability: tuple[int, int], gib: float) -> Machine:
    return Machine(
        "cuda:0", name, capability, int(gib * GIB), int(gib * GIB), 12 * GIB, 2, 250e12, capability >= (8, 0)
    )


@pytest.fixture
def chosen(tmp_path):
    return small_settings(
        tmp_path,
        "m",
        lora_r=64,
        lora_dropout=0.0,
        max_seq_length=1024,
        tokens_per_step=16384,
        micro_batch_tokens=0,
        gradient_checkpointing="auto",
    )


def test_phi2_is_counted_to_the_last_weight(chosen, phi2):
    size = model_size.measure_size(chosen, phi2, torch.bfloat16, True)
    assert size.total == 2_779_683_840
    assert size.adapter == 94_371_840


CPU = Machine("cpu", "cpu", None, 24 * GIB, 24 * GIB, 24 * GIB, 2, 1e11)
A100 = gpu("A100", (8, 0), 79)


@pytest.mark.parametrize(
    ("machine", "layers", "changed"),
    [
        pytest.param(A100, 32, {}, marks=pytest.mark.more),
        (A100, 32, {"gradient_checkpointing": "on"}),
        (A100, 8, {}),
        (A100, 8, {"attention": "sdpa"}),
        (A100, 8, {"lora_dropout": 0.1, "micro_batch_tokens": 4096}),
        (A100, 8, {"lora_r": 16, "lora_target_modules": "q_proj, k_proj, v_proj, dense", "micro_batch_tokens": 2048}),
        (CPU, 8, {}),
        pytest.param(CPU, 32, {"gradient_checkpointing": "on", "max_seq_length": 512}, marks=pytest.mark.more),
    ],
)
def test_the_predicted_memory_is_what_a_step_of_phi2_keeps_alive(chosen, phi2, monkeypatch, machine, layers, changed):
    config = copy.deepcopy(phi2)
    config.num_hidden_layers = layers
    settings = dataclasses.replace(chosen, **changed)
    plan = planning.plan(settings, machine, config, [400] * 1000)
    predicted = plan.peak_memory - plan.memory["process"]
    assert predicted == pytest.approx(dry_run.peak_bytes(settings, plan, config, monkeypatch), rel=0.03)


@pytest.mark.parametrize("changed", [{}, pytest.param({"gradient_checkpointing": "on"}, marks=pytest.mark.more)])
def test_it_is_for_grouped_heads_and_gated_layers_too(chosen, monkeypatch, changed):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    settings = dataclasses.replace(chosen, **changed)
    plan = planning.plan(settings, A100, config, [400] * 1000)
    predicted = plan.peak_memory - plan.memory["process"]
    assert predicted == pytest.approx(dry_run.peak_bytes(settings, plan, config, monkeypatch), rel=0.03)


def capped():
    """Gemma 2's shape, with few layers."""
    from transformers import Gemma2Config

    return Gemma2Config(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)


def uncapped():
    from transformers import BloomConfig

    return BloomConfig(vocab_size=50_000, hidden_size=2048, n_layer=4, n_head=16)


@pytest.mark.parametrize(
    ("shape", "changed"),
    [
        (capped, {"micro_batch_tokens": 1024}),
        (uncapped, {"micro_batch_tokens": 1024}),
        pytest.param(capped, {"micro_batch_tokens": 2048}, marks=pytest.mark.more),
        pytest.param(capped, {"micro_batch_tokens": 6144}, marks=pytest.mark.more),
        pytest.param(capped, {"gradient_checkpointing": "on"}, marks=pytest.mark.more),
        pytest.param(uncapped, {"gradient_checkpointing": "on"}, marks=pytest.mark.more),
        pytest.param(uncapped, {"lora_r": 16, "micro_batch_tokens": 2048}, marks=pytest.mark.more),
    ],
)
def test_scores_that_no_kernel_makes_are_counted(chosen, monkeypatch, shape, changed):
    config = shape()
    settings = dataclasses.replace(chosen, **changed)
    plan = planning.plan(settings, A100, config, [400] * 1000)
    assert plan.attention == "eager"
    predicted = plan.peak_memory - plan.memory["process"]
    assert 1 <= predicted / dry_run.peak_bytes(settings, plan, config, monkeypatch) < 1.15


def test_scores_of_padded_examples_are_those_of_each_alone(chosen):
    """Packed, every token of a micro-batch meets every other."""
    size = model_size.measure_size(chosen, capped(), torch.bfloat16, True, "eager")
    packed = StepMemory(chosen, A100, size, torch.bfloat16, "eager")
    padded = dataclasses.replace(packed, settings=dataclasses.replace(chosen, packing=False))
    assert size.score_bytes == 8 * (4 + 2 + 2), "eight heads: softmax in float32, its copy, and tanh"
    assert padded.parts(False, 1024)["working space"] == packed.parts(False, 1024)["working space"]
    kept = [memory.parts(False, 4096)["activations"] for memory in (packed, padded)]
    masks = 4096**2 * 3
    assert kept[0] - kept[1] == pytest.approx(masks + 4 * size.score_bytes * 4096 * (4096 - 1024))


def test_more_memory_means_larger_micro_batches(chosen, phi2):
    lengths = [400] * 1000
    micro = {}
    for name, gib in {"A100 80": 79, "A100 40": 39, "L4": 22}.items():
        plan = planning.plan(chosen, gpu(name, (8, 0), gib), phi2, lengths)
        assert plan.peak_memory <= plan.machine.free_memory
        assert plan.dtype == torch.bfloat16
        micro[name] = plan.micro_batch_tokens
    assert micro["A100 80"] > micro["A100 40"] > micro["L4"]


def test_a_shared_mask_keeps_micro_batches_small_and_is_paid_for(chosen, phi2):
    lengths = [400] * 1000
    a100 = gpu("A100 80", (8, 0), 79)
    apart = planning.plan(chosen, a100, phi2, lengths)
    masked = planning.plan(dataclasses.replace(chosen, attention="sdpa"), a100, phi2, lengths)
    assert (apart.attention, masked.attention) == ("varlen", "sdpa")
    assert apart.micro_batch_tokens == 16_384 and masked.micro_batch_tokens <= 2048
    assert masked.seconds > 1.1 * apart.seconds, "every token meets the whole micro-batch"


def test_a_t4_gets_float16_and_recomputes_where_memory_asks_for_it(chosen, phi2):
    roomy, narrow = (planning.plan(chosen, gpu("T4", (7, 5), gib), phi2, [400] * 1000) for gib in (14.6, 9.0))
    for plan in (roomy, narrow):
        assert (plan.dtype, plan.attention) == (torch.float16, "sdpa")
    assert not roomy.gradient_checkpointing and narrow.gradient_checkpointing


def test_4_bit_layers_give_float32_where_autocast_makes_their_input_float32(chosen, phi2):
    """On a T4: behind Phi-2's layer norm what GELU keeps has 4 bytes; Llama's norm gives back what it was given."""
    from transformers import LlamaConfig

    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float16).to("cpu")
    assert layer(torch.ones(1, 64)).dtype == torch.float32

    def kept(config, bits: str) -> float:
        settings = dataclasses.replace(chosen, use_4bit=bits)
        return model_size.measure_size(settings, config, torch.float16, True).layer_bytes

    assert kept(phi2, "yes") - kept(phi2, "no") == 2 * phi2.intermediate_size
    llama = LlamaConfig(num_hidden_layers=2)
    assert kept(llama, "yes") == kept(llama, "no")


def test_processes_that_share_a_model_keep_their_part_of_it(chosen, phi2, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    whole = planning.plan(chosen, gpu("L4", (8, 9), 22), phi2, [400] * 1000)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    shared = planning.plan(chosen, gpu("L4", (8, 9), 22), phi2, [400] * 1000)
    assert (whole.shards, shared.shards) == (1, 4)
    for part in ("base weights", "adapters", "gradients and moments"):
        assert shared.memory[part] == pytest.approx(whole.memory[part] / 4)
    assert shared.micro_batch_tokens >= whole.micro_batch_tokens
    assert shared.peak_memory >= shared.memory["process"] + whole.memory["base weights"], "it is loaded whole"
    assert shared.optimizer == "adamw_torch", "the paged one reads plain tensors"
    assert whole.optimizer == "adamw_torch", "a paged one cannot be resumed on several GPUs"
    with pytest.raises(ValueError, match="DoRA reads whole weights, and this model is sharded"):
        planning.plan(dataclasses.replace(chosen, use_dora=True), gpu("L4", (8, 9), 22), phi2, [400])
    for optim, message in {
        "adamw_bnb_8bit": "bitsandbytes cannot update a sharded model; set optim = 'auto'",
        "paged_adamw_8bit": "cannot be resumed on several GPUs; set optim = 'auto'",
    }.items():
        with pytest.raises(ValueError, match=message):
            planning.plan(dataclasses.replace(chosen, optim=optim), gpu("L4", (8, 9), 22), phi2, [400])


def test_bfloat16_on_a_t4_is_refused(chosen, phi2):
    with pytest.raises(ValueError, match="only emulates it"):
        planning.plan(dataclasses.replace(chosen, dtype="bfloat16"), gpu("T4", (7, 5), 14.6), phi2, [400])


def test_what_cannot_fit_is_refused_with_the_parameter(chosen, phi2):
    with pytest.raises(ValueError, match=r"Lower max_seq_length \(1024\) or lora_r"):
        planning.plan(chosen, gpu("small", (8, 0), 3), phi2, [400])


def test_step_arithmetic(chosen, phi2):
    plan = planning.plan(chosen, gpu("A100", (8, 0), 39), phi2, [400] * 1000)
    assert plan.accumulation * plan.micro_batch_tokens == pytest.approx(16384, rel=0.1)
    assert plan.steps == 2 * -(-400_000 // 16384), "two epochs"
    doubled = planning.plan(
        dataclasses.replace(chosen, num_train_epochs=4.0), gpu("A100", (8, 0), 39), phi2, [400] * 1000
    )
    assert doubled.steps == 2 * plan.steps
    assert doubled.seconds == pytest.approx(2 * plan.seconds)


@pytest.mark.parametrize(("processes", "step"), [("1", 8192), ("2", 8192), ("4", 8192), ("8", 8192), ("16", 16384)])
def test_processes_share_a_step(chosen, phi2, monkeypatch, processes, step):
    """As long as each of them can take the longest example: the run is then that of one process."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    settings = dataclasses.replace(chosen, tokens_per_step=8192)
    assert planning.plan(settings, A100, phi2, [400] * 1000).step_tokens == step


def test_micro_batches_between_the_divisors_are_tried(chosen, phi2):
    """With a little less memory than a whole step needs, a step is a little shorter, and not of two halves."""
    memory = StepMemory(
        chosen, A100, model_size.measure_size(chosen, phi2, torch.bfloat16, True), torch.bfloat16, "varlen"
    )
    seen = []
    for wanted in range(16_384, 2048, -300):
        needed = sum(memory.parts(False, wanted).values()) / 0.9
        machine = dataclasses.replace(A100, free_memory=int(needed) + 1)
        _, micro = dataclasses.replace(memory, machine=machine).choose_micro_batch()
        count = round(16_384 / micro)
        seen.append((wanted, micro))
        assert micro <= wanted and 0.9 * 16_384 <= count * micro <= 16_384
    found = dict(seen)
    assert all(wanted - found[wanted] < 16 for wanted in (15_784, 7984, 5284)), "not 8,192, 5,461 and 4,096"
    assert found[13_384] == 8192, "two micro-batches all the same: then two halves"


@pytest.mark.parametrize(
    ("gib", "four_bit", "checkpointing"),
    [(79, False, "auto"), (39, False, "auto"), (9, True, "auto"), (7, True, "on"), (5, True, "auto")],
)
def test_16_bits_are_taken_where_they_cost_a_step_nothing(chosen, phi2, gib, four_bit, checkpointing):
    common = {"tokens_per_step": 8192, "gradient_checkpointing": checkpointing}
    plans = {}
    for bits in ("auto", "yes", "no"):
        settings = dataclasses.replace(chosen, use_4bit=bits, **common)
        try:
            plans[bits] = planning.plan(settings, gpu("A100", (8, 0), gib), phi2, [400] * 1000)
        except ValueError as error:
            assert bits == "no" and "set use_4bit = 'yes'" in str(error)
    assert plans["yes"].four_bit and not ("no" in plans and plans["no"].four_bit)
    assert plans["auto"].four_bit is four_bit
    assert plans["auto"].micro_batch_tokens == plans["yes"].micro_batch_tokens
    assert plans["auto"].gradient_checkpointing == plans["yes"].gradient_checkpointing
    assert plans["auto"].memory == plans["yes" if four_bit else "no"].memory
    assert dict(plans["auto"].table().itertuples(index=False))["base"] == ("in 4 bits" if four_bit else "in bfloat16")


@pytest.mark.parametrize(
    "changed",
    [
        {"use_4bit": "no", "micro_batch_tokens": 4096},
        *(
            pytest.param({"use_4bit": "no", "use_dora": True} | more, marks=pytest.mark.more)
            for more in ({}, {"gradient_checkpointing": "on"}, {"micro_batch_tokens": 2048}, {"lora_r": 8})
        ),
    ],
)
def test_16_bits_and_dora_are_counted_too(chosen, phi2, monkeypatch, changed):
    """DoRA's largest moment in a layer is added to that of the whole step, though they may lie apart."""
    config = copy.deepcopy(phi2)
    config.num_hidden_layers = 8
    settings = dataclasses.replace(chosen, **changed)
    plan = planning.plan(settings, A100, config, [400] * 1000)
    predicted = plan.peak_memory - plan.memory["process"]
    share = predicted / dry_run.peak_bytes(settings, plan, config, monkeypatch)
    assert 0.97 <= share <= (1.1 if settings.use_dora else 1.03)


def test_cost_follows_the_rate(chosen, phi2):
    plan = planning.plan(dataclasses.replace(chosen, rate_per_hour=2.0), gpu("A100", (8, 0), 39), phi2, [400] * 1000)
    assert plan.cost == pytest.approx(plan.seconds / 3600 * 2)
    assert "cost, predicted" in plan.table()["what"].to_list()


def test_this_machine_is_looked_at():
    machine = hardware.detect("float32")
    assert machine.flops > 1e9
    assert 0 < machine.free_memory <= machine.memory


def test_peak_memory_on_a_gpu_counts_what_lies_beside_the_allocator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20, 100))
    assert hardware.PeakMemory("cuda:0", free=90).start().read() == 50 + (90 - 20 - 60)
    assert hardware.PeakMemory("cuda:0").start().read() == 50


@pytest.mark.parametrize("recomputed", ["off", pytest.param("on", marks=pytest.mark.more)])
def test_the_predicted_operations_of_phi2_are_those_that_torch_counts(chosen, phi2, monkeypatch, recomputed):
    settings = dataclasses.replace(chosen, gradient_checkpointing=recomputed, micro_batch_tokens=2048)
    plan = planning.plan(settings, A100, phi2, [400] * 1000)
    predicted = planning.flops_per_token(plan.size, 0, plan.gradient_checkpointing) * plan.micro_batch_tokens
    assert predicted == pytest.approx(dry_run.matrix_operations(settings, plan, phi2, monkeypatch), rel=0.02)
    assert planning.flops_per_token(plan.size, 512) == pytest.approx(11.4e9, rel=0.02), "with attention, as published"


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 128}),
    ],
)
def test_the_time_of_a_mixture_counts_the_experts_that_a_token_takes(chosen, family, experts):
    """Beside what torch counts in a forward pass: products with weights, those of the small routers too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    config = AutoConfig.for_model(family, **sizes | experts)
    size = model_size.measure_size(chosen, config, torch.bfloat16, True)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(64)[None], use_cache=False)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert 2 * size.multiplied == pytest.approx(counted / 64, rel=0.02)
    assert planning.flops_per_token(size, 0) == 4 * size.multiplied + 6 * size.adapter


def test_packing_on_sdpa_counts_its_mask(chosen, phi2):
    plain = planning.plan(chosen, gpu("A100", (8, 0), 39), phi2, [400] * 10)
    assert plain.attention == "varlen"
    given = (chosen, plain.machine, plain.size, plain.dtype)
    masked, apart = (StepMemory(*given, attention).parts(False, 8192) for attention in ("sdpa", "varlen"))
    assert masked["activations"] > apart["activations"]


def test_the_plan_says_which_share_of_a_mixture_is_left_as_it_is(chosen):
    """Experts that are one tensor with three dimensions get neither 4 bits nor adapters, whatever "all-linear" says."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    plan = planning.plan(dataclasses.replace(chosen, lora_r=4), CPU, config, [400] * 10)
    share = dict(plan.table().itertuples(index=False))["experts: not in 4 bits, no adapters"]
    assert plan.size.experts == 2 * 4 * 3 * 64 * 128
    assert share == f"{plan.size.experts / plan.size.total:.0%} of the weights"
