"""What the tiny Phi learns from the sample: to answer, and of what people prefer no more than the responses show."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_fixtures import prepare

from llm_finetuning import models, prompts
from llm_finetuning.data import preferences
from llm_finetuning.data import prepare as data
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.runner import parameters
from llm_finetuning.sample import TRAIN, VALIDATION, generic_passages
from llm_finetuning.settings import DataPrep, Finetuning
from llm_finetuning.training.dataset import read_inputs
from llm_finetuning.training.resumable import train

pytestmark = pytest.mark.more


def settings_of(kind: type, folder: Path):
    """The sample profile's settings of a notebook, with everything in `folder` and no evaluation on the way."""
    given = parameters.read_profile("sample") | {"drive_folder": str(folder), "work_folder": str(folder)}
    given |= {"eval_steps": 0, "save_steps": 10_000, "eval_pairs": 150, "eval_answers": 150}
    return kind(**{field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given})


def log_likelihoods(model, template, record: dict) -> list[tuple[float, int]]:
    """[(log-likelihood, tokens) of the chosen response, of the rejected one]"""
    found = []
    for side in ("chosen", "rejected"):
        pair = {"prompt": record["prompt"], "history": record["history"], "response": record[side]}
        example = prompts.encode(pair, template)
        tokens = sum(label != prompts.IGNORE_INDEX for label in example["labels"])
        found.append((-scoreboard.held_out_loss(model, [example], template) * tokens, tokens))
    return found


@torch.no_grad()
def agreement(model, template, records: list[dict]) -> tuple[float, float]:
    """Share of the ranked pairs whose chosen response is likelier, as a whole and per token."""
    pairs = [log_likelihoods(model, template, record) for record in records]
    whole = sum(one > other for (one, _), (other, _) in pairs)
    return whole / len(pairs), sum(one / n > other / m for (one, n), (other, m) in pairs) / len(pairs)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, sample_base) -> SimpleNamespace:
    """The sample profile's training, with what was measured before and after it."""
    folder = tmp_path_factory.mktemp("learned")
    shutil.copytree(sample_base, folder / "base" / sample_base.name)
    rules, chosen = settings_of(DataPrep, folder), settings_of(Finetuning, folder)
    template = prompts.template_for(models.tokenizer("sample"), rules.system_message)
    for split in (TRAIN, VALIDATION):
        data.write(one := data.prepare(rules, data.read(rules, split), template))
    data.check_leaks(one, template)
    run = prepare(chosen, inputs=read_inputs(chosen))
    ranked = preferences.read(chosen.folders.val_preferences)
    with run.model.disable_adapter():
        before = agreement(run.model, run.template, ranked)
    train(run.trainer)
    scores = scoreboard.measure(run.model, run.held_out, run.template, chosen)
    return SimpleNamespace(
        run=run, ranked=ranked, before=before, after=agreement(run.model, run.template, ranked), scores=scores
    )


def test_it_learns_to_answer_in_sentences_lists_and_code(learned):
    assert learned.scores["stop_rate"] >= 0.95 and learned.scores["exact_match"] >= 0.8
    right = [sample["text"] for sample in learned.scores["samples"] if sample["text"] == sample["reference"]]
    assert any("\n- " in text for text in right) and any("\n```" in text for text in right)


def test_ranks_are_not_learned_from_the_best_replies_alone(learned):
    assert len(learned.ranked) >= 100
    assert max(learned.before) <= 0.7
    assert all(0.55 <= share <= 0.8 for share in learned.after)


def test_the_generic_text_has_a_loss_that_differs_between_passages(learned):
    template = learned.run.template
    ids = [template.tokenizer(passage).input_ids for passage in generic_passages()]
    losses = [scoreboard.held_out_loss(learned.run.model, [{"input_ids": i, "labels": i}], template) for i in ids]
    assert all(0 < loss < 20 for loss in losses) and len({round(loss, 3) for loss in losses}) == len(losses)
