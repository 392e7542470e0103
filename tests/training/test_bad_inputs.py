"""What is wrong with a run is said in one of its first three cells: settings, pairs, plan. `-s` prints a table."""

import dataclasses
import json
from pathlib import Path

import pytest
from broken_bases import config, copy_of, pickled, renamed
from first_cells import check_stop

from llm_finetuning import hardware

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def without_eos(base: Path) -> None:
    file = base / "tokenizer_config.json"
    values = {name: value for name, value in json.loads(file.read_text()).items() if name != "eos_token"}
    file.write_text(json.dumps(values))


TRAIN = "data/finetuning_data_train.jsonl"
CASES = [  # (what is wrong: settings, base, files), (cell that says it, words of the message)
    ({"lora_r": 0}, None, None, "settings", "lora_r = 0: at least 1"),
    ({"learning_rate": float("inf")}, None, None, "settings", "learning_rate = inf"),
    ({"learning_rate": float("nan")}, None, None, "settings", "learning_rate = nan"),
    ({"seed": -1}, None, None, "settings", "seed = -1: 0 or more"),
    ({"dtype": "fp8"}, None, None, "settings", "dtype = 'fp8': one of auto, bfloat16"),
    ({"num_train_epochs": 0.0}, None, None, "settings", "num_train_epochs = 0.0: above 0"),
    ({"publish_to": "hub"}, None, None, "settings", "needs user/name"),
    ({"tokens_per_step": 10}, None, None, "settings", "at least max_seq_length"),
    ({}, None, remove(TRAIN), "pairs", "finetuning_data_train.jsonl.*run .*Training Data Prep"),
    ({}, None, remove("data/finetuning_data_val.jsonl"), "pairs", "_val.jsonl.*run .*Validation Data Prep"),
    ({}, None, write(TRAIN, "{\n oops"), "pairs", "finetuning_data_train.jsonl"),
    ({}, None, write(TRAIN, ""), "pairs", "finetuning_data_train.jsonl"),
    ({}, None, write(TRAIN, '{"prompt": "a"}\n'), "pairs", "line 1.*response"),
    ({"model_name": "/not/there"}, None, None, "pairs", "model_name /not/there is not there"),
    ({}, remove("config.json"), None, "pairs", "folder without a config.json"),
    ({}, write("tokenizer.json", "[]"), None, "pairs", "its tokenizer cannot be read"),
    ({}, config(hidden_size=10**9), None, "pairs", "config.json has sizes that no model has: hidden_size"),
    ({}, config(num_labels=10**8), None, "pairs", "config.json has sizes that no model has: num_labels"),
    ({}, config(num_attention_heads=0), None, "pairs", "config.json has sizes that no model has: num_attention_heads"),
    ({}, config(num_key_value_heads=0), None, "plan", "config.json cannot be read .ZeroDivisionError"),
    ({}, without_eos, None, "pairs", "no end-of-text token"),
    ({"chat_template": "/not/there.jinja"}, None, None, "pairs", "chat_template /not/there.jinja is no file"),
    ({"max_seq_length": 16}, None, None, "pairs", "raise max_seq_length"),
    ({"optim": "adamw_tourch"}, None, None, "plan", "did you mean 'adamw_torch'"),
    ({"lr_scheduler_type": "cosin"}, None, None, "plan", "did you mean 'cosine'"),
    ({"report_to": "wandbb"}, None, None, "plan", "did you mean 'wandb'"),
    ({"publish_to": "hub", "hub_repository": "me/model"}, None, None, "plan", "publish_to = 'hub'"),
    ({"lora_target_modules": "q_proj, up_proj"}, None, None, "plan", "up_proj match no linear module"),
    ({"lora_target_modules": "lm_head"}, None, None, "plan", "lm_head is the output layer, which gets no adapter"),
    ({}, config(quantization_config={"quant_method": "gptq"}), None, "plan", "quantised already .gptq"),
    ({}, config(vocab_size=300), None, "plan", "the model has 300 embeddings"),
    ({}, config(max_position_embeddings=32), None, "plan", "set max_seq_length = 32"),
    ({"max_new_tokens": 400}, None, None, "plan", "lower max_new_tokens"),
    ({}, config(model_type="gpt2", n_embd=64, n_head=2, n_layer=2), None, "plan", "no linear layers"),
    ({}, config(model_type="t5"), None, "plan", "t5.*no causal language model"),
    ({}, pickled, None, "plan", "Pickled weights"),
    ({}, cut("model.safetensors"), None, "plan", "model.safetensors is damaged .*fetch it again"),
    ({}, renamed(lambda name: name.replace("q_proj", "query")), None, "plan", "weights of linear layers"),
    ({}, config(**LLAMA), None, "plan", "weights of linear layers .*not in its checkpoint"),
    ({"allow_slow": False}, "slow", None, "plan", "no GPU here"),
    ({}, "no room", None, "plan", "this run needs about"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[4][:40])
def test_it_is_said_before_the_base_is_loaded(case, tiny_base, tmp_path, monkeypatch):
    changed, base_change, file_change, expected, words = case
    base = copy_of(tiny_base, tmp_path / "base", *[base_change] * callable(base_change))
    if isinstance(base_change, str):
        usual = hardware.detect()
        other = {"slow": {"flops": 1e3}, "no room": {"free_memory": 2**20}}[base_change]
        monkeypatch.setattr(hardware, "detect", lambda *_: dataclasses.replace(usual, **other))
    check_stop(tmp_path, base, changed, expected, words, monkeypatch, file_change)
