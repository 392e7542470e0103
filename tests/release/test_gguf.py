"""GGUF and Ollama, the optional extra. The tests of llama.cpp itself skip where `make gguf` was not run."""

import json
import re

import pytest
from transformers import AutoTokenizer

from llm_finetuning import prompts
from llm_finetuning.files import checksums
from llm_finetuning.release import gguf

EOS = "<|endoftext|>"


@pytest.fixture
def phi2_tokenizer(phi2_tokenizer_folder):
    return AutoTokenizer.from_pretrained(phi2_tokenizer_folder)


@pytest.fixture
def llama_cpp():
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: run `make gguf`")
    try:
        gguf.converter()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return library


def merged(folder, tokenizer, vocabulary: int):
    """A small Phi whose weights are large enough that no two words come close; in 16 bits, as a merge leaves it."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(1)
    config = PhiConfig(
        vocab_size=vocabulary, hidden_size=160, intermediate_size=640, num_hidden_layers=2, num_attention_heads=2,
        partial_rotary_factor=0.4, max_position_embeddings=256, initializer_range=0.15,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    PhiForCausalLM(config).to(torch.float16).save_pretrained(folder)
    prompts.template_for(tokenizer, "Answer in one sentence.")
    tokenizer.save_pretrained(folder)
    checksums.write_checksums(folder)
    return folder


def ollama(template: str, messages: list[dict], system: str) -> str:
    """Ollama's rendering of the few words of Go's template language that the Modelfile uses."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    body = re.fullmatch(r"{{ range .Messages }}(.*){{ end }}{{ end }}", template, re.S)[1]
    branches = re.split(r'{{ (?:else )?if eq .Role "(\w+)" }}', body)
    texts = dict(zip(branches[1::2], branches[2::2], strict=True))
    return "".join(texts[message["role"]].replace("{{ .Content }}", message["content"]) for message in messages)


def parts(modelfile: str) -> tuple[str, str]:
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.S)[1]
    system = re.search(r'SYSTEM """(.*?)"""', modelfile, re.S)
    return template, system[1] if system else ""


def saved(folder, tokenizer):
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    config = {"model_type": "phi", "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("system", ["", "Answer in one sentence.\nBe kind."])
def test_modelfile_makes_the_prompt_that_was_trained(tmp_path, phi2_tokenizer, system):
    prompts.template_for(phi2_tokenizer, system)
    modelfile = gguf.modelfile(saved(tmp_path / "m", phi2_tokenizer), "model.gguf")
    talk = [
        {"role": "user", "content": "Hello\nthere"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Why?"},
    ]
    for messages in (talk, talk[:1], [{"role": "system", "content": "Other."}, *talk]):
        expected = phi2_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ollama(*parts(modelfile)[:1], messages, parts(modelfile)[1]) == expected


def test_modelfile_stops_where_the_model_stops(tmp_path, phi2_tokenizer):
    prompts.template_for(phi2_tokenizer)
    lines = gguf.modelfile(saved(tmp_path / "m", phi2_tokenizer), "model.gguf").splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert f'PARAMETER stop "{EOS}"' in lines
    assert "PARAMETER num_ctx 2048" in lines
    assert not any(line.startswith("SYSTEM") for line in lines)


@pytest.mark.parametrize("system", ["", "Answer in one sentence."])
def test_modelfile_leaves_bos_to_llama_cpp(tmp_path, phi2_tokenizer, system):
    from tokenizers.processors import TemplateProcessing

    phi2_tokenizer.add_special_tokens({"bos_token": "<s>"})
    phi2_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", phi2_tokenizer.bos_token_id)]
    )
    prompts.template_for(phi2_tokenizer, system)
    modelfile = gguf.modelfile(saved(tmp_path / "m", phi2_tokenizer), "model.gguf")
    messages = [{"role": "user", "content": "Hello"}]
    expected = phi2_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<s>" + ollama(*parts(modelfile)[:1], messages, parts(modelfile)[1]) == expected


def test_other_chat_template_is_refused(tmp_path, phi2_tokenizer):
    phi2_tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="not Phi-2's format.*by hand"):
        gguf.modelfile(saved(tmp_path / "m", phi2_tokenizer), "model.gguf")


def test_without_llama_cpp_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setattr(gguf, "UNPACKED", tmp_path)
    with pytest.raises(FileNotFoundError, match="make gguf"):
        gguf.converter()


def test_damaged_folder_is_not_exported(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    checksums.write_checksums(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors is empty"):
        gguf.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exported_model_reads_and_answers_as_transformers_does(tmp_path, phi2_tokenizer, llama_cpp):
    folder = merged(tmp_path / "merged", phi2_tokenizer, 51200)
    files = gguf.export(folder, tmp_path / "gguf")
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == [
        "Modelfile", "model-Q4_K_M.gguf", "model-f16.gguf",
    ]  # fmt: skip
    assert files["Q4_K_M"].stat().st_size < 0.6 * files["f16"].stat().st_size
    text = f"Instruct: Wie heißt „Zürich“ auf 中文? 😀  two  spaces\nOutput: So.{EOS}"
    vocabulary = llama_cpp.Llama(str(files["f16"]), vocab_only=True, verbose=False)
    ids = vocabulary.tokenize(text.encode(), add_bos=False, special=True)
    vocabulary.close()
    assert ids == phi2_tokenizer(text).input_ids
    ours, theirs = gguf.smoke(folder, files["f16"])
    assert ours == theirs and ours.strip()
    assert gguf.answer(files["Q4_K_M"], phi2_tokenizer("Hello").input_ids, 4)


def test_tokenizer_that_llama_cpp_does_not_know(tmp_path, llama_cpp):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    own.train_from_iterator(["some words of a small world"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=EOS)
    folder = merged(tmp_path / "merged", tokenizer, 300)
    with pytest.raises(ValueError, match="does not know the tokenizer.*finetuned from microsoft/phi-2"):
        gguf.convert(folder, tmp_path / "model.gguf")
    assert list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*")) == []
