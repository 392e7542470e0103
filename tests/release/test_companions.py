"""A published folder answers alike under transformers 4 and 5: its configuration and tokenizer carry both names."""

import json
import re
from pathlib import Path

import old_transformers
import pytest
import read_folder
import torch
from families import tiny_base_of
from inference_fixtures import make_tokenizer
from published_bases import published
from tokenizers import AddedToken
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PhiConfig

from llm_finetuning import prompts
from llm_finetuning.release import companions

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.1] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 64}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 777777.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 4321.0},
}
ROTARY = {
    "llama": {"rope_type": "llama3", "rope_theta": 500000.0} | LLAMA3,
    "qwen2": {"rope_type": "default", "rope_theta": 4321.0},
    "gemma": {"rope_type": "default", "rope_theta": 777.0},
    "mistral": {"rope_type": "dynamic", "rope_theta": 4321.0, "factor": 4.0},
    "gpt_neox": {"rope_type": "default", "rope_theta": 4321.0, "partial_rotary_factor": 0.5},
    "stablelm": {"rope_type": "default", "rope_theta": 4321.0, "partial_rotary_factor": 0.75},
    "phi3": {"rope_type": "longrope", "rope_theta": 4321.0, "partial_rotary_factor": 1.0} | LONGROPE,
    "qwen3": {"rope_type": "yarn", "rope_theta": 4321.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "gemma3_text": GEMMA3,
    "gpt_oss": {"rope_type": "yarn", "rope_theta": 4321.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
    | {"original_max_position_embeddings": 64, "truncate": False},
}
"""Rotary settings that no version has as its default, so that what is not read shows."""
KNOWN_SINCE = {"gemma3_text": "4.50", "qwen3": "4.51", "gpt_oss": "4.55"}


def random_base(config, tokenizer, folder: Path) -> Path:
    """Random weights, large enough that no two words come close."""
    config.initializer_range = 0.2
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def family(name: str, made: Path) -> Path:
    base = tiny_base_of(name, made / "base" / name)
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = ROTARY[name]
    if name == "phi3":
        config.original_max_position_embeddings = 64
    return published(random_base(config, AutoTokenizer.from_pretrained(base), base), made / name)


def phi(tokenizer, made: Path, name: str) -> Path:
    config = PhiConfig(
        vocab_size=(len(tokenizer) // 64 + 1) * 64, hidden_size=160, intermediate_size=320, num_hidden_layers=2,
        num_attention_heads=2, partial_rotary_factor=0.4, rope_theta=4321.0, max_position_embeddings=256,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    base = random_base(config, tokenizer, made / "base" / name)
    return published(base, made / name, "Answer in one sentence.")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def folders(made, phi2_tokenizer_folder) -> list[Path]:
    own, real = make_tokenizer(), AutoTokenizer.from_pretrained(phi2_tokenizer_folder)
    return [
        phi(own, made, "phi"),
        phi(real, made, "phi2"),
        *(family(name, made) for name in ("llama", "qwen2", "gemma")),
    ]


@pytest.fixture(scope="module")
def here(folders) -> dict:
    """What this version of transformers reads and answers."""
    return {folder.name: read_folder.read(str(folder)) for folder in folders}


def assert_alike(found: dict, expected: dict) -> None:
    for name, values in found.items():
        assert [a["ids"] for a in values["answers"]] == [a["ids"] for a in expected[name]["answers"]], name
        assert [a["text"] for a in values["answers"]] == [a["text"] for a in expected[name]["answers"]], name
        a, b = torch.tensor(values["logits"]), torch.tensor(expected[name]["logits"])
        assert (a - b).norm() <= 1e-5 * b.norm(), name
        assert values["dtype"] == expected[name]["dtype"] == "torch.float32"


def test_version_4_gives_the_answers_of_version_5(folders, here):
    assert len(read_folder.PROMPTS) == 50
    assert len({tuple(a["ids"]) for a in here["phi2"]["answers"]}) == 50
    assert_alike(old_transformers.read_with("4.57.6", folders), here)


@pytest.mark.more
@pytest.mark.parametrize("version", ["4.49.0", "5.0.0"])
def test_other_versions_give_the_same_answers(folders, here, version):
    assert_alike(old_transformers.read_with(version, folders), here)


@pytest.mark.more
@pytest.mark.parametrize("version", ["4.49.0", "4.57.6"])
def test_families_whose_rotary_settings_moved_are_read_alike(made, tmp_path, version):
    names = [name for name in ROTARY if KNOWN_SINCE.get(name, "") <= version]
    folders = [made / name if (made / name).is_dir() else family(name, made) for name in names]
    assert_alike(old_transformers.read_with(version, folders), {f.name: read_folder.read(str(f)) for f in folders})


def test_an_answer_in_a_pipeline_begins_without_a_blank(here):
    for name in ("phi", "phi2"):
        first = here[name]["answers"][0]["text"]
        assert not here[name]["piped"].startswith(" ")
        assert here[name]["piped"] == re.sub(r"\A ", "", first.partition("<|endoftext|>")[0])


def test_a_template_without_that_blank_needs_no_response_template(folders):
    configs = {f.name: json.loads((f / "tokenizer_config.json").read_text()) for f in folders}
    assert [name for name, config in configs.items() if "response_template" in config] == ["phi", "phi2"]


def test_a_family_that_version_4_does_not_have_keeps_its_configuration(tmp_path):
    if "lfm3" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it either")
    config = AutoConfig.for_model("lfm3")
    companions.write_config(tmp_path, config)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_extra_special_tokens_are_those_of_the_tokenizer_in_both_versions(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|end|>", special=True), "<|user|>"]})
    template = prompts.template_for(tokenizer)
    companions.write_tokenizer(tmp_path, template)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_ids == tokenizer.all_special_ids
    text = "a<|user|>b<|end|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    code = "import sys, transformers as t; print(*t.AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2]).input_ids)"
    shown = old_transformers.run_with("4.57.6", ["-c", code, str(tmp_path), text])
    assert [int(word) for word in shown.split()] == tokenizer(text).input_ids


def test_the_sentencepiece_model_of_a_base_travels(made, tmp_path):
    base = tiny_base_of("llama", tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"pieces")
    folder = published(base, tmp_path / "published")
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
