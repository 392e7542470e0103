"""Run all a second time, after something was changed, lost or damaged in between."""

import datetime
import shutil

import pytest
from inference_fixtures import ask
from training_fixtures import digest, prepare, small_pairs, small_settings

from llm_finetuning import models, prompts
from llm_finetuning.training import checkpoints, planning, qlora
from llm_finetuning.training import resumable as training
from llm_finetuning.training.dataset import encode_inputs

RUN = {"max_steps": 2, "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    small = prepare(small_settings(folder, tiny_base, **RUN))
    training.train(small.trainer)
    training.save_adapter(small.trainer)
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the folder of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def plan(folder, base, pairs=None, **changed):
    chosen, pairs = small_settings(folder, base, **RUN | changed), pairs or small_pairs()
    return planning.plan_run(chosen, encode_inputs(chosen, models.tokenizer(str(base)), pairs, small_pairs()))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.002 in the checkpoint, 0.001 now"),
        ({"lora_r": 8, "seed": 9}, "(?s)lora_r: 4 in the checkpoint, 8 now.*seed: 7 in the checkpoint, 9 now"),
        ({"pairs": small_pairs(23)}, "the training pairs changed"),
        ({"system_message": "Be long."}, "the chat template or its system message changed"),
    ],
)
def test_what_was_changed_is_said_before_the_base_is_loaded(changed, words, tiny_base, again, monkeypatch):
    monkeypatch.setattr(qlora, "load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(ValueError, match=words) as raised:
        plan(again, tiny_base, **changed)
    assert "set resume = False to start afresh" in str(raised.value)


@pytest.mark.parametrize("changed", [{}, {"resume": False, "learning_rate": 1e-3}, {"find_learning_rate": True}])
def test_what_does_not_belong_to_the_run_is_planned(changed, tiny_base, again):
    """A search decides the rate later: it may find the one that was trained with."""
    rate = {"learning_rate": 1e-3} if changed.get("find_learning_rate") else {}
    assert plan(again, tiny_base, **changed, **rate).steps > 0


def test_a_lost_adapter_is_written_again_without_a_step(tiny_base, again):
    before = digest(again / "adapter")
    shutil.rmtree(again / "adapter")
    small = prepare(small_settings(again, tiny_base, **RUN))
    outcome = training.train(small.trainer)
    training.save_adapter(small.trainer)
    assert outcome.ended_by == "finished before" and digest(again / "adapter") == before


@pytest.mark.parametrize("text", ['{"lora_r": \n}\n', "[1]}\n", "\xff}\n"])
def test_a_damaged_note_of_a_checkpoint_is_named(text, tiny_base, again):
    """The plan passes over it, for the checkpoint is none to go on from; training names it, and what to do."""
    newest = checkpoints.found(again / "checkpoints")[-1]
    (newest / "run.json").write_text(text, encoding="latin-1")
    small = prepare(small_settings(again, tiny_base, **RUN))
    with pytest.raises(ValueError, match=f"the files of .*{newest.name} are not those that were written"):
        training.train(small.trainer)


def test_a_run_whose_template_writes_the_day_goes_on_tomorrow(clock, tiny_base, tmp_path):
    """What is trained stays to the token; what a user asks is asked under the day's own date."""
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\\n' }}" + prompts.PHI2_FORMAT)
    outcomes, asked = [], []
    for day, steps in enumerate((2, 4)):
        clock(day)
        chosen = small_settings(tmp_path / "run", tiny_base, **RUN | {"max_steps": steps}, chat_template=str(dated))
        small = prepare(chosen)
        outcomes.append(training.train(small.trainer))
        asked_of_user = prompts.template_for(models.tokenizer(str(tiny_base)), "", chosen.chat_template)
        asked.append(asked_of_user.tokenizer.decode(prompts.render(ask("Which day is it?"), asked_of_user)))
    assert [outcome.resumed_from for outcome in outcomes] == [None, "checkpoint-2"]
    days = [datetime.datetime.strptime(text[12:23], "%d %b %Y") for text in asked]
    assert days[0] + datetime.timedelta(days=1) == days[1] and days[0].year > 2024
