"""The recipe's parameters: steps, the best adapter, and what goes to PEFT and TRL as it is."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import SMALL, prepare, small_settings

from llm_finetuning import settings
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.release import merging, verify
from llm_finetuning.training import callbacks, checkpoints, qlora, selfcheck
from llm_finetuning.training import resumable as training
from llm_finetuning.training.metrics import Metrics

KINDS = [
    {"use_dora": True, "use_rslora": True, "lora_dropout": 0.0},
    *(
        pytest.param(kind, marks=pytest.mark.more)
        for kind in (
            {"use_rslora": True},
            {"use_dora": True, "lora_dropout": 0.0, "use_4bit": "no", "dtype": "bfloat16"},
            {"use_dora": True, "lora_dropout": 0.0, "merge_base": "original"},
            {"init_lora_weights": "gaussian"},
            {"init_lora_weights": "orthogonal", "use_4bit": "no", "lora_dropout": 0.0},
            {"loraplus_lr_ratio": 16.0},
            {"neftune_noise_alpha": 5.0},
        )
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ", ".join(kind))
def test_each_kind_of_adapter_is_checked_trained_resumed_and_merged(kind, tiny_base, tmp_path):
    """Killed after its first checkpoint and resumed, the adapter is that of an undisturbed run, byte for byte."""
    for folder, lengths in {"at once": [4], "twice": [2, 4]}.items():
        for steps in lengths:
            small = prepare(small_settings(tmp_path / folder, tiny_base, warmup_ratio=0.0, max_steps=steps, **kind))
            before = scoreboard.held_out_loss(small.model, small.held_out, small.template)
            selfcheck.run(small.trainer)
            training.train(small.trainer)
            training.save_adapter(small.trainer)
    files = [tmp_path / folder / "adapter" / "adapter_model.safetensors" for folder in ("at once", "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()
    after = scoreboard.held_out_loss(small.model, small.held_out, small.template)
    quantised = merging.quantised_names(small.model)
    made = verify.merge_and_verify(small.plan, quantised, small.template, small.held_out, after)
    assert made.checks.passed.all() and after < before


def test_dora_is_merged_as_peft_merges_it(tiny_base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    chosen = {"use_dora": True, "lora_dropout": 0.0, "use_4bit": "no", "dtype": "float32", "max_steps": 3}
    small = prepare(small_settings(tmp_path, tiny_base, **chosen))
    training.train(small.trainer)
    folder = training.save_adapter(small.trainer)
    adapter = merging.read_adapter(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    merged = dict(PeftModel.from_pretrained(base, folder).merge_and_unload().named_parameters())
    assert adapter.lengths.keys() == adapter.factors.keys()
    for name in adapter.factors:
        ours = adapter.merged(name, weights[name])
        torch.testing.assert_close(ours, merged[name].detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours, weights[name])


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, {}, "init_lora_weights = pissa"),
        ({"init_lora_weights": "olora"}, {}, "init_lora_weights = olora"),
        ({"alpha_pattern": {"fc1": 3}}, {}, "alpha_pattern"),
        ({"use_dora": True}, {}, "needs A, B, magnitude_vector"),
        ({}, {"x.lora_magnitude_vector": 4}, r"holds A, B, magnitude_vector.*use_dora is False"),
        ({}, {"y.lora_A.weight": 4}, "the adapter of y.weight holds A, and needs A, B"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_in_words(config, tensors, message, tmp_path):
    from safetensors.torch import save_file

    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain | config))
    held = {"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}
    held |= {name: torch.ones(count) for name, count in tensors.items()}
    save_file(
        {f"base_model.model.{name}": value for name, value in held.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=message):
        merging.read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"init_lora_weights": "pissa"}, "neither the one in 4 bits nor the one that is merged into"),
        ({"init_lora_weights": "pissa", "use_4bit": "no"}, "neither the one in 4 bits"),
        ({"init_lora_weights": "eva"}, "one of default, gaussian, orthogonal, pissa"),
        ({"init_lora_weights": "orthogonal"}, "needs use_4bit = 'no'"),
        ({"init_lora_weights": "orthogonal", "use_4bit": "auto"}, "needs use_4bit = 'no'"),
        ({"init_lora_weights": "orthogonal", "use_4bit": "no", "lora_r": 3}, "an even lora_r"),
        ({"use_dora": True}, "needs lora_dropout = 0"),
        ({"loraplus_lr_ratio": 0.5}, r"1 \(off\) or more"),
        ({"neftune_noise_alpha": -1.0}, "0 or more"),
        ({"use_4bit": "maybe"}, "one of auto, yes, no"),
        ({"compile_layers": 2}, "one of auto, yes, no"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_the_settings_cell(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small_settings(tmp_path, "m", **changed)


def test_settings_of_earlier_versions_are_read(tmp_path):
    """They say True and False, and know nothing of what came later."""
    chosen = small_settings(tmp_path, "m")
    old = json.loads(chosen.save(tmp_path / "settings.json").read_text())
    for name in ("use_rslora", "use_dora", "init_lora_weights", "neftune_noise_alpha", "loraplus_lr_ratio"):
        del old[name]
    for said, means in ((True, "yes"), (False, "no"), ("False", "no"), ("auto", "auto")):
        (tmp_path / "settings.json").write_text(json.dumps(old | {"use_4bit": said, "compile_layers": said}))
        read = settings.from_file(settings.Finetuning, tmp_path / "settings.json")
        assert read == dataclasses.replace(chosen, use_4bit=means, compile_layers=means)


def test_without_evaluations_the_best_is_not_asked_for():
    assert settings.Finetuning().patience == settings.Finetuning().early_stopping_patience > 0
    assert settings.Finetuning(eval_steps=0).patience == 0


def test_a_run_that_is_shorter_than_its_first_evaluation_keeps_what_it_trained(tiny_base, tmp_path):
    """The last step is evaluated too: the best adapter is never the untrained one."""
    small = prepare(small_settings(tmp_path, tiny_base, eval_steps=100, early_stopping_patience=3, max_steps=3))
    outcome = training.train(small.trainer)
    losses = Metrics(tmp_path / "metrics.jsonl").evaluations("held_out_loss")
    assert [step for _, step in losses] == [0, 3]
    assert (outcome.best_loss, outcome.ended_by) == (losses[-1][0], "finished")
    assert all(p.abs().sum() > 0 for name, p in small.model.named_parameters() if "lora_B" in name)


def test_a_run_that_makes_it_worse_says_so_and_leaves_a_trained_adapter(tiny_base, tmp_path, monkeypatch, capsys):
    small = prepare(small_settings(tmp_path, tiny_base, eval_steps=1, early_stopping_patience=2, warmup_ratio=0.0))
    rising = iter([1.0, 1.2, 1.3, 1.4])
    monkeypatch.setattr(callbacks.scoreboard, "held_out_loss", lambda *given: next(rising))
    outcome = training.train(small.trainer)
    assert (outcome.step, outcome.ended_by, outcome.best_loss) == (3, "early stopping", 1.2)
    assert (
        "1.2000 at step 1, is not below the 1.0000 before training: lower learning_rate (0.002)"
        in capsys.readouterr().out
    )
    first = load_file(tmp_path / "checkpoints" / "best" / "adapter_model.safetensors")
    loaded = {qlora.saved_name(name): p for name, p in small.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(value, loaded[key]) for key, value in first.items())
    assert any(value.abs().sum() > 0 for key, value in first.items() if "lora_B" in key)


def test_an_earlier_version_kept_the_base_as_the_best_adapter_which_is_not_loaded(tmp_path):
    """Its run was shorter than the first evaluation: the adapter of the last step is the only trained one."""
    chosen = small_settings(tmp_path, "m", eval_steps=100, early_stopping_patience=2)
    (chosen.folders.checkpoints / checkpoints.BEST).mkdir(parents=True)
    metrics = Metrics(chosen.folders.metrics)
    metrics.write({"step": 0, "held_out_loss": 1.0})
    monitor = SimpleNamespace(unsaved_best=None, metrics=metrics, main=True)
    assert callbacks.restore_best(SimpleNamespace(settings=chosen, monitor=monitor)) is None


def test_the_base_is_not_measured_twice(tiny_base, tmp_path, monkeypatch):
    small = prepare(small_settings(tmp_path, tiny_base, eval_steps=2, max_steps=2))
    before = scoreboard.before(small.model, small.held_out, small.template, small.settings)["before"]
    measured = scoreboard.held_out_loss(small.model, small.held_out, small.template)
    steps, whole = [], callbacks.scoreboard.held_out_loss
    seen = lambda *given: steps.append(small.trainer.state.global_step) or whole(*given)  # noqa: E731
    monkeypatch.setattr(callbacks.scoreboard, "held_out_loss", seen)
    training.train(small.trainer, before)
    entries = [entry for entry in Metrics(tmp_path / "metrics.jsonl").read() if "held_out_loss" in entry]
    assert steps == [2] and [entry["step"] for entry in entries] == [0, 2]
    assert entries[0]["held_out_loss"] == pytest.approx(measured, rel=1e-6)
    assert entries[0]["answers"] == [sample["text"] for sample in before["samples"]]


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([], False),
        ([(1.0, 0)], False),
        ([(1.0, 0), (2.0, 5), (3.0, 10)], False),
        ([(1.0, 0), (2.0, 5), (3.0, 10), (2.5, 15)], True),
        ([(9.0, 0), (2.0, 5), (3.0, 10), (1.5, 15)], False),
    ],
)
def test_patience_counts_from_the_best_that_was_trained(losses, over):
    assert callbacks.is_over(losses, SimpleNamespace(patience=2)) is over


def test_an_older_checkpoint_is_not_continued_with_another_kind_of_adapter(tiny_base, tmp_path):
    """It notes nothing of what did not exist then: it was trained without."""
    chosen = small_settings(tmp_path, tiny_base, max_steps=2, warmup_ratio=0.0)
    training.train(prepare(chosen).trainer)
    run_file = checkpoints.complete(tmp_path / "checkpoints")[-1] / "run.json"
    noted = json.loads(run_file.read_text())
    assert noted["use_4bit"] is True, "as earlier versions note it"
    older = {name: value for name, value in noted.items() if name not in checkpoints.NOT_NOTED}
    run_file.write_text(json.dumps(older))
    now = noted | {"use_rslora": True, "loraplus_lr_ratio": 2.0}
    with pytest.raises(ValueError, match=r"(?s)loraplus_lr_ratio: 1.0 in the.*use_rslora: False in the"):
        checkpoints.check_same_run(run_file.parent, dict(sorted(now.items())))
    assert checkpoints.check_same_run(run_file.parent, noted) is False


def test_the_ratio_of_lora_plus_reaches_the_optimizer(tiny_base, tmp_path):
    small = prepare(small_settings(tmp_path, tiny_base, loraplus_lr_ratio=4.0, weight_decay=0.1))
    optimizer = small.trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: rates[id(p)] for name, p in small.model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in trained.items() if "lora_A" in name} == {SMALL["learning_rate"]}
    assert {rate for name, rate in trained.items() if "lora_B" in name} == {4 * SMALL["learning_rate"]}
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.1}


def test_noise_on_embeddings_is_that_of_one_example_however_they_are_packed(tiny_base, tmp_path):
    """|noise| = alpha / √(length · width) at most, for an example of mean length; and none in evaluations."""
    small = prepare(small_settings(tmp_path, tiny_base, neftune_noise_alpha=5.0, max_steps=1))
    embeddings, seen = small.model.get_base_model().get_input_embeddings(), []

    def look(module, given, found):
        if module.training:
            clean = torch.nn.functional.embedding(given[0], module.weight)
            seen.append(((found - clean).abs().max().item(), given[0].shape[1]))

    def hook_last(*given):  # behind the one of the library, which comes when training begins
        embeddings.register_forward_hook(look)

    small.trainer.monitor.on_step_begin = lambda *given, **more: None if seen else hook_last()
    training.train(small.trainer)
    plan, width = small.plan, embeddings.weight.shape[1]
    bound = 5.0 / (plan.tokens / plan.examples * width) ** 0.5
    assert len(seen) > 0
    for most, length in seen:
        assert most == pytest.approx(bound * (plan.micro_batch_tokens / length) ** 0.5, rel=0.02)


def test_the_files_of_dora_hold_its_lengths(tiny_base, tmp_path):
    small = prepare(small_settings(tmp_path, tiny_base, use_dora=True, lora_dropout=0.0, max_steps=1))
    trained = sum(p.numel() for p in small.model.parameters() if p.requires_grad)
    assert trained == small.plan.size.adapter
    training.train(small.trainer)
    tensors = load_file(training.save_adapter(small.trainer) / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == trained
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
