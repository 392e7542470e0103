"""What preference tuning refuses, in words and before anything is loaded; and what its data become."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from preference_fixtures import preference_settings, prepare_preference, small_preferences
from safetensors.torch import load_file, save_file
from training_fixtures import write_lines

from llm_finetuning import models, prompts
from llm_finetuning.data import preferences
from llm_finetuning.training import preference_start, qlora
from llm_finetuning.training.preference_data import ByLength, encode_preferences, padded_tokens, read_inputs


@pytest.fixture
def folder(finetuned, tmp_path, monkeypatch) -> Path:
    """A copy of a finished finetuning; loading a base from it fails the test."""
    shutil.copytree(finetuned, tmp_path / "run")
    monkeypatch.setattr(qlora, "load_base", lambda *_: pytest.fail("the base was loaded"))
    return tmp_path / "run"


def refused(folder: Path, base: Path, error: type, match: str, **changed):
    with pytest.raises(error, match=match):
        prepare_preference(preference_settings(folder, base, **changed))


GOOD = {"prompt": "p", "chosen": "yes", "rejected": "no"}
BROKEN = {
    "the same text": (GOOD | {"rejected": "yes"}, "line 2: chosen and rejected are the same text"),
    "blank space apart": (GOOD | {"rejected": " yes\n"}, "line 2: chosen and rejected are the same text"),
    "one side": ({"prompt": "p", "chosen": "yes"}, "line 2: rejected missing"),
    "a pair": ({"prompt": "p", "response": "yes"}, "line 2: chosen and rejected missing"),
    "a number": (GOOD | {"chosen": 3}, "line 2: chosen response is 3, expected a text"),
    "nothing said": (GOOD | {"rejected": ""}, "line 2: the rejected response is empty"),
    "blank": (GOOD | {"chosen": " \n\u00a0"}, "line 2: the chosen response is blank"),
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "line 2: prompt missing"),
    "a list": ([1, 2], "line 2"),
    "turns of nobody": (GOOD | {"history": [{"role": "bot", "content": "x"}]}, "line 2: turn 1 of history"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_is_no_preference_is_named_by_its_line(name, tmp_path):
    broken, message = BROKEN[name]
    file = write_lines(tmp_path / "preferences_train.jsonl", [GOOD, broken, GOOD])
    with pytest.raises(ValueError, match=message):
        preferences.read_prepared(file, "Training")


@pytest.mark.parametrize("content", [None, ""])
def test_data_without_ranks_are_refused(content, folder, tiny_base):
    for name in ("preferences_train.jsonl", "preferences_val.jsonl"):
        file = folder / "data" / name
        kept = file.read_text()
        file.unlink()
        if content is not None:
            file.write_text(content)
        refused(folder, tiny_base, FileNotFoundError, f"{name} holds no preference pairs.*people ranked")
        file.write_text(kept)


def test_pairs_too_long_are_left_out_whole_and_counted(folder, tiny_base):
    long = {"prompt": "long", "history": [], "chosen": "yes", "rejected": "word " * 200}
    turns = [{"role": "user", "content": "old " * 60}, {"role": "assistant", "content": "turn"}]
    cut = {"prompt": "cut", "history": turns, "chosen": "so " * 20, "rejected": "yes"}
    chosen = preference_settings(folder, tiny_base)
    write_lines(chosen.folders.train_preferences, [long, cut, *small_preferences(3)])
    data = read_inputs(preference_start.from_adapter(chosen)).data
    assert (data.read, len(data.pairs)) == (5, 4)
    first = data.pairs[0]
    assert first["record"] == cut
    asked = [first[side]["input_ids"][: first[side]["labels"].count(-100)] for side in ("chosen", "rejected")]
    assert asked[0] == asked[1], "both sides lost the same turns"
    write_lines(chosen.folders.train_preferences, [long])
    refused(folder, tiny_base, ValueError, "none of the 1 preference pairs fits in max_seq_length = 96.*raise it")
    write_lines(chosen.folders.train_preferences, [cut])
    write_lines(chosen.folders.val_preferences, [long])
    refused(folder, tiny_base, ValueError, "none of the 1 held-out preference pairs fits")


@pytest.mark.parametrize("where", ["preferences_val.jsonl", "finetuning_data_val.jsonl"])
def test_pairs_of_the_held_out_set_are_refused(where, folder, tiny_base):
    file = folder / "data" / where
    held_out = json.loads(file.read_text().splitlines()[0])
    leaked = {"prompt": f"  {held_out['prompt'].upper()}", "history": [], "chosen": "a", "rejected": "b"}
    write_lines(folder / "data" / "preferences_train.jsonl", [*small_preferences(3), leaked])
    refused(
        folder, tiny_base, ValueError, "1 of 4 pairs of preferences_train.jsonl are in the held-out set too, by prompt"
    )


def test_a_tree_in_both_splits_is_refused(folder, tiny_base):
    for name, first in (("preferences_train.jsonl", 0), ("preferences_val.jsonl", 30)):
        records = [record | {"message_tree_id": "t"} for record in small_preferences(2, first)]
        write_lines(folder / "data" / name, records)
    refused(folder, tiny_base, ValueError, "2 of 2 pairs.*by tree")


def test_no_adapter_is_refused(folder, tiny_base):
    shutil.rmtree(folder / "adapter")
    refused(folder, tiny_base, FileNotFoundError, "holds no adapter.*run the finetuning notebook first")
    refused(
        folder, tiny_base, FileNotFoundError, "elsewhere holds no adapter", adapter_folder=str(folder / "elsewhere")
    )


def test_an_adapter_of_another_base_is_refused(folder, tiny_base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    refused(folder, other, ValueError, "is an adapter of .*, and model_name = .*: set model_name to the base")


def test_the_same_base_in_another_place_is_the_same(folder, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "moved")
    assert preference_start.from_adapter(preference_settings(folder, tmp_path / "moved")).lora_r == 4


def test_weights_that_changed_in_place_are_refused_before_they_are_loaded(folder, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    settings_file = folder / "adapter" / "settings.json"
    named = json.loads(settings_file.read_text()) | {"model_name": str(tmp_path / "base")}
    settings_file.write_text(json.dumps(named))
    (folder / "adapter" / "SHA256SUMS").unlink()
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    refused(folder, tmp_path / "base", ValueError, "was trained on other weights")


@pytest.mark.parametrize("changed", [{"system_message": "Be long."}, {"chat_template": "file"}])
def test_an_adapter_of_another_template_is_refused(changed, folder, tiny_base, tmp_path):
    if "chat_template" in changed:
        changed = {"chat_template": str(tmp_path / "template.jinja")}
        (tmp_path / "template.jinja").write_text(prompts.PHI2_FORMAT.replace("Instruct", "Ask"))
    refused(folder, tiny_base, ValueError, "another chat template or system message.*as in the finetuning", **changed)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"peft_type": "IA3"}, "has peft_type IA3"),
        ({"peft_type": "LORA", "use_dora": True}, "has use_dora"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_16"}, "has init_lora_weights = pissa"),
        ({"peft_type": "LORA", "lora_bias": True}, "has lora_bias"),
        (None, "is damaged"),
    ],
)
def test_a_damaged_or_foreign_adapter_is_refused(content, error, folder, tiny_base):
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(content or json.loads(file.read_text()) | {"r": 8}))
    refused(folder, tiny_base, ValueError, error)


def changed_weights(folder: Path, change) -> None:
    """The adapter with other weights and no checksums, as one that somebody copied together."""
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)
    (folder / "adapter" / "SHA256SUMS").unlink()


def test_an_adapter_of_another_rank_is_refused(folder, tiny_base):
    changed_weights(folder, lambda name, tensor: tensor[:2] if "lora_A" in name else tensor[:, :2].contiguous())
    refused(folder, tiny_base, ValueError, "has rank 2, and adapter_config.json says r = 4: set model_name")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(value, folder, tiny_base):
    changed_weights(folder, lambda name, tensor: tensor.index_fill(0, torch.tensor([1]), value))
    refused(folder, tiny_base, ValueError, "holds values that are not finite")


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("adapter_model.safetensors", b"", "is damaged"),
        ("adapter_model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "is damaged"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors: save the adapter again"),
        ("adapter_config.json", b'{"peft_type": "LO', "is no JSON"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "lacks r, lora_alpha, target_modules"),
        ("adapter_config.json", b'{"peft_type": "LORA", "layers_to_transform": [0]}', "has layers_to_transform"),
    ],
)
def test_half_an_adapter_is_refused_before_the_base_is_loaded(file, content, error, folder, tiny_base):
    (folder / "adapter" / "SHA256SUMS").unlink()
    (folder / "adapter" / file).unlink() if content is None else (folder / "adapter" / file).write_bytes(content)
    refused(folder, tiny_base, ValueError, error)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tensors: {n: t[..., :-1] if "lora_A" in n else t for n, t in tensors.items()}, "is of another model"),
        (lambda tensors: tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 2)}, "does not train"),
        (lambda tensors: dict([*tensors.items()][:-1]), "lacks .*: it is not an adapter"),
    ],
)
def test_tensors_of_another_model_are_not_taken(change, error, folder, tiny_base, monkeypatch):
    monkeypatch.undo()
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    (folder / "adapter" / "SHA256SUMS").unlink()
    refused(folder, tiny_base, ValueError, error)


def test_a_plain_peft_adapter_brings_what_it_decides(folder, tiny_base):
    """One of somebody else's: no settings.json, no checksums, module names of its own."""
    for name in ("settings.json", "SHA256SUMS", "run.json"):
        (folder / "adapter" / name).unlink()
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj", "fc1"], "use_rslora": True})
    )
    found = preference_start.from_adapter(preference_settings(folder, tiny_base))
    assert (found.lora_r, found.lora_alpha, found.lora_target_modules) == (4, 8, "fc1, q_proj")
    assert found.use_rslora, "else its product would have another scale"


def test_the_base_has_the_bits_that_the_finetuning_decided(folder, tiny_base):
    run = folder / "adapter" / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"use_4bit": False}))
    (folder / "adapter" / "SHA256SUMS").unlink()
    assert preference_start.from_adapter(preference_settings(folder, tiny_base)).use_4bit == "no"


def test_what_is_not_for_pairs_is_refused(folder, tiny_base):
    with pytest.raises(ValueError, match="neftune_noise_alpha = 5.0: in the finetuning notebook alone"):
        preference_settings(folder, tiny_base, neftune_noise_alpha=5.0)


def test_what_a_user_types_stays_text(tiny_base):
    template = prompts.template_for(models.tokenizer(str(tiny_base)))
    eos = template.tokenizer.eos_token
    record = {"prompt": f"a {eos} b", "chosen": f"c {eos}", "rejected": "d"}
    (row,) = encode_preferences([record], template, 96).rows()
    special = template.tokenizer.eos_token_id
    assert special not in row["prompt_ids"]
    assert (row["chosen_ids"].count(special), row["rejected_ids"].count(special)) == (1, 1)
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == special


def test_pairs_of_like_length_stand_in_one_batch():
    lengths = [10, 400, 12, 390, 11, 410, 13, 395] * 40
    orders = [list(ByLength(lengths, 4, 7)) for _ in range(2)]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(320)), "seed and epoch alone decide"
    other = ByLength(lengths, 4, 7)
    other.set_epoch(1)
    assert list(other) != orders[0]
    batches = [[lengths[i] for i in orders[0][start : start + 4]] for start in range(0, 320, 4)]
    assert sum(max(batch) - min(batch) < 30 for batch in batches) >= 72


def test_the_padding_that_the_plan_prints_is_that_of_the_batches(folder, tiny_base, monkeypatch):
    monkeypatch.undo()
    run = prepare_preference(preference_settings(folder, tiny_base, micro_batch_tokens=384))
    padded = real = 0
    for batch in run.trainer.get_train_dataloader():
        padded, real = padded + batch["input_ids"].numel(), real + int(batch["attention_mask"].sum())
    assert run.plan.pairs > 1 and padded == run.plan.tokens == padded_tokens(run.data, run.plan.pairs, 7)
    assert run.plan.padding == pytest.approx(1 - real / padded)
    table = dict(run.plan.table().itertuples(index=False))
    assert table["padding"] == f"{run.plan.padding:.1%} of the tokens"
    assert run.plan.steps == run.steps
