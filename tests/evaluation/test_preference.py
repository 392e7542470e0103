"""What preference tuning changes: figures of pairs, the divergence from a reference, and what is warned of."""

import contextlib

import pytest
import torch
from preference_fixtures import preference_settings, small_preferences
from training_fixtures import small_pairs
from transformers import AutoModelForCausalLM

from llm_finetuning import models, prompts
from llm_finetuning.evaluation import agreement, preference, scoreboard
from llm_finetuning.files.atomic import read_json


@pytest.fixture(scope="module")
def template(tiny_base):
    return prompts.template_for(models.tokenizer(str(tiny_base)))


@pytest.fixture
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ranked(template):
    return agreement.ranked_pairs(small_preferences(6), template, 96)


@contextlib.contextmanager
def shifted(model, by: float):
    """A block in which the model's head has other biases."""
    bias = model.get_output_embeddings().bias
    noise = by * torch.randn(bias.shape, generator=torch.Generator().manual_seed(1))
    bias.data += noise
    try:
        yield
    finally:
        bias.data -= noise


def test_divergence_is_that_of_the_distributions_at_the_response(model, ranked):
    example = ranked[0]["chosen"]
    found = preference.divergence(model, lambda: shifted(model, 0.5), [example])

    def log_probabilities():
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].double()
        return logits.log_softmax(-1)[example["labels"].count(-100) - 1 :]

    with torch.no_grad():
        ours = log_probabilities()
        with shifted(model, 0.5):
            theirs = log_probabilities()
    expected = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="sum")
    assert found.values[0] == pytest.approx(expected.item(), rel=1e-4) and found.values[0] > 0.01
    assert found.weights == [len(ours)]
    same = preference.divergence(model, lambda: shifted(model, 0.0), [example])
    assert same.value == pytest.approx(0, abs=1e-6)


def test_divergence_is_the_same_in_slices(model, ranked, monkeypatch):
    examples = [ranked[0]["chosen"]]
    whole = preference.divergence(model, lambda: shifted(model, 0.5), examples)
    monkeypatch.setattr(preference, "SLICE", 3)
    sliced = preference.divergence(model, lambda: shifted(model, 0.5), examples)
    assert whole.weights == sliced.weights and whole.weights[0] > 3
    assert sliced.value == pytest.approx(whole.value, rel=1e-6)


def test_figures_of_pairs_equal_those_of_each_response_alone(model, ranked, template):
    found = preference.likelihoods(model, ranked, template)
    for number, pair in enumerate(ranked):
        mean = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair[side]["input_ids"]])
            with torch.no_grad():
                loss = model(input_ids=ids, labels=torch.tensor([pair[side]["labels"]])).loss
            mean[side] = -loss.item()
        assert found["margin"].values[number] == pytest.approx(mean["chosen"] - mean["rejected"], abs=1e-4)
        assert found["accuracy"].values[number] == (mean["chosen"] > mean["rejected"])
    assert found["accuracy"].value == found["rank_agreement"].value


def test_a_column_tells_what_changed_on_the_same_pairs(model, ranked, template, tmp_path, tiny_base):
    chosen = preference_settings(tmp_path, tiny_base)
    held_out = scoreboard.held_out_set(small_pairs(6), template, 96, 4, 0)
    scoreboard.record(chosen.folders.scoreboard, merged={"loss": 9.0})
    board = preference.column("before", model, held_out, template, chosen, ranked)
    assert list(board) == ["before"], "a new start begins a new scoreboard"
    with shifted(model, 2.0):
        kl = preference.divergence(model, lambda: shifted(model, -2.0), [ranked[0]["chosen"]])
        board = preference.column("after", model, held_out, template, chosen, ranked, kl)
    before, after = board["before"], board["after"]
    assert read_json(chosen.folders.scoreboard) == board
    for name in ("accuracy", "margin", "chosen_logp", "rejected_logp"):
        assert after["change"][name]["value"] == pytest.approx(after[name] - before[name])
        assert set(after["intervals"][name]) == {"low", "high", "n"} and after["change"][name]["n"] == len(ranked)
    assert {"loss", "perplexity", "stop_rate", "answer_words", "kl"} <= set(after)
    assert list(preference.changes(board).columns) == ["after"]
    assert "margin" in scoreboard.table(board).index


@pytest.mark.parametrize(
    ("changed", "number"),
    [
        ({}, 0),
        ({"chosen_logp": -0.6}, 1),
        ({"loss": 1.3}, 1),
        ({"answer_words": 13.0}, 1),
        ({"loss": 2.0, "answer_words": 20.0}, 2),
    ],
)
def test_what_fell_or_grew_that_should_not_is_said(changed, number):
    figures = {"chosen_logp": -0.5, "loss": 1.0, "answer_words": 10.0}
    assert len(preference.warnings({"before": figures, "after": figures | changed})) == number


def test_nothing_is_said_of_answers_that_were_not_asked_for():
    figures = {"chosen_logp": -0.5, "loss": 1.0}
    assert preference.warnings({"before": figures, "after": figures}) == []
