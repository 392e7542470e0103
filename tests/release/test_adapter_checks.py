"""Adapters that are not what their configuration says, and bases laid out in unusual ways, before and after a merge."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from inference_fixtures import make_model, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from training_fixtures import save_base, small_settings
from transformers import AutoModelForCausalLM

from llm_finetuning.files import shards
from llm_finetuning.release import merging

FC1 = "base_model.model.model.layers.0.mlp.fc1"
VERSION_0_13 = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "microsoft/phi-2",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["fc1", "q_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
"""adapter_config.json as PEFT 0.13 writes it."""
VERSION_0_4 = {
    name: VERSION_0_13[name]
    for name in ("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode")
    + ("init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save")
    + ("peft_type", "r", "revision", "target_modules", "task_type")
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    tokenizer = make_tokenizer()
    return save_base(tmp_path_factory.mktemp("base"), make_model(rows=(len(tokenizer) // 64 + 1) * 64), tokenizer)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    """An adapter with factors that are not zero, as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "fc1"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def configure(adapter: Path, **changed) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def change(adapter: Path, edit) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """Merges into the original base, as the notebook does."""
    weights, read = shards.Weights(base), merging.read_adapter(adapter)
    settings = small_settings(folder, base)
    merging.write_merged(
        merging.Merge("original", settings, torch.float32, torch.bfloat16, "cpu", weights, read, set(read.factors)),
        folder,
    )
    shutil.copy(base / "config.json", folder)
    return folder


def by_peft(base: Path, adapter: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def same(folder: Path, base: Path, adapter: Path) -> bool:
    """Whether every parameter is PEFT's merge, to a step of bfloat16."""
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    expected = by_peft(base, adapter).state_dict()
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[n], t, rtol=2**-7, atol=1e-6) for n, t in expected.items())


@pytest.mark.parametrize("changed", [{}, {"lora_alpha": -8}, {"lora_alpha": 0.5}, {"use_rslora": True}])
def test_what_was_trained_is_merged_whatever_its_scale(changed, adapter, base, tmp_path):
    configure(adapter, **changed)
    assert same(merged(base, adapter, tmp_path / "merged"), base, adapter)


@pytest.mark.parametrize("config", [VERSION_0_13, VERSION_0_4])
def test_an_adapter_of_an_older_peft_is_merged(config, adapter, base, tmp_path):
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert same(merged(base, adapter, tmp_path / "merged"), base, adapter)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lora_alpha": 0}, "lora_alpha is 0, by which nothing"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"r": 0}, "r is 0, and a rank is a whole number above 0"),
        ({"r": -4}, "r is -4"),
        ({"r": 4.5}, "r is 4.5"),
        ({"r": True}, "r is True"),
        ({"r": 8}, r"factors of the shapes \[4, .* and r is 8"),
        ({"rank_pattern": {"fc1": -2}}, "rank_pattern"),
        ({"alpha_pattern": {"fc1": 0}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias = lora_only"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"peft_type": "LOHA"}, "found LOHA"),
    ],
)
def test_a_configuration_that_cannot_be_merged_is_refused_in_words(changed, words, adapter):
    configure(adapter, **changed)
    with pytest.raises(ValueError, match=words):
        merging.read_adapter(adapter)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null", '"LORA"'])
def test_a_configuration_that_is_none_is_refused_in_words(text, adapter):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json"):
        merging.read_adapter(adapter)


def put(key: str, *shape: int):
    return lambda tensors: tensors.update({key: torch.ones(*shape)})


def fill(part: str, value: float):
    def edit(tensors):
        tensors[f"{FC1}.{part}.weight"][1, 2] = value

    return edit


def transposed(tensors):
    for name in (f"{FC1}.lora_A.weight", f"{FC1}.lora_B.weight"):
        tensors[name] = tensors[name].t()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("base_model.model.lm_head.weight", 5, 5), "lm_head.weight, which is no factor of LoRA"),
        (put(f"{FC1}.bias", 5), "fc1.bias, which is no factor"),
        (put(f"{FC1}.lora_B.bias", 5), "lora_B.bias, which is no factor"),
        (put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 5), "lora_embedding_A, which is no factor"),
        (put(f"{FC1}.lora_diag", 4), "lora_diag, which is no factor"),
        (put(f"{FC1}.lora_A.other.weight", 4, 160), "two adapters"),
        (put("base_model.model.model.layers.1.mlp.fc2.lora_A.weight", 4, 5), "fc2.weight holds A, and needs A, B"),
        (lambda tensors: tensors.pop(f"{FC1}.lora_B.weight"), "fc1.weight holds A, and needs A, B"),
        (lambda tensors: tensors.clear(), "an adapter without tensors"),
        (fill("lora_A", math.nan), "lora_A of .*fc1.weight holds numbers that are not finite"),
        (fill("lora_B", -math.inf), "lora_B of .*fc1.weight holds numbers that are not finite"),
        (transposed, "factors of the shapes"),
    ],
)
def test_tensors_that_are_not_an_adapter_s_are_refused_in_words(edit, words, adapter):
    change(adapter, edit)
    with pytest.raises(ValueError, match=words):
        merging.read_adapter(adapter)


def wider(tensors):
    tensors[f"{FC1}.lora_A.weight"] = torch.ones(4, 161)


def one_row(tensors):
    """A product that torch would broadcast over the whole weight."""
    tensors[f"{FC1}.lora_B.weight"] = torch.ones(1, 4)


@pytest.mark.parametrize("edit", [wider, one_row])
def test_an_adapter_in_another_shape_than_the_base_is_refused(edit, adapter, base, tmp_path):
    change(adapter, edit)
    with pytest.raises(ValueError, match=r"fc1.weight is \[\d+, 160\], and the adapter's product .*of another model"):
        merged(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("stored", ["one tensor", "both, in two shards", "one in two shards"])
def test_tied_embeddings_are_merged_however_they_are_stored(stored, adapter, tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(rows=(len(tokenizer) // 64 + 1) * 64)
    config = model.config
    config.tie_word_embeddings = True
    torch.manual_seed(5)
    base = save_base(tmp_path / "base", AutoModelForCausalLM.from_config(config).to(torch.bfloat16), tokenizer)
    if stored != "one tensor":
        tensors = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        embedding = tensors.pop("model.embed_tokens.weight")
        other = "lm_head.weight" if stored.startswith("both") else "model.embed_tokens.weight"
        first, second = {"model.embed_tokens.weight": embedding}, tensors | {other: embedding.clone()}
        places = dict.fromkeys(second, "model-00002-of-00002.safetensors")
        places |= dict.fromkeys(first, "model-00001-of-00002.safetensors")
        for file, content in zip(sorted(set(places.values())), (first, second), strict=True):
            save_file(content, base / file, metadata={"format": "pt"})
        (base / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert same(merged(base, adapter, tmp_path / "merged"), base, adapter)


def test_a_base_is_split_at_the_limit_and_a_larger_tensor_gets_a_shard_of_its_own(adapter, base, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_BYTES", 150_000)
    folder = merged(base, adapter, tmp_path / "merged")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 5
    for file in files:
        assert file.stat().st_size < 155_000 or len(load_file(file)) == 1
    assert same(folder, base, adapter)
