"""Adapters on the experts of a mixture: trained as PEFT trains them, resumed, counted, merged, refused by name."""

import dataclasses
import json
import math

import dry_run
import pytest
import torch
import transformers
from families import MIX_PACKED_EXAMPLES, tiny_base_of
from packaging.version import Version
from plain_steps import documents_of, initial_adapter, take, train_recorded
from preference_fixtures import finetuned_folder, preference_settings, prepare_preference
from safetensors.torch import load_file, save_file
from training_fixtures import digest, prepare, small_pairs, small_settings
from transformers import MixtralConfig

from llm_finetuning import models
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.hardware import GIB, Machine
from llm_finetuning.release import gguf, merging, verify
from llm_finetuning.training import planning, preference_start, selfcheck
from llm_finetuning.training import resumable as training
from llm_finetuning.training.dataset import encode_inputs
from llm_finetuning.training.metrics import Metrics

SIZES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_key_value_heads": 1, "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32},
}
LIKE_MIXTRAL = ["mixtral", *(pytest.param(name, marks=pytest.mark.more) for name in SIZES if name != "mixtral")]
PLAIN = {"lora_dropout": 0.0, "lora_target_modules": "all-linear, experts", "warmup_ratio": 0.0}


def mixture(family, folder):
    return tiny_base_of(family, folder, **SIZES[family])


def settings_of(family, folder, base, **changed):
    return small_settings(folder, base, **PLAIN | {"packing": family not in MIX_PACKED_EXAMPLES} | changed)


def plain_steps(base, steps, initial, chosen, tensors) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step by PEFT and transformers alone, an expert and a document after the other."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **ways)
    linears = {name.partition(".lora_")[0].rpartition(".")[-1] for name in initial} - {"experts", "base_layer"}
    lora = {"r": chosen.lora_r, "lora_alpha": chosen.lora_alpha, "target_modules": sorted(linears)}
    model = get_peft_model(model, LoraConfig(**lora, target_parameters=tensors))
    return take(model, initial, steps, chosen)


def rows_of(batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The documents of a micro-batch, packed into one sequence or padded."""
    if len(batch["input_ids"]) == 1 and "position_ids" in batch:
        return documents_of(batch)
    lengths = batch["attention_mask"].sum(-1).tolist()
    return [(batch["input_ids"][i : i + 1, :n], batch["labels"][i : i + 1, :n]) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("checkpointing", ["off", pytest.param("on", marks=pytest.mark.more)])
@pytest.mark.parametrize("family", LIKE_MIXTRAL)
def test_each_step_is_that_of_plain_transformers_and_peft(family, checkpointing, tmp_path):
    base = mixture(family, tmp_path / "base")
    steady = {"use_4bit": "no", "dtype": "float32", "max_steps": 4, "max_grad_norm": 0.5}
    sizes = {"micro_batch_tokens": 192, "tokens_per_step": 384, "gradient_checkpointing": checkpointing}
    chosen = settings_of(family, tmp_path / "run", base, **steady, **sizes)
    small = prepare(chosen)
    initial = initial_adapter(small.model)
    ours, steps = train_recorded(small.trainer)
    documents = [[document for batch in batches for document in rows_of(batch)] for batches in steps]
    tensors = sorted(small.model.peft_config["default"].target_parameters)
    plain = plain_steps(base, documents, initial, chosen, tensors)
    print(f"\n{family}: " + "; ".join(f"{a[0]:.6f} / {b[0]:.6f}" for a, b in zip(ours, plain, strict=True)))
    assert len(ours) == 4 and any("experts" in name for name in initial)
    for (loss, norm), (plain_loss, plain_norm) in zip(ours, plain, strict=True):
        assert loss == pytest.approx(plain_loss, rel=1e-4)
        assert norm == pytest.approx(plain_norm, rel=2e-3)


@pytest.mark.parametrize("family", ["granitemoe", pytest.param("mixtral", marks=pytest.mark.more)])
def test_the_balance_of_routers_is_no_part_of_either_loss(family, tmp_path):
    """Of a base whose configuration asks for router logits too; TRL cannot weigh those of Granite."""
    base = tiny_base_of(family, tmp_path / "base", output_router_logits=True, router_aux_loss_coef=0.5)
    training.train(prepare(small_settings(tmp_path / "sft", base, max_steps=1)).trainer)
    tuned = prepare_preference(preference_settings(finetuned_folder(tmp_path / "dpo", base), base, max_steps=1))
    training.train(tuned.trainer)
    (entry,) = [entry for entry in Metrics(tuned.settings.folders.metrics).read() if "loss" in entry]
    assert entry["loss"] == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("family", LIKE_MIXTRAL)
def test_it_is_checked_trained_resumed_and_merged_into_either_base(family, tmp_path):
    """Stopped and resumed twice, the adapter is that of an undisturbed run; the merged folder is the trained model."""
    base = mixture(family, tmp_path / "base")
    for folder, lengths in {"at once": [6], "thrice": [2, 4, 6]}.items():
        for steps in lengths:
            small = prepare(settings_of(family, tmp_path / folder, base, max_steps=steps))
            if steps == lengths[0]:
                selfcheck.run(small.trainer)
                before = scoreboard.held_out_loss(small.model, small.held_out, small.template)
            training.train(small.trainer)
            training.save_adapter(small.trainer)
    assert digest(tmp_path / "at once" / "adapter") == digest(tmp_path / "thrice" / "adapter")
    assert {p.dtype for p in small.model.parameters() if p.requires_grad} == {torch.float32}
    after = scoreboard.held_out_loss(small.model, small.held_out, small.template)
    quantised = merging.quantised_names(small.model)
    for carrier in ("dequantized", "original"):
        plan = dataclasses.replace(small.plan, settings=dataclasses.replace(small.settings, merge_base=carrier))
        made = verify.merge_and_verify(plan, quantised, small.template, small.held_out, after)
        print(f"\n{made.checks.to_string()}")
        assert made.checks.passed.all()
    assert after < before


def trained_exactly(family, folder):
    """A run in float32 whose adapters were moved far, so that what is merged wrongly is seen at once."""
    chosen = {"use_4bit": "no", "dtype": "float32", "max_steps": 3, "learning_rate": 0.05, "max_grad_norm": 0.0}
    small = prepare(settings_of(family, folder / "run", mixture(family, folder / "base"), **chosen))
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    return small


@pytest.mark.parametrize("family", LIKE_MIXTRAL)
def test_a_checkpoint_is_changed_as_peft_merges_it(family, tmp_path):
    """Expert by expert under the names of the checkpoint, against PEFT's merge that plain transformers saves."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    small = trained_exactly(family, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, small.settings.folders.adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    theirs, weights = load_file(tmp_path / "theirs" / "model.safetensors"), merging.Weights(tmp_path / "base")
    adapter = merging.read_adapter(small.settings.folders.adapter, weights)
    changed = {name for name in weights.names() if not torch.equal(theirs[name], weights.read(name))}
    assert changed == adapter.names - adapter.experts.silent()
    assert any("experts" in name or "moe" in name for name in changed)
    for name in changed:
        ours = adapter.merged(name, weights.read(name))
        torch.testing.assert_close(ours, theirs[name], rtol=1e-5, atol=1e-6)


def test_an_expert_that_no_token_came_to_is_not_asked_to_change(tmp_path):
    """The routers of a model that chooses the first two experts of eight for every token."""
    base = tiny_base_of("mixtral", tmp_path / "base", num_local_experts=8)
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if name.endswith("block_sparse_moe.gate.weight"):
            tensors[name][2:] = 0.0
            tensors[name][:2] = 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    small = prepare(settings_of("mixtral", tmp_path / "run", base, max_steps=3, learning_rate=0.02))
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    after = scoreboard.held_out_loss(small.model, small.held_out, small.template)
    weights = merging.Weights(base)
    silent = merging.read_adapter(small.settings.folders.adapter, weights).experts.silent()
    quantised = merging.quantised_names(small.model)
    made = verify.merge_and_verify(small.plan, quantised, small.template, small.held_out, after)
    assert made.checks.passed.all()
    assert 0 < len(silent) < 8 * 2 * 3
    written = merging.Weights(made.folder)
    for name in silent:
        assert torch.equal(written.read(name), weights.read(name).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lora_dropout": 0.1}, "experts get plain LoRA alone; set lora_dropout = 0"),
        ({"use_dora": True}, "set use_dora = False"),
        ({"init_lora_weights": "orthogonal", "use_4bit": "no"}, "set init_lora_weights = 'default'"),
        ({"compile_layers": "yes"}, "set compile_layers = 'no'"),
    ],
)
def test_what_experts_cannot_have_is_said_by_the_settings(changed, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        small_settings(tmp_path, "m", **PLAIN | changed)


@pytest.mark.parametrize("changed", [{"use_rslora": True}, {"loraplus_lr_ratio": 8.0}, {"use_4bit": "no"}])
@pytest.mark.more
def test_other_kinds_of_plain_lora_are_merged_right(changed, tmp_path):
    small = prepare(
        settings_of("mixtral", tmp_path / "run", mixture("mixtral", tmp_path / "base"), max_steps=4, **changed)
    )
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    after = scoreboard.held_out_loss(small.model, small.held_out, small.template)
    quantised = merging.quantised_names(small.model)
    assert verify.merge_and_verify(small.plan, quantised, small.template, small.held_out, after).checks.passed.all()


def test_preference_tuning_does_not_start_from_an_adapter_of_experts(tmp_path):
    """TRL makes no copy of such an adapter for the reference, which would be the base then."""
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_parameters": ["a.experts.down_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has target_parameters: plain LoRA is what can be trained further here"):
        preference_start.from_adapter(preference_settings(tmp_path, "m"))


def plan_of(base, folder, **changed):
    chosen = settings_of("mixtral", folder / "run", base, **changed)
    inputs = encode_inputs(chosen, models.tokenizer(str(base)), small_pairs(), small_pairs())
    return planning.plan_run(chosen, inputs)


def test_a_model_without_experts_is_refused_before_it_is_loaded(tiny_base, tmp_path):
    with pytest.raises(ValueError, match="phi has no experts .*leave 'experts' out"):
        plan_of(tiny_base, tmp_path)
    convolutions = tiny_base_of("lfm2", tmp_path / "base")
    with pytest.raises(ValueError, match="lfm2 has no experts .*leave 'experts' out"):
        plan_of(convolutions, tmp_path)


@pytest.mark.parametrize("given", ["all-linear", "q_proj, gate_proj"])
def test_linear_layers_that_peft_takes_for_experts_are_refused_by_name(given, tmp_path):
    """In GLM 4.5 the first layers are dense; PEFT would adapt the experts of the others in their place."""
    small = {"num_key_value_heads": 1, "head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    base = tiny_base_of("glm4_moe", tmp_path / "base", **small, moe_intermediate_size=32, first_k_dense_replace=1)
    with pytest.raises(ValueError, match="PEFT takes .*gate_proj.* of glm4_moe .*set lora_target_modules = '.*q_proj"):
        plan_of(base, tmp_path, lora_target_modules=given)
    assert plan_of(base, tmp_path, lora_target_modules="q_proj, v_proj").size.adapter > 0


def test_a_checkpoint_that_lacks_an_expert_is_refused_before_it_is_loaded(tmp_path):
    base = mixture("mixtral", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 of .* linear layers and experts .*model.layers.1.mlp.experts.down_proj"):
        plan_of(base, tmp_path)


def test_the_plan_says_that_experts_are_adapted(tmp_path):
    plan = plan_of(mixture("mixtral", tmp_path / "base"), tmp_path)
    lines = dict(plan.table().itertuples(index=False))
    assert lines["experts: not in 4 bits, adapted"] == f"{plan.size.experts / plan.size.total:.0%} of the weights"


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("bits", ["yes", pytest.param("no", marks=pytest.mark.more)])
def test_the_predicted_memory_is_what_a_step_keeps_alive(checkpointing, bits, tmp_path, monkeypatch):
    """The copy of the experts that PEFT makes is the largest part of it; counted on fake tensors as on a GPU."""
    config = MixtralConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=8,
    )
    sizes = {"max_seq_length": 1024, "tokens_per_step": 4096, "micro_batch_tokens": 4096, "lora_r": 16}
    chosen = small_settings(tmp_path, "m", **PLAIN | sizes, use_4bit=bits, gradient_checkpointing=checkpointing)
    machine = Machine("cuda:0", "A100", (8, 0), 79 * GIB, 79 * GIB, 12 * GIB, 2, 250e12, True)
    plan = planning.plan(chosen, machine, config, [400] * 1000)
    predicted = plan.peak_memory - plan.memory["process"]
    found = dry_run.peak_bytes(chosen, plan, config, monkeypatch)
    print(f"\n{predicted / GIB:.2f} GiB predicted, {found / GIB:.2f} GiB alive")
    keeps_more = checkpointing == "on" and Version(transformers.__version__) < Version("5.23")
    assert predicted == pytest.approx(found, rel=0.1 if keeps_more else 0.05)


def test_a_sharded_mixture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="this model is sharded; leave 'experts' out"):
        plan_of(mixture("mixtral", tmp_path / "base"), tmp_path)


def test_the_adapter_is_no_gguf_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_parameters": ["a.experts.down_proj"]}))
    said = gguf.convert_adapter(tmp_path, tmp_path, tmp_path / "adapter.gguf")
    assert said == ["adapter.gguf was left out: llama.cpp knows no adapters of experts. The merged model holds it"]
