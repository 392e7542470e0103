"""The search for the learning rate on pairs: one reference for all trainings, and the run with the rate typed in."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from preference_fixtures import BETA, SIDES, beside, plain_logps, plain_loss, prepare_preference
from training_fixtures import digest

from llm_finetuning import settings as all_settings
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.training import figures, qlora, rate_search
from llm_finetuning.training.preference import PreferenceTrainer
from llm_finetuning.training.resumable import save_adapter, train

SUPPORT = Path(__file__).parents[1] / "support"
RATES = [0.00025, 0.0005, 0.001, 0.002, 0.004]
"""Around the small run's 1e-3."""


def searching(finetuned: Path, folder: Path, base: Path, **changed):
    folder.mkdir(exist_ok=True)
    return beside(finetuned, folder, base, **{"max_steps": 3, "find_learning_rate": True} | changed)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Pairs of each batch of which the reference's log-probabilities are computed."""
    counted, computed = [], PreferenceTrainer.compute_ref_log_probs

    def compute(self, model, inputs):
        counted.append(len(inputs["input_ids"]) // 2)
        return computed(self, model, inputs)

    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", compute)
    return counted


def finished(trainer) -> str:
    train(trainer)
    return digest(save_adapter(trainer))


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("sigmoid + sft", marks=pytest.mark.more)])
def test_the_run_is_the_one_with_the_rate_typed_in(loss, finetuned, tiny_base, tmp_path, passes):
    run = prepare_preference(searching(finetuned, tmp_path / "searched", tiny_base, loss=loss))
    once = len(run.data.pairs) + len(run.trainer.run_inputs.ranked)
    trainer, search = rate_search.find(run.trainer, PreferenceTrainer)
    assert list(search.losses) == RATES and len({sample.value for sample in search.finite.values()}) == len(RATES)
    assert sum(passes) == once, "the trainings of the search and the run share one reference"
    assert figures.loss_by_rate(search).axes[0].get_ylabel().startswith("loss of a pair")

    typed = beside(finetuned, tmp_path, tiny_base, max_steps=3, learning_rate=search.best, loss=loss)
    assert finished(trainer) == finished(prepare_preference(typed).trainer)
    saved = json.loads((tmp_path / "searched" / "preference_settings.json").read_text())
    assert (saved["learning_rate"], saved["find_learning_rate"]) == (search.best, False)
    assert not (tmp_path / "searched" / "rate_search").exists(), "that is where a search of the finetuning goes on"


@pytest.mark.parametrize(
    ("loss", "alpha"),
    [
        ("sigmoid", 1.0),
        ("sigmoid + sft", 0.3),
        *(pytest.param(n, 1.0, marks=pytest.mark.more) for n in ("ipo", "robust")),
    ],
)
def test_rates_are_compared_by_the_loss_that_is_minimised(loss, alpha, finetuned, tiny_base, tmp_path):
    changed = {"loss": loss, "ld_alpha": alpha, "label_smoothing": 0.2, "sft_weight": 0.5, "beta": BETA}
    run = prepare_preference(searching(finetuned, tmp_path, tiny_base, **changed))
    ranked, before = run.trainer.run_inputs.ranked, qlora.gather_adapter(run.model)
    with torch.no_grad():
        reference = [[plain_logps(run.model, pair[side]) for side in SIDES] for pair in ranked]
    generator = torch.Generator().manual_seed(5)
    moved = {name: p + 0.05 * torch.randn(p.shape, generator=generator) for name, p in before.items()}
    with qlora.holding(run.model, moved), torch.no_grad():
        ours = [[plain_logps(run.model, pair[side]) for side in SIDES] for pair in ranked]
        found = run.trainer.held_out_losses()
    for value, policy, start in zip(found.values, ours, reference, strict=True):
        likelihood = -0.5 * policy[0].mean() if loss == "sigmoid + sft" else 0
        assert value == pytest.approx((plain_loss(loss, policy, start, 0.2, alpha) + likelihood).item(), rel=1e-4)
    assert not run.trainer._metrics["eval"] and run.trainer.seen_tokens == 0


@pytest.mark.more
def test_an_interrupted_search_goes_on_with_the_reference_that_it_has(finetuned, tiny_base, tmp_path, passes):
    def interrupted(trainer) -> Sample:
        if trainer.settings.learning_rate == RATES[2]:
            raise KeyboardInterrupt
        return trainer.held_out_losses()

    chosen = searching(finetuned, tmp_path, tiny_base, max_steps=2)
    run = prepare_preference(chosen)
    before, counted = qlora.on_cpu(qlora.gather_adapter(run.model)), len(passes)
    with pytest.raises(KeyboardInterrupt):
        rate_search.find(run.trainer, PreferenceTrainer, interrupted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in qlora.gather_adapter(run.model).items())

    built = []

    def build(model, settings, plan, inputs):
        built.append(settings.learning_rate)
        return PreferenceTrainer(model, settings, plan, inputs)

    again = prepare_preference(chosen)  # the machine was gone: all cells once more
    _, search = rate_search.find(again.trainer, build)
    assert built == [*RATES[2:], search.best] and len(passes) == counted


def test_the_plan_counts_the_search(finetuned, tiny_base, tmp_path):
    run = prepare_preference(searching(finetuned, tmp_path, tiny_base, max_steps=100, rate_per_hour=1.0))
    table = dict(run.plan.table().itertuples(index=False))
    assert table["search for the rate"].startswith("5 × 20 steps, ") and "cost" in table["search for the rate"]
    assert run.plan.search_seconds == pytest.approx(run.plan.seconds)


@pytest.mark.more
@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_to_the_same_adapter(finetuned, tiny_base, tmp_path):
    def command(name: str, *rate: str) -> list[str]:
        folder = tmp_path / name
        if not folder.exists():
            folder.mkdir()
            (folder / "data").symlink_to(finetuned / "data")
        words = (folder, tiny_base, finetuned / "adapter", 3, *rate)
        return [sys.executable, str(SUPPORT / "prefer_small.py"), *map(str, words)]

    for word in ("0.00025: held-out", "0.001: held-out", "0.004: held-out"):
        with subprocess.Popen(command("killed", "find"), cwd=SUPPORT.parents[1], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True) as run:  # fmt: skip
            for line in run.stdout:
                if word in line:
                    run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL
    subprocess.run(command("killed", "find"), cwd=SUPPORT.parents[1], check=True, capture_output=True)
    file = tmp_path / "killed" / "preference_settings.json"
    found = all_settings.from_file(all_settings.PreferenceTuning, file).learning_rate
    subprocess.run(command("typed", str(found)), cwd=SUPPORT.parents[1], check=True, capture_output=True)
    assert digest(tmp_path / "killed" / "preference_adapter") == digest(tmp_path / "typed" / "preference_adapter")
