"""A published folder that a stranger made: one sentence before the model is loaded. `-s` prints a table."""

import json
import struct
import time

import pytest
import torch
from broken_bases import config, copy_of, entries
from hostile_templates import TEMPLATES
from safetensors.torch import load_file, save_file

from llm_finetuning import models
from llm_finetuning.files import checksums
from llm_finetuning.inference.chat import Chat


def write(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def generation(**values):
    return entries("generation_config.json", **values)


def header(change):
    """Another header of the weights; the bytes behind it stay."""

    def apply(folder) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        told = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
        file.write_bytes(struct.pack("<Q", len(told)) + told + data[8 + size :])

    return apply


def tensor(name: str, **values):
    return header(lambda told: told | {name: told[name] | values})


def sharded(weight_map):
    """An index in place of the single file, which gets another name."""

    def apply(folder) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


def in_dtype(dtype: torch.dtype):
    """The weights in another dtype, as a quantised model has them whose configuration does not say so."""

    def apply(folder) -> None:
        file = folder / "model.safetensors"
        save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})

    return apply


def link(name: str, target: str):
    def apply(folder) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


HEAD = "lm_head.weight"
PIECES = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
BROKEN = [{"SpecialToken": {"id": "X", "type_id": 0}}]
TENFOLD = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 4,
}
FOLDERS = {
    "hidden_size 10**9": (config(hidden_size=10**9), "hidden_size = 1e"),
    "hidden_size 2**20": (config(hidden_size=2**20), "another model than its weights"),
    "num_hidden_layers 10**7": (config(num_hidden_layers=10**7), "num_hidden_layers = 1e"),
    "num_hidden_layers 250": (config(num_hidden_layers=250), "another model than its weights"),
    "vocab_size 10**12": (config(vocab_size=10**12), "vocab_size = 1e"),
    "num_labels 10**8": (config(num_labels=10**8), "num_labels = 1e"),
    "positions 10**15": (config(max_position_embeddings=10**15), "max_position_embeddings = 1e"),
    "heads 0": (config(num_attention_heads=0), "num_attention_heads = 0"),
    "layers -1": (config(num_hidden_layers=-1), "num_hidden_layers = -1"),
    "layers 1 of 2": (config(num_hidden_layers=1), "it has no model.layers.1"),
    "positions 0": (config(max_position_embeddings=0), "max_position_embeddings = 0"),
    "epsilon no number": (config(layer_norm_eps=float("nan")), "layer_norm_eps = nan"),
    "rope without a number": (config(rope_parameters={"rope_theta": float("nan")}), "rope_theta = nan"),
    "hidden_size -5": (config(hidden_size=-5), "config.json"),
    "hidden_size 'big'": (config(hidden_size="big"), "config.json cannot be read"),
    "rope 5": (config(rope_parameters=5), "config.json cannot be read"),
    "model_type evil": (config(model_type="evil", auto_map={"AutoConfig": "evil.C"}), "config.json cannot be read"),
    "model_type bert": (config(model_type="bert"), "config.json"),
    "quantised": (config(quantization_config={"quant_method": "evil"}), "is quantised"),
    "config no JSON": (write("config.json", "{oops"), "config.json cannot be read"),
    "config a list": (write("config.json", "[]"), "config.json cannot be read"),
    "config too deep": (write("config.json", '{"a":' * 10**5), "config.json cannot be read"),
    "eos a text": (generation(eos_token_id="end"), "generation_config.json"),
    "eos a fraction": (generation(eos_token_id=1.5), "generation_config.json"),
    "eos true": (generation(eos_token_id=True), "generation_config.json"),
    "eos a list in a list": (generation(eos_token_id=[[0]]), "generation_config.json"),
    "eos negative": (generation(eos_token_id=-1), "eos_token_id = .-1.: token ids of this model are"),
    "eos out of range": (generation(eos_token_id=[0, 10**9]), "eos_token_id = .*: token ids of this model are"),
    "eos none": (generation(eos_token_id=[]), "names no eos_token_id"),
    "suppress out of range": (generation(suppress_tokens=[10**9]), "suppress_tokens = .*: token ids of this model"),
    "suppress a number": (generation(suppress_tokens=5), "generation_config.json cannot be read"),
    "suppress all": (generation(suppress_tokens=list(range(1, 448))), "leaves no token"),
    "suppress eos": (generation(suppress_tokens=[0]), "holds every eos_token_id"),
    "generation a list": (write("generation_config.json", "[]"), "generation_config.json"),
    "tokenizer no JSON": (write("tokenizer.json", "{oops"), "tokenizer cannot be read"),
    "tokenizer a list": (write("tokenizer.json", "[]"), "tokenizer cannot be read"),
    "tokenizer empty": (write("tokenizer.json", ""), "tokenizer cannot be read"),
    "tokenizer binary": (write("tokenizer.json", b"\xff\xfe\0\1"), "tokenizer cannot be read"),
    "tokenizer too deep": (write("tokenizer.json", "[" * 10**5), "tokenizer cannot be read"),
    "tokenizer without model": (write("tokenizer.json", '{"version": "1.0"}'), "tokenizer cannot be read"),
    "tokenizer makes 10**12 of one": (entries("tokenizer.json", normalizer=TENFOLD), "a letter by up to 1,000,000,"),
    "tokenizer prepends 10**6": (
        entries("tokenizer.json", normalizer={"type": "Prepend", "prepend": "x" * 10**6}),
        "replaces a letter by up to 1,000,000",
    ),
    "tokenizer panics": (entries("tokenizer.json", post_processor=PIECES | {"single": BROKEN}), "tokenizer cannot be"),
    "tokenizer_config a list": (write("tokenizer_config.json", "[]"), "tokenizer cannot be read"),
    "eos_token a number": (entries("tokenizer_config.json", eos_token=5), "tokenizer cannot be read"),
    "weights cut": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7), "model.safetensors is damaged"),
    "header of 2**62 bytes": (write("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "is damaged"),
    "header no JSON": (write("model.safetensors", struct.pack("<Q", 4) + b"oops"), "is damaged"),
    "offsets beyond the end": (tensor(HEAD, data_offsets=[0, 2**60]), "is damaged"),
    "another shape": (tensor(HEAD, shape=[10**9, 10**9]), "is damaged"),
    "weights of one byte": (in_dtype(torch.int8), "is I8: quantised weights mean nothing"),
    "weights of eight bits": (in_dtype(torch.float8_e4m3fn), "is F8_E4M3: quantised weights mean nothing"),
    "shape turned round": (header(lambda told: told | {HEAD: told[HEAD] | {"shape": told[HEAD]["shape"][::-1]}}), HEAD),
    "weight map: other folder": (sharded({HEAD: "../model.safetensors"}), "'../model.safetensors', which is no file"),
    "weight map: from the root": (sharded({HEAD: "/etc/passwd"}), "'/etc/passwd', which is no file of its folder"),
    "weight map: parent": (sharded({HEAD: ".."}), "lacks .."),
    "weight map: not in SHA256SUMS": (sharded({HEAD: ".hidden.safetensors"}), "SHA256SUMS does not list"),
    "weight map: a number": (sharded({HEAD: 5}), "no index of weights"),
    "weight map: a list": (sharded([1, 2]), "no index of weights"),
    "weight map: no such tensor": (sharded({"evil": "model-00001-of-00001.safetensors"}), "hold no evil"),
    "link out of the folder": (link("config.json", "/etc/passwd"), "a link out of the folder"),
    "link to a folder": (link("more", "/"), "a link out of the folder"),
    "an adapter beside": (write("adapter_config.json", '{"base_model_name_or_path": "/evil"}'), "remove the adapter"),
    "template no text": (write("chat_template.jinja", b"\xff\xfe\xff"), "tokenizer cannot be read"),
    **{f"template: {name}": (write("chat_template.jinja", text), words) for name, (text, words) in TEMPLATES.items()},
}
ALWAYS = (
    "hidden_size 10**9", "num_labels 10**8", "model_type evil", "eos out of range", "suppress all", "tokenizer panics",
    "shape turned round", "layers 1 of 2", "tokenizer makes 10**12 of one", "weight map: other folder",
    "weight map: not in SHA256SUMS", "link out of the folder",
    "template: loops in loops", "template: centred in 10**10",
)  # fmt: skip


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    print(f"\n{len(rows)} hostile folders: what, seconds, message")
    for name, seconds, message in rows:
        print(f"{name:32} {seconds:5.1f}  {message.replace(chr(10), ' ')[:160]}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.more) for name in FOLDERS]
)
def test_a_hostile_folder_is_refused_in_a_sentence(published, tmp_path, table, monkeypatch, name):
    change, words = FOLDERS[name]
    folder = copy_of(published, tmp_path / "model", change)
    checksums.write_checksums(folder)
    if name == "weight map: not in SHA256SUMS":
        (folder / "model-00001-of-00001.safetensors").rename(folder / ".hidden.safetensors")
        checksums.write_checksums(folder)
        listed = (folder / checksums.NAME).read_text().splitlines(keepends=True)
        (folder / checksums.NAME).write_text("".join(line for line in listed if "hidden" not in line))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks at the terminal"))
    monkeypatch.setattr("llm_finetuning.inference.backends.load", lambda *_: pytest.fail("the model is loaded"))
    begun = time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        Chat.load(folder)
    message = str(raised.value)
    table.append((name, time.perf_counter() - begun, message.replace(str(tmp_path), "")))
    assert str(folder) in message
    assert len(message) < 1200


def test_code_and_kernels_of_a_folder_are_never_taken(published, tmp_path, monkeypatch):
    code = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass C: pass\nclass M: pass\n"
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.C", None]}
    folder = copy_of(
        published,
        tmp_path / "model",
        write("evil.py", code),
        config(auto_map=auto, attn_implementation="evil/kernel", experts_implementation="evil/kernel"),
        entries("tokenizer_config.json", auto_map=auto),
    )
    checksums.write_checksums(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks at the terminal"))
    assert Chat.load(folder, "float32").answer([{"role": "user", "content": "Count."}]).startswith("one two")
    assert models.configuration(str(folder))._attn_implementation is None
    assert not list(tmp_path.rglob("ran"))


def test_the_links_of_the_hubs_cache_are_no_links_out_of_the_folder(published, tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for file in published.iterdir():
        (blobs / checksums.hash_file(file)).write_bytes(file.read_bytes())
        (folder / file.name).symlink_to(f"../../blobs/{checksums.hash_file(file)}")
    assert Chat.load(folder, "float32").answer([{"role": "user", "content": "Count."}]).startswith("one two")


def test_a_tensor_under_another_name_is_missed(published, tmp_path):
    folder = copy_of(
        published, tmp_path / "model", header(lambda told: {n.replace("fc1", "fc"): told[n] for n in told})
    )
    checksums.write_checksums(folder)
    for backend in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match="lacks .*fc1"):
            Chat.load(folder, backend)


def test_a_token_without_an_embedding_is_said(published, tmp_path):
    folder = copy_of(published, tmp_path / "model")
    tokenizer = models.read_tokenizer(str(folder))
    tokenizer.add_tokens([f"<more {i}>" for i in range(100)])
    tokenizer.save_pretrained(folder)
    checksums.write_checksums(folder)
    loaded = Chat.load(folder, "float32")
    with pytest.raises(ValueError, match="gives id 499, and the model has 448 embeddings"):
        loaded.answer([{"role": "user", "content": "<more 99>"}])
