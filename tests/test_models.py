"""The bases that are made on the spot, and names that lead nowhere."""

import json
from fnmatch import fnmatch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_finetuning import models
from llm_finetuning.files import copying
from llm_finetuning.sample import making, phi, rehearsal

SHORT = phi.Recipe(documents=21, steps=2, rows=2, row_tokens=32)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return making.make_sample(tmp_path_factory.mktemp("base") / "sample", SHORT)


@pytest.fixture
def small_config():
    config = rehearsal.phi2_config(models.tokenizer("rehearsal"))
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 160, 640, 2
    config.num_attention_heads = config.num_key_value_heads = 2
    config.vocab_size = 1024
    return config


def test_the_same_recipe_gives_the_same_weights(sample, tmp_path):
    again = making.make_sample(tmp_path / "sample", SHORT)
    assert (again / "model.safetensors").read_bytes() == (sample / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (sample / "tokenizer.json").read_bytes()


def test_reading_changes_the_weights(sample, tmp_path):
    longer = making.make_sample(tmp_path / "sample", phi.Recipe(documents=21, steps=3, rows=2, row_tokens=32))
    assert (longer / "model.safetensors").read_bytes() != (sample / "model.safetensors").read_bytes()


def test_making_the_sample_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    making.make_sample(tmp_path / "sample", SHORT)
    assert torch.equal(torch.rand(3), expected)


def test_the_sample_is_a_small_phi(sample):
    config = AutoConfig.from_pretrained(sample)
    model = AutoModelForCausalLM.from_pretrained(sample)
    tokenizer = AutoTokenizer.from_pretrained(sample)
    assert type(model).__name__ == "PhiForCausalLM" and model.dtype == torch.float32
    assert config.hidden_size // config.num_attention_heads == 80
    assert config.rope_parameters["partial_rotary_factor"] == 0.4
    assert config.max_position_embeddings == 2048 and config.hidden_act == "gelu_new"
    assert config.vocab_size % 64 == 0 and config.vocab_size > len(tokenizer)
    assert config.eos_token_id == config.bos_token_id == tokenizer.eos_token_id
    assert 1e6 < model.num_parameters() < 3e6
    assert tokenizer("Mira").input_ids == models.tokenizer("sample")("Mira").input_ids


def test_what_is_there_is_kept_and_another_recipe_replaces_it(tmp_path):
    target = making.make_sample(tmp_path / "sample", SHORT)
    before = (target / "model.safetensors").stat()
    making.make_sample(target, SHORT)
    assert (target / "model.safetensors").stat() == before
    other = phi.Recipe(documents=21, steps=1, rows=2, row_tokens=32, heads=1)
    making.make_sample(target, other)
    assert AutoConfig.from_pretrained(target).num_attention_heads == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(phi, "pretrain", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        making.make_sample(tmp_path / "sample", SHORT)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_said_before_anything_is_made(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10**9})
    monkeypatch.setattr(copying.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"rehearsal needs 5\.61 GB, and .* has 1\.00 GB free"):
        models.locate("rehearsal", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_rehearsal_has_the_true_size():
    config = rehearsal.phi2_config(models.tokenizer("rehearsal"))
    shapes = rehearsal.weight_shapes(config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_779_683_840
    assert config.resid_pdrop == 0.1 and config.vocab_size == 51200
    assert shapes["lm_head.bias"] == (51200,)


def test_the_rehearsal_loads_from_its_shards(tmp_path, small_config, monkeypatch):
    monkeypatch.setattr(rehearsal, "SHARD_BYTES", 600_000)
    target = rehearsal.make_rehearsal(tmp_path / "rehearsal", models.tokenizer("rehearsal"), small_config)
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 650_000 for shard in shards)
    model, report = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.model.embed_tokens.weight.detach().float().std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.model.layers[1].input_layernorm.weight == 1).all() and (model.lm_head.bias == 0).all()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * model.num_parameters()


def test_the_rehearsal_takes_the_tokenizer_of_a_folder(tmp_path, small_config, phi2_tokenizer_folder):
    folder = str(phi2_tokenizer_folder)
    assert models.tokenizer("rehearsal", folder).eos_token_id == 50256
    assert rehearsal.phi2_config(models.tokenizer("rehearsal", folder)).eos_token_id == 50256
    with pytest.raises(ValueError, match="has 50295 tokens, .* only 1024 rows"):
        rehearsal.make_rehearsal(tmp_path / "rehearsal", models.tokenizer("rehearsal", folder), small_config)


def test_each_call_gives_a_tokenizer_of_its_own():
    models.tokenizer("sample").chat_template = "changed"
    assert models.tokenizer("sample").chat_template is None


def test_a_hub_id_is_fetched_at_its_revision_without_pickles_and_code(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "snapshots" / "0123abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = models.locate("microsoft/phi-2", tmp_path / "base", revision="v1")
    assert (asked["name"], asked["revision"]) == ("microsoft/phi-2", "v1")
    assert models.commit_of(found) == "0123abc"
    for name, wanted in {
        "model-00001-of-00002.safetensors": True,
        "tokenizer.json": True,
        "merges.txt": True,
        "pytorch_model.bin": False,
        "modeling_phi.py": False,
        "consolidated.safetensors": False,
    }.items():
        assert any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) == wanted, name


def test_only_a_snapshot_has_a_commit(sample):
    assert models.commit_of(sample) is None


def test_a_local_model_folder_is_used(sample, tmp_path):
    assert models.locate(str(sample), tmp_path) == sample
    assert models.tokenizer(str(sample)).eos_token == "<|endoftext|>"


def test_names_that_lead_nowhere(tmp_path):
    file = tmp_path / "model.bin"
    file.write_text("")
    with pytest.raises(ValueError, match="without a config.json"):
        models.locate(str(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        models.locate(str(file), tmp_path)
    for name in (str(tmp_path / "missing"), "./missing", "models/phi/two"):
        with pytest.raises(FileNotFoundError, match="missing|two"):
            models.locate(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer_folder"):
        models.tokenizer("sample", str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        models.tokenizer("sample", str(tmp_path))
    with pytest.raises(ValueError, match="its own tokenizer"):
        models.locate("sample", tmp_path, str(tmp_path))
