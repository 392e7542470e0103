"""Preference tuning: what the reference is, what the loss is, and that nothing is lost when the process dies."""

import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from preference_fixtures import (
    BETA,
    SIDES,
    beside,
    plain_logps,
    plain_loss,
    plain_model,
    preference_settings,
    prepare_preference,
    small_preferences,
)
from safetensors.torch import load_file, save_file
from training_fixtures import digest, small_pairs, write_lines

from llm_finetuning.files import checksums
from llm_finetuning.training import checkpoints, qlora, selfcheck
from llm_finetuning.training.metrics import Metrics
from llm_finetuning.training.preference import PreferenceTrainer
from llm_finetuning.training.resumable import save_adapter, train

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def run(finetuned, tiny_base, tmp_path_factory):
    """A prepared run that is not trained."""
    return prepare_preference(beside(finetuned, tmp_path_factory.mktemp("run"), tiny_base))


def test_the_reference_is_the_finetuned_model_to_1e_4(run, finetuned, tiny_base):
    """Beside plain transformers and PEFT on the same 4-bit base and adapter, in float32."""
    plain = plain_model(tiny_base, finetuned / "adapter")
    for row, pair in zip(run.trainer.train_dataset, run.data.pairs, strict=True):
        for side in SIDES:
            with torch.no_grad():
                expected = plain_logps(plain, pair[side]).sum()
                policy = plain_logps(run.model, pair[side]).sum()
            assert row[f"ref_{side}_logps"] == pytest.approx(expected.item(), abs=1e-4)
            assert policy.item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_loss_begins_at_ln_2(run):
    batch = run.trainer.data_collator([run.trainer.train_dataset[i] for i in range(4)])
    assert run.trainer.compute_loss(run.model, batch).item() == pytest.approx(math.log(2), abs=1e-5)


def test_in_16_bits_the_adapter_starts_as_it_was_saved(finetuned, tiny_base, tmp_path):
    """As on a GPU, with activation checkpointing: nothing of the float32 adapter is rounded on the way."""
    changed = {"dtype": "bfloat16", "gradient_checkpointing": "on"}
    run = prepare_preference(beside(finetuned, tmp_path, tiny_base, **changed))
    saved = load_file(finetuned / "adapter" / "adapter_model.safetensors")
    for name, tensor in qlora.gather_adapter(run.model).items():
        assert torch.equal(tensor, saved[name.replace(".default.", ".")]), name
    batch = run.trainer.data_collator([run.trainer.train_dataset[i] for i in range(4)])
    loss = run.trainer.compute_loss(run.model, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=0.02)
    assert gradients_of(run.model, loss).abs().sum() > 0


def test_one_adapter_is_left_and_trained_in_float32(run):
    assert list(run.model.peft_config) == ["default"]
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert len(trained) == 24 and all(".default." in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert not [name for name, _ in run.model.named_parameters() if ".ref." in name]


def test_responses_are_whole_and_end(run):
    stops = run.template.stop_token_ids
    for row, pair in zip(run.trainer.train_dataset, run.data.pairs, strict=True):
        for side in SIDES:
            assert row["prompt_ids"] + row[f"{side}_ids"] == pair[side]["input_ids"]
            assert row[f"{side}_ids"][-1] in stops
            text = run.template.tokenizer.decode(row[f"{side}_ids"][:-1]).strip()
            assert text == pair["record"][side].strip()


LOSSES = [("sigmoid", 1.0), ("sigmoid + sft", 1.0), ("robust", 1.0), ("sigmoid_norm", 1.0), ("ipo", 1.0)]
LOSSES += [("sigmoid", 0.3)]
MORE = [pytest.param(*loss, marks=pytest.mark.more) for loss in LOSSES[2:5]]


@pytest.mark.parametrize(("name", "alpha"), [*LOSSES[:2], LOSSES[5], *MORE])
def test_loss_and_gradients_of_three_pairs_equal_a_plain_implementation(name, alpha, finetuned, tiny_base, tmp_path):
    changed = {"loss": name, "ld_alpha": alpha, "label_smoothing": 0.2, "sft_weight": 0.5, "beta": BETA}
    run = prepare_preference(beside(finetuned, tmp_path, tiny_base, **changed))
    pairs = run.data.pairs[:3]
    with torch.no_grad():
        reference = [[plain_logps(run.model, pair[side]) for side in SIDES] for pair in pairs]
    generator = torch.Generator().manual_seed(5)
    before = qlora.gather_adapter(run.model)
    with qlora.holding(run.model, {n: p + 0.05 * torch.randn(p.shape, generator=generator) for n, p in before.items()}):
        ours = [[plain_logps(run.model, pair[side]) for side in SIDES] for pair in pairs]
        expected = sum(plain_loss(name, *both, 0.2, alpha) for both in zip(ours, reference, strict=True)) / 3
        if name == "sigmoid + sft":
            expected = expected - 0.5 * torch.cat([side for side, _ in ours]).mean()
        gradients = gradients_of(run.model, expected)
        batch = run.trainer.data_collator([run.trainer.train_dataset[i] for i in range(3)])
        found = run.trainer.compute_loss(run.model, batch)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        assert abs(expected.item() - math.log(2)) > 1e-3, "the adapter has moved"
        assert (gradients_of(run.model, found) - gradients).norm() <= 1e-3 * gradients.norm()


def gradients_of(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found.clone()


def test_selfcheck_measures_and_leaves_no_trace(run):
    before = torch.random.get_rng_state()
    checks = selfcheck.run(run.trainer)
    assert torch.equal(before, torch.random.get_rng_state())
    assert checks.seconds > 0 and checks.memory > 0
    assert all(p.grad is None for p in run.model.parameters())
    assert run.trainer.seen_tokens == 0 and not run.trainer._metrics["train"]


@pytest.fixture
def folder(finetuned, tmp_path) -> Path:
    """A copy of a finished finetuning, to tune further in."""
    shutil.copytree(finetuned, tmp_path / "run")
    return tmp_path / "run"


def tuned(folder: Path, base: Path, **changed):
    """A small run that was tuned to its end, its adapter saved; and what the tuning said."""
    run = prepare_preference(preference_settings(folder, base, **changed))
    outcome = train(run.trainer)
    save_adapter(run.trainer)
    return run, outcome


def test_a_run_learns_the_preference_and_leaves_the_finetuning_as_it_was(folder, tiny_base):
    before = {path: path.read_bytes() for path in (folder / "adapter").iterdir()}
    run, outcome = tuned(folder, tiny_base, num_train_epochs=4.0, eval_steps=4)
    entries = Metrics(run.settings.folders.metrics).read()
    evaluated = [entry for entry in entries if "accuracy" in entry]
    assert evaluated[0]["kl"] == pytest.approx(0, abs=1e-5) and evaluated[-1]["kl"] > 1e-4
    assert evaluated[-1]["margin"] > evaluated[0]["margin"]
    steps = [entry for entry in entries if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and steps[-1]["loss"] < 0.6
    assert {"rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"} <= set(steps[-1])
    assert {path: path.read_bytes() for path in (folder / "adapter").iterdir()} == before
    saved = folder / "preference_adapter"
    assert checksums.verify_checksums(saved) and not (saved / "ref").exists()
    for checkpoint in checkpoints.complete(folder / "preference_checkpoints"):
        assert not (checkpoint / "ref").exists()
    loaded = plain_model(tiny_base, saved).train(False)
    example = run.data.pairs[0]["chosen"]
    with torch.no_grad():
        assert torch.allclose(plain_logps(loaded, example), plain_logps(run.model, example), atol=1e-4)
    first = digest(saved)
    again, second = tuned(folder, tiny_base, num_train_epochs=4.0, eval_steps=4)
    assert (outcome.ended_by, second.ended_by) == ("finished", "finished before")
    assert digest(saved) == first
    assert again.trainer.seen_tokens == 0


def test_the_reference_is_computed_once(folder, tiny_base, monkeypatch):
    first = prepare_preference(preference_settings(folder, tiny_base)).trainer.train_dataset[:]
    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("computed again"))
    assert prepare_preference(preference_settings(folder, tiny_base)).trainer.train_dataset[:] == first
    assert not list((folder / "adapter").glob("*.arrow")) and list((folder / "preference_reference").rglob("*.arrow"))


def test_another_weight_of_length_has_a_reference_of_its_own(folder, tiny_base):
    """TRL's cache goes by pairs and weights alone."""
    plain, weighted = (
        prepare_preference(preference_settings(folder, tiny_base, ld_alpha=alpha)).trainer for alpha in (1.0, 0.2)
    )
    assert plain.train_dataset["ref_chosen_logps"] != weighted.train_dataset["ref_chosen_logps"]
    batch = weighted.data_collator([weighted.train_dataset[i] for i in range(4)])
    assert weighted.compute_loss(weighted.model, batch).item() == pytest.approx(math.log(2), abs=1e-5)


def test_patience_goes_by_the_accuracy_on_held_out_pairs(folder, tiny_base):
    changed = {"learning_rate": 0.3, "num_train_epochs": 20.0, "eval_steps": 1, "early_stopping_patience": 2}
    run, outcome = tuned(folder, tiny_base, **changed)
    evaluated = [entry for entry in Metrics(run.settings.folders.metrics).read() if "accuracy" in entry]
    assert outcome.ended_by == "early stopping" and outcome.step < outcome.of
    assert outcome.best_loss == 1 - max(entry["accuracy"] for entry in evaluated)
    assert run.trainer.figures()["accuracy"] == pytest.approx(1 - outcome.best_loss)


@pytest.mark.parametrize("changed", [{"beta": 0.3}, {"loss": "ipo"}, {"pairs_per_step": 6}])
def test_a_run_of_other_settings_does_not_go_on(changed, folder, tiny_base):
    tuned(folder, tiny_base, max_steps=2)
    with pytest.raises(ValueError, match=f"{next(iter(changed))}: .* in the checkpoint, .* now"):
        tuned(folder, tiny_base, max_steps=3, **changed)


def test_another_finetuned_adapter_does_not_go_on_with_the_old_run(folder, tiny_base):
    tuned(folder, tiny_base, max_steps=2)
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in weights.items()}, folder / "adapter" / "adapter_model.safetensors"
    )
    (folder / "adapter" / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="the adapter that the run starts from changed"):
        tuned(folder, tiny_base, max_steps=3)


@pytest.mark.more
def test_swapped_pairs_teach_the_contrary_and_shuffled_ones_nothing(finetuned, tiny_base, tmp_path):
    """Held-out pairs as they are, after training on pairs as they are, all exchanged, and half of them, drawn.

    Both responses begin almost equally probable here, so that a margin that stays may cost accuracy.
    """

    def tuned_on(name: str, exchanged: Callable[[int], bool]) -> list[dict]:
        chosen = preference_settings(tmp_path / name, tiny_base, adapter_folder=str(finetuned / "adapter"),
                                     num_train_epochs=6.0, eval_pairs=60)  # fmt: skip
        write_lines(chosen.folders.val_file, small_pairs(110)[100:])
        write_lines(chosen.folders.val_preferences, small_preferences(40, 50))
        records = [swapped(r) if exchanged(n) else r for n, r in enumerate(small_preferences(40))]
        write_lines(chosen.folders.train_preferences, records)
        run = prepare_preference(chosen)
        before = run.trainer.figures()
        train(run.trainer)
        return [before, run.trainer.figures()]

    start, learned = tuned_on("as they are", lambda number: False)
    assert learned["accuracy"] >= start["accuracy"] and learned["margin"] > start["margin"] + 0.1
    assert tuned_on("exchanged", lambda number: True)[1]["accuracy"] < start["accuracy"] - 0.3
    half = set(random.Random(1).sample(range(40), 20))
    shuffled = tuned_on("half exchanged", lambda number: number in half)[1]
    assert abs(shuffled["margin"] - start["margin"]) < 0.1 * (learned["margin"] - start["margin"])


def swapped(record: dict) -> dict:
    return record | {"chosen": record["rejected"], "rejected": record["chosen"]}


@pytest.mark.more
def test_killed_at_any_moment_it_ends_bit_for_bit_the_same(finetuned, tiny_base, tmp_path, request):
    """SIGKILL at random moments, saving and the reference's pass included."""
    kills = request.config.getoption("--kills")
    chance = random.Random(5)

    def command(name: str) -> list[str]:
        if not (tmp_path / name).exists():
            (tmp_path / name).mkdir()
            (tmp_path / name / "data").symlink_to(finetuned / "data")
        script = SUPPORT / "prefer_small.py"
        return [sys.executable, str(script), *map(str, (tmp_path / name, tiny_base, finetuned / "adapter", 3 * kills))]

    whole = subprocess.run(command("whole"), capture_output=True, cwd=SUPPORT.parents[1])
    assert whole.returncode == 0, whole.stderr[-2000:]
    metrics = Metrics(tmp_path / "killed" / "preference_metrics.jsonl")
    for number in range(kills):
        before = last_step(metrics)
        process = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   cwd=SUPPORT.parents[1])  # fmt: skip
        in_reference, said = number == 0, b""
        while (b"Computing reference" if in_reference else b"READY") not in said and (read := process.stdout.read1()):
            said += read
        while not in_reference and process.poll() is None and last_step(metrics) <= before:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "preference_adapter").exists()
    finished = subprocess.run(command("killed"), capture_output=True, text=True, cwd=SUPPORT.parents[1])
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert digest(tmp_path / "killed" / "preference_adapter") == digest(tmp_path / "whole" / "preference_adapter")


def last_step(metrics: Metrics) -> int:
    return max((entry["step"] for entry in metrics.read()), default=0)
