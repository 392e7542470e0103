"""Bases and data that are wrong in ways that no name of a parameter tells: said in one of the first three cells too."""

import json
from pathlib import Path

import pytest
import torch
from broken_bases import config, copy_of
from first_cells import check_stop
from safetensors.torch import load_file, save_file

TRAIN = "data/finetuning_data_train.jsonl"


def write(name: str, content: str | bytes):
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def folder_instead(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def weights(change):
    """Other tensors in the base's file: `change` is given them by name."""

    def apply(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        save_file(change(tensors) or tensors, base / "model.safetensors", metadata={"format": "pt"})

    return apply


def without(*names: str):
    return weights(lambda tensors: {n: t for n, t in tensors.items() if not any(n.endswith(name) for name in names)})


def index(weight_map: object):
    """An index in place of the one file."""

    def apply(base: Path) -> None:
        (base / "model.safetensors").unlink()
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


def template(text: str):
    return lambda base: (base / "chat_template.jinja").write_text(text)


def line(**values):
    return lambda folder: (folder / TRAIN).write_text(json.dumps({"prompt": "a", "response": "b"} | values) + "\n")


def without_entry(file: str, *names: str):
    def change(base: Path) -> None:
        values = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps({n: v for n, v in values.items() if n not in names}))

    return change


def turned(tensors: dict) -> None:
    name = "model.layers.0.mlp.fc1.weight"
    tensors[name] = tensors[name].t().contiguous()


def one_more(tensors: dict) -> None:
    tensors["model.layers.9.mlp.fc1.weight"] = torch.ones(3)


def to(dtype: torch.dtype):
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def spoiled(number: str, name: str):
    def change(tensors: dict) -> None:
        tensors[name][-1, -1] = float(number)

    return change


CASES = [  # (what is wrong: settings, base, files), (cell that says it, words of the message)
    ({}, without_entry("config.json", "model_type"), None, "plan", "config.json cannot be read .*model_type"),
    ({}, write("config.json", ""), None, "pairs", "config.json cannot be read"),
    ({}, write("config.json", "[1]"), None, "pairs", "config.json cannot be read"),
    ({}, write("config.json", b"\xff\xfe\x00"), None, "pairs", "config.json cannot be read"),
    ({}, config(model_type="ph1"), None, "plan", "model type `ph1`"),
    ({}, config(model_type=["phi"]), None, "pairs", "cannot be read .*unhashable"),
    ({}, config(num_hidden_layers="2"), None, "pairs", "num_hidden_layers' expected int"),
    ({}, config(hidden_act="gelu_old"), None, "plan", "config.json cannot be read .*gelu_old"),
    ({}, config(resid_pdrop=1.5), None, "plan", "config.json cannot be read .*probability"),
    ({}, config(pad_token_id=10**6), None, "plan", "config.json cannot be read .*Padding_idx"),
    (
        {},
        config(intermediate_size=96),
        None,
        "plan",
        r"fc1.bias is \[320\] in the checkpoint and \[96\] by",
    ),
    ({}, config(vocab_size=700), None, "plan", r"is \[448.* in the checkpoint and \[700"),
    ({}, config(num_hidden_layers=3), None, "plan", "6 of 18 weights of linear layers are not in its checkpoint"),
    ({}, config(num_hidden_layers=1), None, "plan", "the checkpoint holds model.layers.1.* which the model has not"),
    ({}, without("final_layernorm.weight"), None, "plan", "start model.final_layernorm.weight with random numbers"),
    ({}, without("lm_head.weight"), None, "plan", "start lm_head.weight with random numbers"),
    ({}, without("embed_tokens.weight"), None, "plan", "start model.embed_tokens.weight with random numbers"),
    ({}, without("q_proj.bias"), None, "plan", "q_proj.bias with random numbers"),
    ({}, weights(turned), None, "plan", r"fc1.weight is \[160, 320\] in the checkpoint"),
    ({}, weights(one_more), None, "plan", "holds model.layers.9.mlp.fc1.weight, which the model has not"),
    ({}, weights(to(torch.int8)), None, "plan", "is I8: quantised weights mean nothing"),
    ({}, weights(to(torch.float8_e4m3fn)), None, "plan", "is F8_E4M3: quantised weights mean nothing"),
    (
        {},
        weights(spoiled("nan", "model.layers.1.mlp.fc2.weight")),
        None,
        "plan",
        "fc2.weight holds .*not finite",
    ),
    ({}, weights(spoiled("inf", "model.embed_tokens.weight")), None, "plan", "embed_tokens.weight holds .*not finite"),
    ({}, index({}), None, "plan", "12 of 12 weights of linear layers are not"),
    ({}, index({"lm_head.weight": "model-2.safetensors"}), None, "plan", "lacks model-2.safetensors"),
    ({}, index([1]), None, "plan", "is no index of weights"),
    ({}, write("model.safetensors", b""), None, "plan", "model.safetensors is damaged"),
    ({}, folder_instead("model.safetensors"), None, "plan", "holds no weights as safetensors"),
    ({}, write("generation_config.json", "[]"), None, "plan", "its generation_config.json cannot be read .*delete it"),
    (
        {},
        write("generation_config.json", '{"max_new_tokens": -5}'),
        None,
        "plan",
        "max_new_tokens. must be greater",
    ),
    ({}, write("tokenizer_config.json", "{"), None, "pairs", "its tokenizer cannot be read"),
    ({}, write("tokenizer.json", "{}"), None, "pairs", "its tokenizer cannot be read"),
    ({}, write("tokenizer.json", b"\x00\x01"), None, "pairs", "its tokenizer cannot be read"),
    ({}, template("{% for m in messages %}{{ m['content'] "), None, "pairs", "is no valid Jinja: line 1"),
    ({}, template("{{ raise_exception('no') }}"), None, "pairs", "refuses the conversation: TemplateError: no"),
    ({}, template("always the same"), None, "pairs", "writes the response of a finished turn 0 times"),
    ({"chat_template": "."}, None, None, "pairs", "chat_template . is no file"),
    ({"model_name": "sample "}, None, None, "pairs", "model_name sample  is not there: .*a hub id"),
    ({"model_name": "microsoft/phi 2"}, None, None, "pairs", "model_name microsoft/phi 2 is not there: .*a hub id"),
    ({"model_name": "https://huggingface.co/microsoft/phi-2"}, None, None, "pairs", "is not there: .*a hub id"),
    ({"model_name": ".."}, None, None, "pairs", "is a folder without a config.json"),
    ({"tokenizer_folder": "/not/there"}, None, None, "pairs", "tokenizer_folder /not/there is no folder"),
    ({"publish_to": "hub", "hub_repository": "me/my model"}, None, None, "plan", "the Hub takes no such name"),
    ({"publish_to": "hub", "hub_repository": "/model"}, None, None, "plan", "the Hub takes no such name"),
    ({"lora_r": 10**7}, None, None, "plan", "this run needs about .*Lower max_seq_length"),
    ({"lora_target_modules": "q_proj; v_proj"}, None, None, "plan", "q_proj; match no linear module"),
    ({"lora_target_modules": " , "}, None, None, "settings", "lora_target_modules = ' , ': all-linear"),
    ({"lora_target_modules": "all-linear, q_proj"}, None, None, "plan", "all-linear match no linear module"),
    ({"seed": 2**32}, None, None, "settings", r"seed = 4294967296: 0 or more, below 2\*\*32"),
    ({"num_train_epochs": float("nan")}, None, None, "settings", "num_train_epochs = nan: above 0, and finite"),
    ({"num_train_epochs": float("inf")}, None, None, "settings", "num_train_epochs = inf: above 0, and finite"),
    ({"weight_decay": float("inf")}, None, None, "settings", "weight_decay = inf: 0 or more, and finite"),
    ({"max_grad_norm": float("nan")}, None, None, "settings", "max_grad_norm = nan: 0 or more"),
    ({"lora_alpha": 10**400}, None, None, "settings", "at least 1, at most 1,000,000,000"),
    ({"max_steps": 10**30}, None, None, "settings", "max_steps = 10*: -1 or above 0"),
    ({"work_folder": "/proc/nowhere"}, None, None, "plan", "/proc has 0.000 MB free"),
    ({}, None, write(TRAIN, b"\xff\xfe{}\n"), "pairs", "finetuning_data_train.jsonl.*not UTF-16"),
    ({}, None, write(TRAIN, "null\n"), "pairs", "is neither JSON nor a CSV"),
    ({}, None, line(response=3), "pairs", "line 1: response is 3, expected a text"),
    ({}, None, line(history=[{"role": "robot", "content": "x"}]), "pairs", "line 1: turn 1 of history lacks a role"),
    ({}, None, folder_instead(TRAIN), "pairs", "finetuning_data_train.jsonl not found"),
]


@pytest.mark.parametrize(
    "case",
    [case if number % 4 == 2 else pytest.param(case, marks=pytest.mark.more) for number, case in enumerate(CASES)],
    ids=lambda case: case[4][:40],
)
def test_it_is_said_before_the_base_is_loaded(case, tiny_base, tmp_path, monkeypatch):
    changed, base_change, file_change, cell, words = case
    base = copy_of(tiny_base, tmp_path / "base", *[base_change] * bool(base_change))
    check_stop(tmp_path, base, changed, cell, words, monkeypatch, file_change)
