"""The search for the learning rate: what it decides, and that the run after it is the one with that rate typed in."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_fixtures import prepare, small_pairs, small_settings, write_lines

from llm_finetuning import models
from llm_finetuning import settings as all_settings
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.training import callbacks, figures, planning, rate_search, selfcheck
from llm_finetuning.training.dataset import encode_inputs
from llm_finetuning.training.resumable import save_adapter, train
from llm_finetuning.training.trainer import AssistantTrainer

ROOT = Path(__file__).parents[2]
RATES = [0.0005, 0.001, 0.002, 0.004, 0.008]
"""Around the small run's 2e-3."""


def searching(folder: Path, base: Path, **changed):
    """Settings of a short run that searches; dropout draws random numbers in each training."""
    return small_settings(folder, base, **{"max_steps": 4, "find_learning_rate": True, "lora_dropout": 0.1} | changed)


@pytest.fixture
def untrained(monkeypatch):
    """Trainings are left out where a measure of ours decides anyway."""
    monkeypatch.setattr(rate_search, "train", lambda trainer: None)


class Counting:
    """Builds trainers and notes the learning rate and the steps of each."""

    def __init__(self):
        self.built = []

    def __call__(self, model, settings, plan, inputs):
        trainer = AssistantTrainer(model, settings, plan, inputs)
        self.built.append((settings.learning_rate, trainer.steps))
        return trainer


def best_at(rate: float):
    """A measure of ours in which one rate is the best by far, whatever was trained."""

    def measure(trainer) -> Sample:
        distance = abs(math.log(trainer.settings.learning_rate / rate))
        return Sample([distance + 0.01 * unit for unit in range(8)], [1.0] * 8)

    return measure


def adapter_of(trainer) -> dict[str, bytes]:
    """Trains to the end; the files of the adapter, the folders in its settings left out."""
    train(trainer)
    folder = save_adapter(trainer)
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "SHA256SUMS"}
    settings = json.loads(files.pop("settings.json"))
    return files | {name: value for name, value in settings.items() if not name.endswith("_folder")}


def test_the_run_is_the_one_with_the_rate_typed_in(tiny_base, tmp_path):
    run = prepare(searching(tmp_path / "searched", tiny_base))
    selfcheck.run(run.trainer)
    trainer, search = rate_search.find(run.trainer, AssistantTrainer)
    assert list(search.losses) == RATES and search.best in RATES
    assert search.finite[search.best].value == min(sample.value for sample in search.finite.values())
    assert len({sample.value for sample in search.finite.values()}) == len(RATES)

    typed = small_settings(tmp_path / "typed", tiny_base, max_steps=4, learning_rate=search.best)
    assert adapter_of(trainer) == adapter_of(prepare(typed).trainer)
    saved = all_settings.from_file(all_settings.Finetuning, tmp_path / "searched" / "settings.json")
    assert (saved.learning_rate, saved.find_learning_rate) == (search.best, False)


def test_without_the_parameter_nothing_is_searched(tiny_base, tmp_path):
    run = prepare(searching(tmp_path, tiny_base, find_learning_rate=False))
    assert rate_search.find(run.trainer, None) == (run.trainer, None)
    assert not run.settings.folders.rate_search.exists()


def test_the_given_measure_decides(tiny_base, tmp_path, capsys, untrained):
    run = prepare(searching(tmp_path, tiny_base, max_steps=1))
    trainer, search = rate_search.find(run.trainer, AssistantTrainer, best_at(RATES[4]))
    assert trainer.settings.learning_rate == trainer.args.learning_rate == trainer.plan.settings.learning_rate == 0.008
    assert "learning_rate = 0.008" in str(search) and "excludes zero" in str(search) and "highest" in str(search)
    assert capsys.readouterr().out.count("held-out loss") == len(RATES)


@pytest.mark.parametrize("finished", [2, *(pytest.param(place, marks=pytest.mark.more) for place in (0, 4))])
def test_an_interrupted_search_goes_on(tiny_base, tmp_path, untrained, finished):
    def interrupted(trainer):
        for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
            torch.nn.init.normal_(parameter)  # as a training would leave them
        if trainer.settings.learning_rate == RATES[finished]:
            raise KeyboardInterrupt
        return best_at(RATES[1])(trainer)

    run = prepare(searching(tmp_path, tiny_base, max_steps=2))
    before = {n: p.clone() for n, p in run.model.named_parameters() if p.requires_grad}
    with pytest.raises(KeyboardInterrupt):
        rate_search.find(run.trainer, AssistantTrainer, interrupted)
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters() if p.requires_grad)

    again = Counting()
    trainer, search = rate_search.find(run.trainer, again, best_at(RATES[1]))  # the same cell once more
    assert [rate for rate, _ in again.built] == [*RATES[finished:], RATES[1]]
    assert trainer.settings.learning_rate == search.best == RATES[1]
    afterwards = Counting()
    rate_search.find(prepare(searching(tmp_path, tiny_base, max_steps=2)).trainer, afterwards)  # all cells once more
    assert afterwards.built == [(RATES[1], 2)]


@pytest.mark.more
@pytest.mark.parametrize("changed", [{"lora_alpha": 16}, {"resume": False}, {"learning_rate": 1e-3}, {"seed": 8}])
def test_a_search_of_another_run_counts_for_nothing(tiny_base, tmp_path, untrained, changed):
    rate_search.find(prepare(searching(tmp_path, tiny_base, max_steps=1)).trainer, AssistantTrainer)
    again = Counting()
    rate_search.find(prepare(searching(tmp_path, tiny_base, max_steps=1, **changed)).trainer, again)
    assert len(again.built) == len(RATES) + 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\0", '{"losses": 3}', '{"trainings": {"steps": 2}, "losses": {"a": null}}']
)
def test_a_record_that_is_none_counts_for_nothing(tmp_path, text):
    path = tmp_path / "rate_search.json"
    path.write_text(text)
    losses = rate_search.Losses(path, {"steps": 1})
    assert not losses.same and losses.found == {}
    losses.put("a", Sample([1.0, 3.0], [1.0, 1.0]))
    losses.put("b", Sample([math.nan], [1.0]))
    again = rate_search.Losses(path, {"steps": 1})
    assert again.get("a").value == 2.0 and again.get("b") is None


def test_rates_that_diverge_are_passed_over(tiny_base, tmp_path, untrained):
    def measure(trainer):
        if trainer.settings.learning_rate > RATES[1]:
            raise FloatingPointError("the loss is nan at step 1")
        return Sample([math.nan if trainer.settings.learning_rate == RATES[1] else 1.0] * 8, [1.0] * 8)

    run = prepare(searching(tmp_path, tiny_base, max_steps=1))
    trainer, search = rate_search.find(run.trainer, AssistantTrainer, measure)
    assert trainer.settings.learning_rate == RATES[0] and list(search.finite) == RATES[:1]
    assert "lowest" in str(search)
    assert figures.loss_by_rate(search).alt_text().startswith("Held-out loss")


def test_one_pair_and_one_step_are_enough_to_search_with(tiny_base, tmp_path):
    run = prepare(searching(tmp_path, tiny_base, max_steps=1), small_pairs(1))
    trainer, search = rate_search.find(run.trainer, AssistantTrainer)
    assert search.steps == trainer.steps == 1 and {len(sample.values) for sample in search.losses.values()} == {1}
    assert "does not exclude zero" in str(search) and "(n = 1)" in rate_search.shown(search.losses[search.best])
    assert figures.loss_by_rate(search).alt_text().startswith("Held-out loss")


def test_early_stopping_watches_the_run_and_not_the_search(tiny_base, tmp_path, monkeypatch):
    run = prepare(searching(tmp_path, tiny_base, max_steps=2, eval_steps=1, early_stopping_patience=1))
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Monitor, "evaluate", lambda *given: pytest.fail("evaluated"))
        trainer, _ = rate_search.find(run.trainer, AssistantTrainer)
    assert (trainer.settings.patience, trainer.settings.eval_steps) == (1, 1)
    assert train(trainer).best_loss is not None


def test_no_finite_rate_is_an_error(tiny_base, tmp_path):
    run = prepare(searching(tmp_path, tiny_base, max_steps=2, learning_rate=1e30, lr_scheduler_type="constant"))
    with pytest.raises(FloatingPointError, match="at none of the learning rates.*lower"):
        rate_search.find(run.trainer, AssistantTrainer)
    assert all(p.isfinite().all() for p in run.model.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def inputs(tiny_base):
    return encode_inputs(
        searching(Path("."), tiny_base), models.tokenizer(str(tiny_base)), small_pairs(), small_pairs()
    )


def test_the_plan_counts_the_search(tiny_base, tmp_path, inputs):
    searched = planning.plan_run(searching(tmp_path, tiny_base, max_steps=100, rate_per_hour=1.0), inputs)
    plain = dataclasses.replace(searched, settings=searching(tmp_path, tiny_base, find_learning_rate=False))
    line = searched.table().set_index("what").plan["search for the rate"]
    assert line.startswith("5 × 20 steps, ") and "cost" in line
    assert searched.search_seconds == pytest.approx(searched.seconds) and plain.search_seconds == 0
    assert "search for the rate" not in set(plain.table().what)
    steps = [dataclasses.replace(searched, steps=steps).search_steps for steps in (3, 20, 100, 200, 900)]
    assert steps == [3, 20, 20, 40, 60]


def test_several_processes_are_refused_before_the_base_is_loaded(tiny_base, tmp_path, monkeypatch, inputs):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="find_learning_rate = True: 2 processes"):
        planning.plan_run(searching(tmp_path, tiny_base), inputs)


@pytest.mark.more
@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_to_the_same_adapter(tiny_base, tmp_path):
    def command(folder: Path, **changed) -> list[str]:
        made = searching(folder, tiny_base, max_steps=12, save_steps=2, **changed)
        for file in (made.folders.train_file, made.folders.val_file):
            write_lines(file, small_pairs())
        return [sys.executable, "-m", "llm_finetuning.train", str(made.save(made.folders.settings))]

    killed = command(tmp_path / "killed")
    for word in ("0.0005: held-out", "0.002: held-out", "0.008: held-out"):
        with subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
            for line in run.stdout:
                if word in line:
                    run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL
    subprocess.run(killed, cwd=ROOT, check=True, capture_output=True)
    found = all_settings.from_file(all_settings.Finetuning, tmp_path / "killed" / "settings.json").learning_rate
    subprocess.run(
        command(tmp_path / "typed", learning_rate=found, find_learning_rate=False),
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    first, second = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("killed", "typed"))
    assert first.read_bytes() == second.read_bytes()


def test_the_recipe_quotes_what_was_measured_on_the_sample(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import learning_rate

    record = json.loads(learning_rate.RESULTS.read_text(encoding="utf-8"))
    assert learning_rate.table(record) in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert all(0.5 <= factor <= 2 for factor in learning_rate.factors(record)), "the search's rate over the sweep's"
