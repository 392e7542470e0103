"""The merge and its verification: right when it is right, and refused when anything else changed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MIX_PACKED_EXAMPLES, tiny_base_of
from safetensors.torch import load_file, save_file
from training_fixtures import prepare, small_settings

from llm_finetuning.evaluation import scoreboard
from llm_finetuning.files import shards
from llm_finetuning.release import merging, verify
from llm_finetuning.training import qlora, selfcheck
from llm_finetuning.training import resumable as training


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A trained small run with its adapter saved, and the trained model's held-out loss."""
    small = prepare(small_settings(tmp_path_factory.mktemp("run"), tiny_base, num_train_epochs=4.0))
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    small.after = scoreboard.held_out_loss(small.trainer.model, small.held_out, small.template)
    small.quantised = merging.quantised_names(small.trainer.model)
    return small


def merge(small, **changed):
    chosen = small_settings(Path(small.settings.drive_folder), small.settings.model_name, **changed)
    args = (small.quantised, small.template, small.held_out, small.after)
    return verify.merge_and_verify(dataclasses.replace(small.plan, settings=chosen), *args)


def step_of(small, base, adapter) -> merging.Merge:
    plan, weights = small.plan, shards.Weights(Path(small.settings.model_name))
    return merging.Merge(
        base, small.settings, plan.dtype, plan.save_dtype, plan.device, weights, adapter, small.quantised
    )


@pytest.fixture(scope="module")
def merged(trained):
    return merge(trained)


def test_the_better_base_is_kept_and_verified(merged):
    assert set(merged.losses) == {"dequantized", "original"}
    assert merged.losses[merged.base] == min(merged.losses.values())
    assert merged.checks.passed.all()
    assert "12 of 12" in merged.checks.found.to_list()
    assert [p.name for p in merged.folder.parent.iterdir()] == [merged.base], "the other one was removed"


def test_the_folder_answers_with_plain_transformers(merged, trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert tokenizer.decode(ids[0]) == "Be brief.\nInstruct: Hi\nOutput:"
    made = model.generate(ids, max_new_tokens=4)
    assert made.shape[1] > ids.shape[1]
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert model.generation_config.suppress_tokens == list(range(len(tokenizer), model.config.vocab_size))


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_either_base_can_be_forced(trained, base, merged):
    made = merge(trained, merge_base=base)
    assert made.base == base and set(made.losses) == {base}


def test_merged_weights_are_the_sum_rounded_once(merged, trained):
    adapter = merging.read_adapter(trained.settings.folders.adapter)
    step = step_of(trained, merged.base, adapter)
    name = "model.layers.1.mlp.fc2.weight"
    a, b = adapter.factors[name]
    exact = step.start(name).double() + adapter.scaling * (b.double() @ a.double())
    found = shards.Weights(merged.folder).read(name)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_changes_survive_on_a_base_that_is_rounded_already(dtype):
    """A tenth of half a step is swallowed by rounding to the nearest; in the mean it must be there."""
    weight = torch.full((601, 501), 0.02).to(dtype)
    step = float(torch.nextafter(weight[0, 0], torch.tensor(1.0, dtype=dtype)) - weight[0, 0])
    factors = torch.full((1, 501), 0.05), torch.full((601, 1), step)
    adapter, silent = (merging.Adapter({"w": factors}, scaling) for scaling in (1.0, 0.0))
    assert torch.equal(adapter.merged("w", weight).to(dtype), weight), "nearest loses it all"
    found = merging.merge_tensor(adapter, "w", weight, dtype)
    assert (found.float() - weight.float()).mean().item() == pytest.approx(0.05 * step, rel=0.05)
    assert (found.float() - weight.float()).abs().max().item() <= step * 1.01
    assert torch.equal(found, merging.merge_tensor(adapter, "w", weight, dtype)), "the same merge twice"
    assert torch.equal(merging.merge_tensor(silent, "w", weight, dtype), weight)


def test_nf4_weights_are_those_the_layer_computes_with(trained):
    """`quantize_dequantize` equals what bitsandbytes holds in the trained model."""
    from bitsandbytes import functional

    layer = trained.trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    held = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weights = shards.Weights(Path(trained.settings.model_name))
    again = merging.quantize_dequantize(
        weights.read("model.layers.0.self_attn.q_proj.weight"), trained.settings, trained.plan.dtype
    )
    assert torch.equal(held, again)


def tampered(trained, monkeypatch, change):
    """A merge whose written folder is changed by `change(tensors)` before it is verified."""
    write = merging.write_merged

    def write_and_tamper(merge, folder):
        write(merge, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_merged", write_and_tamper)
    with pytest.raises(ValueError) as error:
        merge(trained, merge_base="original")
    return str(error.value)


def test_another_tensor_changed_is_found(trained, monkeypatch):
    def change(tensors):
        tensors["model.final_layernorm.bias"][3] += 1.0

    assert "model.final_layernorm.bias" in tampered(trained, monkeypatch, change)


def test_an_intended_tensor_left_out_is_found(trained, monkeypatch):
    def change(tensors):
        name = "model.layers.0.mlp.fc1.weight"
        base = shards.Weights(Path(trained.settings.model_name)).read(name)
        tensors[name] = base.to(torch.bfloat16)

    said = tampered(trained, monkeypatch, change)
    assert "11 of 12" in said and "nothing is published" in said


def test_broken_weights_never_pass(trained, monkeypatch):
    def change(tensors):
        tensors["model.layers.0.mlp.fc1.weight"].fill_(float("nan"))

    assert "logits" in tampered(trained, monkeypatch, change)


def test_a_missing_tensor_is_found(trained, monkeypatch):
    def change(tensors):
        del tensors["model.layers.1.self_attn.dense.weight"]

    assert "model.layers.1.self_attn.dense.weight" in tampered(trained, monkeypatch, change)


def test_an_adapter_of_another_model_is_refused(trained, tmp_path):
    adapter = merging.read_adapter(trained.settings.folders.adapter)
    adapter.factors["model.layers.9.mlp.fc1.weight"] = adapter.factors["model.layers.0.mlp.fc1.weight"]
    with pytest.raises(ValueError, match="layers.9.mlp.fc1.weight: this adapter is of another model"):
        merging.write_merged(step_of(trained, "original", adapter), tmp_path / "x")


def test_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        merging.read_adapter(tmp_path)


def test_an_adapter_that_is_not_plain_lora(trained, tmp_path):
    shutil.copytree(trained.settings.folders.adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        merging.read_adapter(tmp_path / "adapter")


def test_shards_are_split_and_indexed(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    shards.write_shards(tmp_path, shapes, torch.float32, tensors.get, 1000)
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3
    again = shards.Weights(tmp_path)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_file_is_what_safetensors_itself_writes_to_the_byte(dtype, tmp_path):
    made = {"a": torch.randn(7, 5), "bé": torch.randn(3, 8).T, "c": torch.tensor(1.5), "d": torch.zeros(0, 4)}
    tensors = {name: tensor.to(dtype) for name, tensor in made.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shards.write_shards(tmp_path, shapes, dtype, tensors.get, 10**6)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    with pytest.raises(ValueError, match="a is torch.float64"):
        shards.write_shards(tmp_path, shapes, dtype, lambda name: tensors[name].double(), 10**6)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.more) for name in FAMILIES if name != "llama")]
)
def test_another_model_family_trains_and_merges(family, tmp_path):
    """Nothing but `model_name` changes; a chat template that the tokenizer has is kept."""
    small = prepare(
        small_settings(
            tmp_path / "run",
            tiny_base_of(family, tmp_path / "base"),
            max_steps=3,
            packing=family not in MIX_PACKED_EXAMPLES,
        )
    )
    selfcheck.run(small.trainer)
    assert "[user] What" in small.template.tokenizer.decode(small.data.examples[1]["input_ids"])
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    after = scoreboard.held_out_loss(small.trainer.model, small.held_out, small.template)
    quantised = merging.quantised_names(small.trainer.model)
    made = verify.merge_and_verify(small.plan, quantised, small.template, small.held_out, after)
    assert made.checks.passed.all()


MIXTURES = {
    "gpt_oss": {"num_local_experts": 128, "num_experts_per_tok": 4},
    "mixtral": {"num_local_experts": 32, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 64, "num_experts_per_tok": 4},
}


@pytest.fixture(
    scope="module", params=["gpt_oss", *(pytest.param(f, marks=pytest.mark.more) for f in ("mixtral", "qwen2_moe"))]
)
def mixture(request, tmp_path_factory):
    """A trained run of a mixture of many experts, between which rounding chooses otherwise for some tokens."""
    folder, family = tmp_path_factory.mktemp("mixture"), request.param
    base = tiny_base_of(family, folder / "base", **MIXTURES[family])
    small = prepare(small_settings(folder / "run", base, max_steps=20, packing=family not in MIX_PACKED_EXAMPLES))
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    small.after = scoreboard.held_out_loss(small.trainer.model, small.held_out, small.template)
    small.quantised = merging.quantised_names(small.trainer.model)
    return small


@pytest.mark.parametrize("base", ["original", pytest.param("dequantized", marks=pytest.mark.more)])
def test_a_mixture_is_verified_although_rounding_chooses_other_experts(mixture, base):
    checks = merge(mixture, merge_base=base, packing=mixture.settings.packing).checks.set_index("check")
    print(f"\n{checks.to_string()}")
    chosen = checks.loc["experts that the merged model would choose otherwise"]
    flipped, of = (int(number.replace(",", "")) for number in chosen.found.split(" (")[0].split(" of "))
    assert checks.passed.all()
    assert 0 <= flipped < of / 2


def test_a_wrong_merge_of_one_layer_of_a_mixture_is_refused(mixture, monkeypatch):
    """The adapter of one tensor taken away instead of added: every tensor has changed, and only logits tell it."""
    name = "model.layers.1.self_attn.v_proj.weight"
    whole = merging.Adapter.merged

    def turned(adapter, tensor, weight, rows):
        merged = whole(adapter, tensor, weight, rows)
        return 2 * weight - merged if tensor == name else merged

    monkeypatch.setattr(merging.Adapter, "merged", turned)
    with pytest.raises(ValueError, match="logits, relative difference"):
        merge(mixture, merge_base="original", packing=mixture.settings.packing)


def test_the_same_experts_are_those_that_were_noted():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    with verify.Routing() as noted:
        torch.topk(scores, 2, dim=-1)
    with verify.Routing(noted.choices) as again:
        values, experts = scores.flip(0).topk(2, dim=-1)
    assert experts.tolist() == [[0, 1], [3, 2]] and values.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert (again.flipped, again.chosen) == (4, 4)


@pytest.mark.parametrize("family", MIX_PACKED_EXAMPLES)
def test_a_model_that_mixes_packed_examples_is_refused_by_name(family, tmp_path):
    small = prepare(small_settings(tmp_path / "run", tiny_base_of(family, tmp_path / "base"), max_steps=3))
    with pytest.raises(ValueError, match=f"in {family} packed examples are not isolated .*set packing = False"):
        selfcheck.run(small.trainer)


@pytest.mark.parametrize(
    ("family", "message"), [("gpt2", "gpt2 has no linear layers"), ("mamba", "incompatible with Mamba")]
)
def test_a_model_that_takes_no_adapters_is_refused_before_it_is_loaded(family, message, tmp_path, monkeypatch):
    base = tiny_base_of(family, tmp_path / "base")
    monkeypatch.setattr(qlora, "load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(ValueError, match=message):
        prepare(small_settings(tmp_path / "run", base))
