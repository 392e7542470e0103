"""GGUF files, the optional extra. The tests of llama.cpp itself skip where `make gguf` was not run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import hostile_templates
import pytest
import torch
from gguf_world import log_probabilities, merged, saved, sentencepiece_like
from inference_fixtures import make_tokenizer
from terminal_runs import wait_for
from tokenizers import pre_tokenizers
from training_fixtures import small_settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from llm_finetuning import settings
from llm_finetuning.files import checksums
from llm_finetuning.inference import llama_kernels
from llm_finetuning.release import gguf, gguf_checks, gguf_vocabulary, llama_cpp_tools, model_card, publish
from llm_finetuning.release.verify import Merged


def test_without_llama_cpp_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setattr(llama_cpp_tools, "UNPACKED", tmp_path)
    with pytest.raises(FileNotFoundError, match="make gguf"):
        llama_cpp_tools.converter()


def test_damaged_folder_is_not_exported(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    checksums.write_checksums(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["gguf", str(tmp_path)])
    with pytest.raises(ValueError, match="model.safetensors is empty"):
        gguf.main()
    assert not tmp_path.with_name(f"{tmp_path.name}-gguf").exists()


@pytest.mark.parametrize("name, text", [("modeling_x.py", ""), ("config.json", '{"auto_map": {"AutoConfig": "x.X"}}'),
                                        ("tokenizer_config.json", '{"auto_map": {}}')])  # fmt: skip
def test_a_folder_that_brings_code_is_refused_before_it_is_run(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} brings code"):
        gguf.export(tmp_path, tmp_path / "out", ["f16"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["loops in loops", "list times 10**9", "brackets", "no Jinja"])
def test_a_template_without_end_is_refused_before_anything_is_converted(tmp_path, monkeypatch, name):
    chat_template, words = hostile_templates.TEMPLATES[name]
    folder = saved(tmp_path / "merged", make_tokenizer())
    (folder / "chat_template.jinja").write_text(chat_template)
    monkeypatch.setattr(gguf, "convert", lambda *_: pytest.fail("the converter was started"))
    example = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    with pytest.raises(ValueError, match=f"the chat template of merged .*({words})"):
        gguf.export(folder, tmp_path / "out", ["f16"], [example])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"intermediate_size": 480}, "intermediate_size is 480 in place of 640"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "num_key_value_heads is 1 in place of 2"),
        ({"qk_layernorm": True}, "qk_layernorm is True in place of False"),
    ],
)
def test_a_phi_that_is_not_shaped_as_phi2_is_refused_before_it_is_converted(changed, words, tmp_path, monkeypatch):
    folder = saved(tmp_path / "merged", make_tokenizer())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    PhiConfig(**{"hidden_size": 160, "intermediate_size": 640} | changed).save_pretrained(folder)
    monkeypatch.setattr(gguf, "convert", lambda *_: pytest.fail("the converter was started"))
    with pytest.raises(ValueError, match=f"takes every Phi to be shaped as Phi-2 is, and here {words}"):
        gguf.export(folder, tmp_path / "out", ["f16"], [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    assert not (tmp_path / "out").exists()


def test_types_are_known_by_name_in_any_case_and_order():
    assert settings.gguf_types("q4_k_m, F16 ,Q8_0,Q4_K_M") == ["f16", "Q8_0", "Q4_K_M"]
    assert settings.gguf_types("") == []
    with pytest.raises(ValueError, match="'Q4' is no type.*Q4_K_M"):
        settings.gguf_types("f16,Q4")


def test_the_pre_tokenizer_is_named_by_its_structure(phi2_tokenizer_folder):
    def named(tokenizer) -> str | None:
        return gguf_vocabulary.pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))

    phi2, own = AutoTokenizer.from_pretrained(phi2_tokenizer_folder), make_tokenizer()
    assert named(phi2) == named(own) == "gpt-2"
    llama3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for contractions in ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"):
        for digits, name in (("{1,3}", "dbrx"), ("", "qwen2")):
            split = {"type": "Split", "pattern": {"Regex": contractions + llama3.replace("{1,3}", digits)}}
            steps = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}
            assert gguf_vocabulary.pre_tokenizer({"pre_tokenizer": steps, "model": {}}) == name
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert named(own) is None


def test_the_card_says_what_was_measured(tmp_path):
    row = {"type": "Q4_K_M", "bytes": 1_800_000_000, "tokens": 401, "kl": 0.0123, "top_1": 0.964, "loss": 1.5}
    exported = gguf.Exported(tmp_path, [row | {"reference_loss": 1.49}], 46, ["Modelfile: too clever."])
    model_card.write(tmp_path, {"base": "microsoft/phi-2", "gguf": exported})
    card = (tmp_path / "README.md").read_text()
    assert "| `model-Q4_K_M.gguf` | 1.80 GB | 0.012 | 96.4% | 1.5000 |" in card
    assert "46 texts" in card and "401 tokens" in card and "1.4900" in card and "Modelfile: too clever." in card
    assert "<|endoftext|>" in card and card.count("## GGUF files") == 1


class Plan:
    """What `publish` and `export_merged` ask of a plan."""

    device = "cpu"

    def __init__(self, folder: Path, types: str):
        self.settings = small_settings(folder / "drive", "sample", work_folder=str(folder / "work"), gguf=types)


def test_gguf_files_are_published_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "_facts", lambda *_: {"base": "microsoft/phi-2"})
    plan, made = Plan(tmp_path, "Q4_K_M"), tmp_path / "work" / "merged" / "original"
    for folder in (made, plan.settings.folders.adapter, plan.settings.folders.drive, tmp_path / "work" / "gguf"):
        folder.mkdir(parents=True)
    (made / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (made / "config.json").write_text("{}")
    (plan.settings.folders.adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "work" / "gguf" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    checksums.write_checksums(tmp_path / "work" / "gguf")
    row = {"type": "Q4_K_M", "bytes": 4, "tokens": 400, "kl": 0.01, "top_1": 0.9, "loss": 1.5, "reference_loss": 1.4}
    exported = gguf.Exported(tmp_path / "work" / "gguf", [row], 46)
    folder = publish.publish(Merged(made, "original", {}, None, None), plan, {}, [], exported)
    beside = folder.with_name("finetuned_phi2-gguf")
    assert (beside / "model-Q4_K_M.gguf").read_bytes() == b"GGUF"
    assert "model-Q4_K_M.gguf" in (folder / "README.md").read_text(encoding="utf-8")
    assert not exported.folder.exists()
    with pytest.raises(FileNotFoundError, match="run the notebook from its beginning"):  # the cell alone, once more
        publish.publish(Merged(made, "original", {}, None, None), plan, {}, [], exported)
    assert not made.exists() and (folder / "config.json").is_file()
    # the page takes a GGUF file only where it is not older than the model
    assert (beside / "model-Q4_K_M.gguf").stat().st_mtime >= (folder / checksums.NAME).stat().st_mtime
    checksums.verify_checksums(beside)
    assert "PreTrainedTokenizerFast" in (plan.settings.folders.drive / "adapter" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(("free", "device"), [(10**9, "cuda:0"), (10, "cpu")])
def test_the_reference_is_computed_where_it_fits(tmp_path, monkeypatch, free, device):
    """Trained in 4 bits on a small GPU: its 32 bits fit into no more than the host's memory."""
    asked = []
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    monkeypatch.setattr(gguf_checks.models, "load_strict", lambda folder, dtype, device: asked.append(device))
    assert list(gguf_checks._reference(tmp_path, [], "cuda:0")) == [] and asked == [device]


@pytest.mark.parametrize(("system", "gcc"), [("linux", True), ("darwin", False), ("win32", False)])
def test_only_gcc_gets_gccs_options(monkeypatch, system, gcc):
    given = []
    monkeypatch.setattr(llama_cpp_tools.sys, "platform", system)
    monkeypatch.setattr(llama_cpp_tools.subprocess, "run", lambda *_, env, **__: given.append(env["CMAKE_ARGS"]))
    llama_cpp_tools._pip("download")
    assert ("-fno-dse" in given[0]) == gcc


def test_a_refusal_is_printed_and_publishing_goes_on(tmp_path, capsys):
    (tmp_path / "modeling_x.py").write_text("")
    merge = Merged(tmp_path, "original", {}, None, None)
    assert gguf.export_merged(merge, Plan(tmp_path, ""), []) is None
    assert capsys.readouterr().out == ""
    assert gguf.export_merged(merge, Plan(tmp_path, "f16"), []) is None
    assert "No GGUF files were written." in capsys.readouterr().out


def test_exported_model_reads_and_answers_as_transformers_does(tmp_path, phi2_tokenizer_folder, llama_cpp):
    folder = merged(tmp_path / "merged", "phi", phi2_tokenizer_folder)
    exported = gguf.export(folder, tmp_path / "gguf", ["f16", "Q4_K_M"])
    files = {path.name: path.stat().st_size for path in (tmp_path / "gguf").iterdir()}
    assert set(files) == {"Modelfile", "README.md", "SHA256SUMS", "model-Q4_K_M.gguf", "model-f16.gguf"}
    assert files["model-Q4_K_M.gguf"] < 0.6 * files["model-f16.gguf"]
    checksums.verify_checksums(tmp_path / "gguf")
    f16, small = exported.measured
    assert exported.texts >= 30 and f16["tokens"] >= 300
    assert f16["kl"] < 1e-4 and f16["top_1"] > 0.99 and abs(f16["loss"] - f16["reference_loss"]) < 1e-3
    assert small["kl"] > 3 * f16["kl"] and exported.left_out == []


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, llama_cpp) -> gguf.Exported:
    """A Phi whose tokenizer no hash knows, as the sample's: byte-level, of a small world."""
    place = tmp_path_factory.mktemp("quantised")
    folder = merged(place / "merged", "phi", saved(place / "own", make_tokenizer()))
    return gguf.export(folder, place / "gguf", ["Q8_0", "Q4_0"])


def test_a_tokenizer_that_no_hash_knows_is_exported_if_it_reads_alike(quantised, monkeypatch):
    assert not (quantised.folder / "model-f16.gguf").exists()
    assert quantised.texts >= 30 and quantised.measured[0]["kl"] < 0.01 < quantised.measured[1]["kl"]
    monkeypatch.syspath_prepend(str(llama_cpp_tools.converter().parent / "gguf-py"))
    from gguf import GGUFReader  # llama.cpp's own

    types = {
        tensor.name: tensor.tensor_type.name for tensor in GGUFReader(quantised.folder / "model-Q4_0.gguf").tensors
    }
    assert (types["output.weight"], types["blk.0.ffn_up.weight"]) == ("Q8_0", "Q4_0")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("length", [1, 2, 16, 31, 33, 64])
def test_amx_kernels_compute_what_the_others_do(kind, length, quantised, llama_cpp, monkeypatch):
    """Tiles take 16 tokens of a prompt, two of them at once; a token alone has a kernel of its own."""
    if b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info():
        pytest.skip("this CPU, or this build of llama.cpp, has no AMX")
    if not llama_kernels.amx_is_sound():
        pytest.skip("the AMX kernels of this build may end the process: `make gguf` compiles them so that they run")
    ids = [(7 * i) % 400 + 5 for i in range(length + 8)]
    given = quantised.folder / f"model-{kind}.gguf", ids[:length], ids[length:]
    amx = log_probabilities(*given)
    monkeypatch.setattr(llama_kernels, "amx_is_sound", lambda: False)
    plain = log_probabilities(*given)
    assert not torch.equal(amx, plain)  # other kernels computed
    assert (plain.exp() * (plain - amx)).sum(-1).max() < 1e-3


@pytest.mark.more
@pytest.mark.parametrize("prepend", ["never", "always"])
def test_a_sentencepiece_like_tokenizer_needs_no_tokenizer_model(tmp_path, llama_cpp, prepend):
    folder = merged(tmp_path / "merged", "llama", saved(tmp_path / "own", sentencepiece_like(prepend)), "")
    assert gguf.export(folder, tmp_path / "gguf", ["f16"]).measured[0]["top_1"] > 0.99


def test_other_tokens_refuse_the_export(tmp_path, llama_cpp):
    folder = merged(tmp_path / "merged", "llama", saved(tmp_path / "own", sentencepiece_like("first")), "")
    with pytest.raises(ValueError, match=r"reads \d+ of \d+ texts as other tokens.* in place of \["):
        gguf.export(folder, tmp_path / "gguf", ["f16"])
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []


def test_an_interrupt_leaves_nothing(tmp_path, llama_cpp):
    folder = merged(tmp_path / "merged", "phi", saved(tmp_path / "own", make_tokenizer()))
    slow = tmp_path / "llama.cpp"
    (slow / "conversion").mkdir(parents=True)
    replaced = ("_create_vocab_sentencepiece", "_set_vocab_gpt2", "_set_vocab_sentencepiece", "get_vocab_base_pre")
    (slow / "conversion" / "base.py").write_text("class TextModel:\n    " + " = ".join(replaced) + " = None\n")
    (slow / "convert_hf_to_gguf.py").write_text(
        "import sys, time\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'wb').write(b'0' * 10**6)\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-m", "llm_finetuning.release.gguf", str(folder), "--target", str(tmp_path / "out")]
    environment = os.environ | {"LLAMA_CPP": str(slow), "PYTHONPATH": str(Path(gguf.__file__).parents[2])}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    partial = tmp_path / ".out.partial" / "model-f16.gguf"
    wait_for(lambda: partial.exists() or process.poll() is not None)
    assert partial.exists(), process.communicate()[0]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "__del__" not in output
    assert [path.name for path in tmp_path.iterdir() if re.search("out", path.name)] == []


@pytest.mark.parametrize(("changed", "alpha"), [({}, 16), ({"use_rslora": True}, 64), ({"use_dora": True}, None)])
def test_llama_cpp_is_handed_an_adapter_of_the_same_scale(changed, alpha, tmp_path, monkeypatch):
    """It reads lora_alpha and the tensors, and nothing of what else the configuration says."""
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16} | changed
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    handed = []

    def run(command, problem):
        folder = Path(command[-1])
        handed.append(json.loads((folder / "adapter_config.json").read_text())["lora_alpha"])
        assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"

    monkeypatch.setattr(gguf.llama_cpp_tools, "run", run)
    monkeypatch.setattr(gguf.llama_cpp_tools, "converter", lambda name: Path(name))
    left_out = gguf.convert_adapter(tmp_path, tmp_path, tmp_path / gguf.ADAPTER)
    assert handed == [alpha] * (alpha is not None)
    assert [gguf.ADAPTER in line and "DoRA" in line for line in left_out] == [True] * (alpha is None)


@pytest.mark.more
@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_alone_is_converted(rslora, tmp_path, llama_cpp):
    from peft import LoraConfig, get_peft_model

    folder = merged(tmp_path / "merged", "phi", saved(tmp_path / "own", make_tokenizer()))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = {"target_modules": "all-linear", "init_lora_weights": False, "use_rslora": rslora}
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=64, **given))
    peft.save_pretrained(tmp_path / "adapter")
    exported = gguf.export(folder, tmp_path / "gguf", ["f16"], adapter=tmp_path / "adapter")
    ids = list(range(40, 80))
    with torch.no_grad():
        expected = peft(torch.tensor([ids])).logits[0, -1]
    llama = llama_cpp.Llama(
        str(tmp_path / "gguf" / "model-f16.gguf"),
        lora_path=str(tmp_path / "gguf" / gguf.ADAPTER),
        n_ctx=64,
        verbose=False,
    )
    llama.eval(ids)
    import numpy as np

    found = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()
    llama.close()
    assert (torch.from_numpy(found) - expected).norm() < 0.01 * expected.norm()
    assert exported.measured[0]["type"] == "f16"


def test_gguf_checks_tell_a_wrong_file(tmp_path):
    """What is refused: another model under the same tokens."""
    row = {"type": "f16", "kl": 0.02, "top_1": 0.97}
    with pytest.raises(ValueError, match="computes another model"):
        gguf._check_f16(row, tmp_path)
    with pytest.raises(ValueError, match="computes another model"):
        gguf._check_f16(row | {"kl": 0.001, "top_1": 0.5}, tmp_path)
    logits, targets = torch.randn(20, 50), torch.arange(20)
    (tmp_path / "x.gguf").write_bytes(b"x")
    same = gguf_checks._compare("f16", tmp_path / "x.gguf", logits, logits.clone(), targets)
    assert same["kl"] == 0 and same["top_1"] == 1 and same["loss"] == same["reference_loss"]
    other = gguf_checks._compare("f16", tmp_path / "x.gguf", logits, -logits, targets)
    assert other["kl"] > 1 and other["top_1"] < 0.2
    with pytest.raises(ValueError, match="no finite numbers"):
        gguf_checks._compare("f16", tmp_path / "x.gguf", logits, logits * float("nan"), targets)
