"""The backends agree with one another, and the fastest is measured once and cached."""

import ctypes
import json
import os
import shutil
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from inference_fixtures import NUMBERS, ask, make_model, make_tokenizer, pairs, teach, write_folder
from transformers import AutoConfig, PhiConfig, PhiForCausalLM

from llm_finetuning import hardware, models, prompts
from llm_finetuning.inference import autotune, engines, int8, llama, llama_kernels, nf4
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


def int8_layer(weight: torch.Tensor) -> int8.Int8Linear:
    layer = int8.Int8Linear(*weight.shape, bias=False)
    layer.packed, layer.scales = int8.quantise(weight)
    return layer


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [1, 3, int8.MANY - 1, int8.MANY, 33, 200])
@pytest.mark.parametrize(("out_features", "in_features"), [(448, 320), (96, 64), (33, 80), (1, 16)])
def test_int8_is_close_for_one_token_and_for_many(rows, out_features, in_features):
    torch.manual_seed(0)
    weight, x = torch.randn(out_features, in_features), torch.randn(rows, in_features).bfloat16()
    with torch.inference_mode():
        assert relative_error(int8_layer(weight)(x), x.float() @ weight.T) < 0.02


def test_a_head_whose_width_the_kernel_does_not_take_stays_in_16_bits():
    """Of a width that is no multiple of 16 torch's kernel returns wrong numbers, or ends the process."""
    config = PhiConfig(hidden_size=72, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    model = PhiForCausalLM(config).bfloat16().eval()
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        exact = model(input_ids=ids).logits
        assert torch.equal(nf4.convert(model)(input_ids=ids).logits, exact)


def test_integers_lose_nothing_beside_an_outlier():
    """One activation of a thousand times the others would leave one int8 nothing but zeros for them."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 320), torch.randn(40, 320)
    x[:, 7], weight[:, 7] = 1000, 0
    layer = int8_layer(weight)
    rounded = layer.packed * layer.scales.float()[:, None]
    assert relative_error(int8.integer_product(x, layer.packed, layer.scales), x @ rounded.T) < 0.01


def test_rows_of_zeros_and_huge_or_tiny_activations_stay_finite_and_right():
    torch.manual_seed(0)
    weight, x = torch.randn(64, 320), torch.randn(4, 320) * torch.tensor([[0.0], [1e-20], [1.0], [1e20]])
    layer = int8_layer(weight)
    rounded = layer.packed * layer.scales.float()[:, None]
    y, exact = int8.integer_product(x, layer.packed, layer.scales), x @ rounded.T
    assert torch.equal(y[0], torch.zeros(64))
    assert all(relative_error(line, right) < 1e-3 for line, right in zip(y[1:], exact[1:], strict=True))


@needs_nf4
def test_the_prefill_in_int8_answers_alike_and_is_read_from_its_own_cache(wide, cache):
    asked = [question(pair) for pair in pairs()]
    exact = Chat.load(wide, "float32").answer_batch(asked, ROOM)
    chat = Chat.load(wide, "nf4+int8")
    answers = chat.answer_batch(asked, ROOM)
    assert sum(a == b for a, b in zip(answers, exact, strict=True)) >= len(exact) - 2
    assert [file.name for file in cache.glob("*/*.safetensors")] == ["nf4+int8.safetensors"]
    assert Chat.load(wide, "nf4+int8").answer_batch(asked, ROOM) == answers


@needs_nf4
def test_int8_computes_the_prompt_and_nf4_the_tokens_after_it(wide):
    """The logits after the prompt are nearer to the exact ones than NF4's; a single token's are NF4's to the bit."""
    prompt = torch.arange(5, 5 + 4 * int8.MANY)[None]
    models = {name: Chat.load(wide, name).engine.model for name in ("float32", "nf4", "nf4+int8")}
    with torch.inference_mode():
        exact, nf4_only, both = (model(input_ids=prompt, logits_to_keep=1).logits[0, -1] for model in models.values())
        one = [models[name](input_ids=prompt[:, :1]).logits for name in ("nf4", "nf4+int8")]
    assert relative_error(both, exact) < relative_error(nf4_only, exact) / 2
    assert torch.equal(*one)


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
    assert {m["backend"] for m in measured} >= ({"nf4", "nf4+int8"} if nf4.available() else set())
    assert {"bfloat16", "float32"} <= {m["backend"] for m in measured}
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("measured again"))
    assert autotune.fastest(wide, config) == first


def test_a_slow_prefill_counts_as_the_answer_waits_for_it():
    quick_tokens, quick_prefill = (autotune._timing("x", 1, *seconds) for seconds in [(4.5, 0.06), (0.5, 0.07)])
    assert quick_prefill.tokens_per_second > quick_tokens.tokens_per_second
    assert autotune._timing("x", 1, 1.0, 0.0).tokens_per_second == autotune.ANSWER


def test_weights_in_int8_too_are_left_out_where_memory_is_small(wide, monkeypatch):
    config = models.one_kernel_gelu(AutoConfig.from_pretrained(wide))
    room = models.count_parameters(config) * 1.5 / 0.8
    monkeypatch.setattr(hardware, "host_memory", lambda: room)
    monkeypatch.setattr(nf4, "available", lambda: True)
    monkeypatch.setattr(autotune, "_measure_torch", lambda backend, *_: [autotune.Timing(backend, 1)])
    assert [timing.backend for timing in autotune.measure(wide, config, [1])] == ["nf4"]


def test_another_machine_or_model_is_measured_again(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "SMALL", 0)
    config = models.one_kernel_gelu(AutoConfig.from_pretrained(wide))
    monkeypatch.setattr(autotune, "measure", lambda *_: [autotune.Timing("bfloat16", 1, 5.0)])
    assert autotune.fastest(wide, config).backend == "bfloat16"
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


@pytest.mark.parametrize("amx, kinds", [(True, ("Q4_0", "Q4_K_M")), (False, ("Q4_K_M", "Q4_0"))])
def test_a_gguf_file_older_than_the_model_is_left_alone(published, tmp_path, monkeypatch, amx, kinds):
    folder = shutil.copytree(published, tmp_path / "model")
    first, second = (tmp_path / "model-gguf" / f"model-{kind}.gguf" for kind in kinds)
    first.parent.mkdir()
    for file in (first, second):
        file.write_bytes(b"x")
    monkeypatch.setattr(llama, "find_spec", lambda name: True)
    monkeypatch.setattr(llama, "amx_runs", lambda: amx)
    assert llama.file_beside(folder) == first
    os.utime(first, (1, 1))
    assert llama.file_beside(folder) == second
    os.utime(second, (1, 1))
    assert llama.file_beside(folder) is None


class Llama:
    """llama_cpp's model as far as a session uses it, with a memory that cannot be cut, and that fails when asked to."""

    def __init__(self) -> None:
        self.input_ids, self.n_tokens, self.fed, self.fails = np.array([1, 2, 3, 4]), 4, [], False
        self._ctx = SimpleNamespace(
            kv_cache_seq_rm=lambda *place: False, get_logits=lambda: (ctypes.c_float * 8)(*range(8))
        )

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, ids: list[int]) -> None:
        if self.fails:
            raise KeyboardInterrupt
        self.fed.append((self.n_tokens, ids))


def test_a_session_of_llama_cpp_that_cannot_begin_keeps_nobody_waiting():
    engine = SimpleNamespace(llama=Llama(), vocab_size=8, lock=threading.Lock())
    engine.llama.fails = True
    with pytest.raises(KeyboardInterrupt):
        llama.LlamaSession(engine, [1, 2, 5])
    assert not engine.lock.locked()
    engine.llama.fails = False
    llama.LlamaSession(engine, [1, 2, 5]).close()
    assert engine.llama.fed == [(0, [1, 2, 5])]  # a state that runs along is begun anew


def test_packed_weights_that_cannot_be_kept_only_cost_time(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    nf4._write_packed(torch.nn.Linear(2, 2), tmp_path / "file" / "cache" / "nf4.safetensors")
    assert "packed again next time" in capsys.readouterr().out


def test_what_two_prompts_have_in_common():
    assert engines.common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert engines.common_prefix([], [1]) == 0
    assert engines.common_prefix([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize(
    ("shown", "compiled", "repacked"),
    [
        (b"AVX512 = 1 | AMX_INT8 = 1 | ", "elsewhere", False),
        (b"AVX512 = 1 | AMX_INT8 = 1 | ", "here", True),
        (b"AVX512 = 1 | AMX_INT8 = 1 | ", "here, and replaced", False),
        (b"AVX2 = 1 | ", "elsewhere", True),
    ],
)
def test_llama_cpp_repacks_for_amx_only_where_it_was_compiled_for_that(
    shown, compiled, repacked, tmp_path, monkeypatch
):
    """Of other builds the kernels end the process."""
    file = tmp_path / "lib" / "libggml-cpu.so"
    file.parent.mkdir()
    file.write_bytes(b"machine code")
    monkeypatch.setattr(llama_kernels, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    if compiled != "elsewhere":
        llama_kernels.mark_build()
    if "replaced" in compiled:
        file.write_bytes(b"other machine code")
    library = ModuleType("library")
    library.llama_print_system_info = lambda: shown
    library.llama_model_default_params = lambda: SimpleNamespace(use_extra_bufts=True)
    with pytest.raises(RuntimeError, match="no such file"), llama_kernels.safe_kernels(library):
        assert library.llama_model_default_params().use_extra_bufts is repacked
        raise RuntimeError("no such file")
    assert library.llama_model_default_params().use_extra_bufts  # as others who load a model find it
