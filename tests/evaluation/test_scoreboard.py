"""The scoreboard: measures that say what they claim."""

import dataclasses
import math

import pytest
import torch
from inference_fixtures import known_pairs, make_tokenizer
from training_fixtures import small_pairs, small_settings

from llm_finetuning import prompts
from llm_finetuning.evaluation import likelihood, scoreboard
from llm_finetuning.files.atomic import read_json


def test_loss_is_weighted_by_tokens_not_by_batches(world, monkeypatch):
    model, template = world
    held_out = scoreboard.held_out_set(small_pairs(9), template, 96, 9, 0)
    expected = total = 0.0
    for row in held_out:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        kept = labels[0, 1:] != -100
        expected += torch.nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum").item()
        total += int(kept.sum())
    for batch in (40, 300, 4096):
        monkeypatch.setattr(likelihood, "BATCH_TOKENS", batch)
        assert scoreboard.held_out_loss(model, held_out, template) == pytest.approx(expected / total, rel=1e-5)


def test_batches_are_smaller_the_larger_the_vocabulary():
    """Gemma 3's 262,208 entries leave room for a fifth of the tokens; with Phi-2's 51,200 nothing changes."""
    examples = [{"input_ids": [0] * length} for length in (3000, *[200] * 30)]
    widest = {}
    for vocabulary in (512, 51_200, 262_208):
        batches = list(likelihood._batches(list(range(31)), examples, vocabulary))
        assert [i for batch in batches for i in batch] == list(range(31)) and batches[0] == [0]
        widest[vocabulary] = max(len(batch) * 200 for batch in batches)
        largest = max(len(batch) * len(examples[batch[0]]["input_ids"]) for batch in batches[1:])
        assert largest * vocabulary * likelihood.LOGIT_BYTES <= likelihood.BATCH_BYTES
    assert widest == {512: 4000, 51_200: 4000, 262_208: 800}


def test_the_loss_of_a_batch_is_that_of_its_slices(world, monkeypatch):
    model, template = world
    held_out = scoreboard.held_out_set(small_pairs(9), template, 96, 9, 0)
    whole = likelihood.losses(model, held_out, template)
    monkeypatch.setattr(likelihood, "SLICE", 7)
    assert likelihood.losses(model, held_out, template) == whole


def test_a_model_that_knows_scores_full_marks(world, tmp_path):
    model, template = world
    chosen = small_settings(tmp_path, "m", judge_exact_match=True, max_new_tokens=48, eval_answers=8)
    held_out = scoreboard.held_out_set(known_pairs(), template, 200, 8, 1)
    scores = scoreboard.measure(model, held_out, template, chosen)
    assert scores["exact_match"] == scores["stop_rate"] == 1.0
    assert scores["loss"] < 0.1
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["samples"][0]["text"] == scores["samples"][0]["reference"]


def test_answers_cut_off_do_not_count_as_stopped(world, tmp_path):
    model, template = world
    chosen = small_settings(tmp_path, "m", max_new_tokens=1)
    held_out = scoreboard.held_out_set(known_pairs(), template, 200, 4, 1)
    assert scoreboard.measure(model, held_out, template, chosen)["stop_rate"] == 0.0


def test_training_mode_and_attention_are_restored(world):
    model, template = world
    model.train()
    scoreboard.held_out_loss(model, scoreboard.held_out_set(small_pairs(3), template, 96, 3, 0), template)
    assert model.training
    model.eval()


def test_the_set_is_fixed_by_the_seed(world):
    _, template = world
    sets = [scoreboard.held_out_set(small_pairs(20), template, 96, 5, seed) for seed in (1, 1, 2)]
    assert sets[0] == sets[1] != sets[2]


def test_no_validation_pair_that_fits():
    template = prompts.template_for(make_tokenizer())
    with pytest.raises(ValueError, match="no validation pair fits"):
        scoreboard.held_out_set([{"prompt": "p", "response": "word " * 99}], template, 20, 5, 0)


def test_repetition():
    assert scoreboard.repetition("one two three four five") == 0
    assert scoreboard.repetition("") == 0
    assert scoreboard.repetition("a b c d " * 10) > 0.8


def test_columns_are_recorded_one_by_one(tmp_path):
    path = tmp_path / "scoreboard.json"
    scoreboard.record(path, after={"loss": 1.0, "samples": []})
    board = scoreboard.record(path, before={"loss": 2.0, "samples": []})
    assert list(board) == ["before", "after"]
    assert read_json(path) == board
    assert scoreboard.figures(board).loc["loss", "before"] == 2.0


def test_own_questions_stand_in_the_table_and_count_in_no_figure(world, tmp_path):
    model, template = world
    known = known_pairs()
    chosen = small_settings(tmp_path, "m", judge_exact_match=True, max_new_tokens=48, eval_answers=2)
    held_out = scoreboard.held_out_set(known, template, 200, 4, 1)
    plain = scoreboard.measure(model, held_out, template, chosen)
    asked = dataclasses.replace(chosen, own_questions=["What is\nthis?", known[0]["prompt"]])
    scores = scoreboard.measure(model, held_out, template, asked)
    assert {name: scores[name] for name in plain} | {"seconds": plain["seconds"]} == plain
    board = {"before": plain | {"own": []}, "after": scores}
    assert len(scoreboard.side_by_side(board)) == 2, "the base was not asked"
    table = scoreboard.side_by_side({"before": scores, "after": scores})
    assert table["prompt"].tolist()[:2] == asked.own_questions and len(table) == 4
    assert table["after"][1].removesuffix(" … (did not stop)") == scores["own"][1]["text"]
