"""Preference tuning at the edges of what it is given: few pairs, odd pairs, odd numbers, and the same run again."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from preference_fixtures import SIDES, preference_settings, prepare_preference, small_preferences
from training_fixtures import digest, write_lines

from llm_finetuning import settings
from llm_finetuning.training import selfcheck
from llm_finetuning.training.metrics import Metrics
from llm_finetuning.training.preference import PreferenceTrainer
from llm_finetuning.training.resumable import save_adapter, train


@pytest.fixture
def folder(finetuned, tmp_path) -> Path:
    """A copy of a finished finetuning, to tune further in."""
    shutil.copytree(finetuned, tmp_path / "run")
    return tmp_path / "run"


def tuned(folder: Path, base: Path, records: list[dict] | None = None, **changed):
    """A run on these pairs to its end, its adapter saved; and what the training said."""
    chosen = preference_settings(folder, base, **changed)
    if records:
        write_lines(chosen.folders.train_preferences, records)
    run = prepare_preference(chosen)
    selfcheck.run(run.trainer)
    outcome = train(run.trainer)
    save_adapter(run.trainer)
    return run, outcome


WORDS = "It is so, so, so."
ODD = {
    "one pair": small_preferences(1),
    "chosen begins rejected": [{"prompt": "Q", "chosen": WORDS[:5], "rejected": WORDS}],
    "rejected begins chosen": [{"prompt": "Q", "chosen": WORDS, "rejected": WORDS[:5]}],
    "the same pair twice": small_preferences(1) * 2,
    "either way round": [{"prompt": "Q", "chosen": a, "rejected": b} for a, b in (("yes", "no"), ("no", "yes"))],
    "blanks around": [{"prompt": "Q", "chosen": "  yes \n", "rejected": "\n no"}],
}


@pytest.mark.parametrize("name", [*list(ODD)[:2], *(pytest.param(n, marks=pytest.mark.more) for n in list(ODD)[2:])])
def test_odd_pairs_train(name, folder, tiny_base):
    run, outcome = tuned(folder, tiny_base, ODD[name], max_steps=2)
    assert (outcome.ended_by, outcome.step, len(run.data.pairs)) == ("finished", 2, len(ODD[name]))
    steps = [entry for entry in Metrics(run.settings.folders.metrics).read() if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert all(entry["grad_norm"] > 0 for entry in steps) or name == "either way round"


@pytest.mark.more
def test_three_pairs_with_patience_end(folder, tiny_base):
    changed = {"num_train_epochs": 30.0, "eval_steps": 1, "early_stopping_patience": 1, "pairs_per_step": 2}
    _, outcome = tuned(folder, tiny_base, small_preferences(3), **changed)
    assert outcome.best_loss is not None and outcome.ended_by in ("early stopping", "finished")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_reference_that_is_not_finite_is_refused_and_forgotten(value, folder, tiny_base, monkeypatch):
    computed = PreferenceTrainer.compute_ref_log_probs

    def overflown(self, model, inputs):
        chosen, rejected = computed(self, model, inputs)
        return torch.full_like(chosen, value), rejected

    with monkeypatch.context() as patched:
        patched.setattr(PreferenceTrainer, "compute_ref_log_probs", overflown)
        with pytest.raises(FloatingPointError, match="reference's log-probabilities of 14 of 14 pairs are not finite"):
            prepare_preference(preference_settings(folder, tiny_base))
    rows = prepare_preference(preference_settings(folder, tiny_base)).trainer.train_dataset
    assert all(math.isfinite(sum(rows[f"ref_{side}_logps"])) for side in SIDES)


def test_a_reference_that_does_not_fit_is_a_sentence(folder, tiny_base, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", run_out)
    whole, half = (
        "pairs at a time. Set micro_batch_tokens = 192",
        "Set max_seq_length = 48, micro_batch_tokens = 96 and",
    )
    for tokens, fits in ((384, whole), (192, half)):
        with pytest.raises(MemoryError, match=f"the GPU ran out of memory in the reference's pass.*{fits}"):
            prepare_preference(preference_settings(folder, tiny_base, micro_batch_tokens=tokens))


def test_three_times_is_once(folder, tiny_base):
    ended, digests, kept = [], set(), []
    for _ in range(3):
        _, outcome = tuned(folder, tiny_base, max_steps=2)
        ended.append(outcome.ended_by)
        digests.add(digest(folder / "preference_adapter"))
        names = ("preference_checkpoints", "preference_reference", "preference_metrics.jsonl")
        kept.append({path: path.read_bytes() for name in names for path in files_of(folder / name)})
    assert ended == ["finished", "finished before", "finished before"]
    assert len(digests) == 1 and kept[0] == kept[1] == kept[2]


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@pytest.mark.parametrize("name", ["Sigmoid", " sigmoid", "sigmoid+sft", "sigmoid  + sft", "dpo", "", "sft", "IPO"])
def test_a_loss_that_there_is_not_is_answered_with_those_there_are(name, folder, tiny_base):
    with pytest.raises(ValueError, match=r"loss = .*: one of sigmoid, sigmoid \+ sft, robust, sigmoid_norm, ipo"):
        preference_settings(folder, tiny_base, loss=name)
    assert set(settings.LOSSES) == {"sigmoid", "sigmoid + sft", "robust", "sigmoid_norm", "ipo"}


@pytest.mark.parametrize(
    "changed",
    [
        *({"beta": value} for value in (0.0, -0.1, math.nan, math.inf)),
        *({"label_smoothing": value} for value in (0.5, 0.7, -0.1, math.nan)),
        *({"sft_weight": value} for value in (-1.0, math.nan, math.inf)),
        *({"ld_alpha": value} for value in (-0.1, 1.1, math.nan)),
        *({"pairs_per_step": 0}, {"eval_pairs": 0}, {"learning_rate": 0.0}),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_named(changed, folder, tiny_base):
    with pytest.raises(ValueError, match=f"{next(iter(changed))} = "):
        preference_settings(folder, tiny_base, **changed)
