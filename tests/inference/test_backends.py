"""The backends agree with one another, and the fastest is measured once and cached."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from inference_fixtures import NUMBERS, ask, make_model, make_tokenizer, pairs, teach, write_folder
from transformers import AutoConfig

from llm_finetuning import hardware, models, prompts
from llm_finetuning.inference import autotune, engines, llama, nf4
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.prompts import question

ROOM = SamplingParameters(max_new_tokens=80)
needs_nf4 = pytest.mark.skipif(not nf4.available(), reason="NF4 on a CPU needs bitsandbytes and AVX512-BF16")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A published model whose shapes the NF4 kernel takes: hidden 320, four heads of 80."""
    tokenizer = make_tokenizer()
    template = prompts.template_for(tokenizer)
    model = make_model(rows=448, hidden=320)
    teach(model, template, steps=80)
    return write_folder(tmp_path_factory.mktemp("wide") / "finetuned_phi2", model, tokenizer)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm_finetuning"


@needs_nf4
def test_nf4_is_bitsandbytes_nf4():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight = torch.randn(96, 128).bfloat16()
    theirs = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=False, module=theirs
    )
    theirs = theirs.to("cpu").eval()
    ours = nf4.PackedLinear(96, 128, bias=False)
    ours.packed, ours.scales = nf4.pack(weight)
    x = torch.randn(5, 128).bfloat16()
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))
        assert (ours(x) - x @ weight.T).norm() / (x @ weight.T).norm() < 0.15


def test_the_head_in_int8_is_close():
    torch.manual_seed(0)
    weight, x = torch.randn(448, 320), torch.randn(3, 320)
    head = nf4.Int8Linear(448, 320, bias=False)
    head.packed, head.scales = nf4.int8(weight)
    with torch.inference_mode():
        error = (head(x.bfloat16()).float() - x @ weight.T).norm() / (x @ weight.T).norm()
    assert error < 0.02


@needs_nf4
def test_nf4_answers_alike_and_is_read_from_the_cache_the_second_time(wide, cache):
    asked = [question(pair) for pair in pairs()]
    exact = Chat.load(wide, "float32").answer_batch(asked, ROOM)
    first = Chat.load(wide, "nf4")
    layers = [m for m in first.engine.model.modules() if isinstance(m, nf4.PackedLinear)]
    assert len(layers) == 12
    answers = first.answer_batch(asked, ROOM)
    assert sum(a == b for a, b in zip(answers, exact, strict=True)) >= len(exact) - 2
    (packed,) = cache.glob("*/nf4.safetensors")
    before = packed.stat().st_mtime_ns
    second = Chat.load(wide, "nf4")
    assert second.answer_batch(asked, ROOM) == answers
    assert packed.stat().st_mtime_ns == before


@needs_nf4
def test_shapes_that_the_kernel_does_not_take_stay_as_they_are(published):
    assert Chat.load(published, "nf4").answer(ask("Count."), ROOM) == NUMBERS


def test_sixteen_bits_answer_alike(published):
    assert Chat.load(published, "bfloat16").answer(ask("Count."), ROOM) == NUMBERS


def test_a_small_model_runs_in_32_bits_unmeasured(published, cache):
    assert Chat.load(published).engine.name.startswith("float32")
    assert not cache.exists()


def test_the_fastest_backend_is_measured_once_and_cached(wide, cache, monkeypatch):
    monkeypatch.setattr(hardware, "SMALL", 0)
    config = models.one_kernel_gelu(AutoConfig.from_pretrained(wide))
    first = autotune.fastest(wide, config)
    (file,) = cache.glob("*/choice.json")
    measured = json.loads(file.read_text())["measured"]
    assert first.tokens_per_second == max(m["tokens_per_second"] for m in measured)
    assert {"bfloat16", "float32"} <= {m["backend"] for m in measured}
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("measured again"))
    assert autotune.fastest(wide, config) == first


def test_another_machine_or_model_is_measured_again(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "SMALL", 0)
    config = models.one_kernel_gelu(AutoConfig.from_pretrained(wide))
    autotune.fastest(wide, config)
    timings = [autotune.Timing("float32", 1, 9.0)]
    monkeypatch.setattr(autotune, "measure", lambda *_: timings)
    monkeypatch.setattr(hardware, "cpu_name", lambda: "another CPU")
    assert autotune.fastest(wide, config) == timings[0]


def test_a_cache_that_cannot_be_written_only_costs_time(wide, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(hardware, "SMALL", 0)
    monkeypatch.setattr(autotune, "measure", lambda *_: [autotune.Timing("float32", 1, 9.0)])
    assert autotune.fastest(wide, models.one_kernel_gelu(AutoConfig.from_pretrained(wide))).backend == "float32"
    assert "cannot be written" in capsys.readouterr().out


def test_llama_cpp_without_its_file_says_what_to_do(published):
    with pytest.raises(ValueError, match="make gguf MODEL="):
        Chat.load(published, "llama.cpp")


def test_a_gguf_file_older_than_the_model_is_left_alone(published, tmp_path, monkeypatch):
    folder = shutil.copytree(published, tmp_path / "model")
    gguf = tmp_path / "model-gguf" / "model-Q4_K_M.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"x")
    monkeypatch.setattr(llama, "find_spec", lambda name: True)
    assert llama.file_beside(folder) == gguf
    os.utime(gguf, (1, 1))
    assert llama.file_beside(folder) is None


def test_what_two_prompts_have_in_common():
    assert engines.common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert engines.common_prefix([], [1]) == 0
    assert engines.common_prefix([1, 2], [1, 2, 3]) == 2
