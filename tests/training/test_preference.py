"""Preference tuning: what the reference is, what the loss is, and that nothing is lost when the process dies."""

import math

import pytest
import torch
from preference_fixtures import plain_model, preference_settings, prepare_preference

from llm_finetuning.training import qlora, selfcheck

SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def run(finetuned, tiny_base, tmp_path_factory):
    """A prepared run that is not trained."""
    chosen = preference_settings(tmp_path_factory.mktemp("run"), tiny_base, adapter_folder=str(finetuned / "adapter"))
    for name in ("data",):
        (chosen.folders.drive / name).symlink_to(finetuned / name)
    return prepare_preference(chosen)


def plain_logps(model: torch.nn.Module, example: dict) -> torch.Tensor:
    """Log-probabilities of the tokens of a response, by one forward pass without a batch or padding."""
    ids = torch.tensor([example["input_ids"]])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    asked = sum(label == -100 for label in example["labels"])
    return logits.log_softmax(-1)[range(len(logits)), ids[0, 1:]][asked - 1 :]


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


BETA = 0.1


def plain_loss(name: str, ours: list, reference: list, smoothing: float, alpha: float) -> torch.Tensor:
    """The loss of one pair by its paper. ours, reference: log-probabilities of the tokens, (chosen, rejected)."""
    shared = min(len(ours[0]), len(ours[1]))
    weights = [torch.where(torch.arange(len(side)) < shared, 1.0, alpha) for side in ours]
    ratios = [((a - b) * w).sum() for a, b, w in zip(ours, reference, weights, strict=True)]
    log_sigmoid = torch.nn.functional.logsigmoid
    delta = ratios[0] - ratios[1]
    mean_delta = ratios[0] / len(ours[0]) - ratios[1] / len(ours[1])
    if name == "robust":  # arXiv 2403.00409, equation 11
        found = (1 - smoothing) * -log_sigmoid(BETA * delta) + smoothing * log_sigmoid(-BETA * delta)
        return found / (1 - 2 * smoothing)
    if name == "ipo":  # arXiv 2310.12036, equation 17
        return (mean_delta - 1 / (2 * BETA)) ** 2
    return -log_sigmoid(BETA * (mean_delta if name == "sigmoid_norm" else delta))  # arXiv 2305.18290, equation 7


LOSSES = [("sigmoid", 1.0), ("sigmoid + sft", 1.0), ("robust", 1.0), ("sigmoid_norm", 1.0), ("ipo", 1.0)]
LOSSES += [("sigmoid", 0.3)]


@pytest.mark.parametrize(("name", "alpha"), LOSSES)
def test_loss_and_gradients_of_three_pairs_equal_a_plain_implementation(name, alpha, finetuned, tiny_base, tmp_path):
    chosen = preference_settings(tmp_path, tiny_base, adapter_folder=str(finetuned / "adapter"), loss=name,
                                 ld_alpha=alpha, label_smoothing=0.2, sft_weight=0.5, beta=BETA)  # fmt: skip
    (tmp_path / "data").symlink_to(finetuned / "data")
    run = prepare_preference(chosen)
    pairs = run.data.pairs[:3]
    with torch.no_grad():
        reference = [[plain_logps(run.model, pair[side]) for side in SIDES] for pair in pairs]
    generator = torch.Generator().manual_seed(5)
    before = qlora.gather_adapter(run.model)
    with qlora.holding(run.model, {n: p + 0.01 * torch.randn(p.shape, generator=generator) for n, p in before.items()}):
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
