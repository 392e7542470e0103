"""That training on a GPU is right: the kernel, the whole model, and the notebook's own way from a step to a merge."""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import measuring
import numpy as np
import torch
import training_runs
from gpu_variants import OURS, ROW, rows_for
from peft import load_peft_weights
from transformers import Trainer, TrainerCallback

from llm_finetuning import hardware
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.files import drive
from llm_finetuning.release import held_weights, merging, verify
from llm_finetuning.training import attention, qlora, selfcheck
from llm_finetuning.training.dataset import RunInputs, TrainingData
from llm_finetuning.training.resumable import save_adapter, train
from llm_finetuning.training.trainer import AssistantTrainer

PART = "training on a GPU"
STEPS = 6
"""Optimizer steps of the run that is interrupted after half of them."""
HELD_OUT = 8


def record(given: argparse.Namespace, check: str, figures: list[dict]) -> None:
    """Writes the figures of a check beside those of the others."""
    named = [entry | {"name": f"{check}, {entry['name']}"} for entry in figures]
    print(*(f"{entry['name']}: {entry['median']} {entry['unit']}" for entry in named), sep="\n", flush=True)
    measuring.record(f"{PART} ({check})", given.size, figures, given.results)


def attention_kernel(given: argparse.Namespace) -> None:
    """Variable-length attention against fp64 on each document, output and gradients; raises ValueError if far."""
    device = "cuda" if on_gpu() else "cpu"
    if not hardware.has_varlen_kernel(device):
        print("no kernel for variable lengths on this machine")
        return
    torch.manual_seed(0)
    lengths = [5, 131, 700, 64, 1]
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    # heads before tokens, as the model has them: the kernel gets strides, not a copy
    shape = (32, sum(lengths), 80)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    turned = (x.transpose(0, 1) for x in (q, k, v))
    out = attention.causal_varlen(*turned, borders, max(lengths), 80**-0.5).transpose(0, 1)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = []
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        one = [x[None, :, start:end] for x in exact]
        parts.append(torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)[0])
    reference = torch.cat(parts, dim=1)
    expected = torch.autograd.grad((reference * weights.double()).sum(), exact)
    errors = [relative(out, reference), *(relative(x, y) for x, y in zip(found, expected, strict=True))]
    record(given, "variable-length attention against fp64", [measuring.figure("largest relative error", "1", errors)])
    raise_unless(max(errors) < 1e-2, f"variable-length attention is wrong: {errors}")


def packed_against_alone(given: argparse.Namespace) -> None:
    """Loss and gradients of the whole model: one packed micro-batch as the plan has it, against sdpa row by row.

    How far two padded rows at a time are from one says what rounding does on this machine, where nothing is packed.
    """
    rows = rows_for(given.size, 8)
    gradients, losses = {}, {}
    sides = {"packed": {}, "alone": {"packing": False, "attention": "sdpa"}}
    for side, changes in sides.items():
        tokens = sum(rows.lengths) if side == "packed" else ROW
        run = training_runs.Run(given.base, given.folder, OURS | changes | training_runs.step_of(tokens), rows)
        losses[side], gradients[side] = gradients_of(run, rows)
        if side == "alone":
            _, gradients["padded"] = gradients_of(run, rows, **training_runs.step_of(2 * ROW))
        run.close()
    joined = {
        side: torch.cat([found[name].flatten() for name in gradients["alone"]]) for side, found in gradients.items()
    }
    error, rounding = (relative(joined[side], joined["alone"]) for side in ("packed", "padded"))
    loss = abs(losses["packed"] / losses["alone"] - 1)
    named = {"of the gradients": error, "of the loss": loss, "of padded rows' gradients": rounding}
    figures = [measuring.figure(f"relative error {name}", "1", [value]) for name, value in named.items()]
    record(given, "packed against alone", figures)
    bound = max(5e-2, 3 * rounding) if on_gpu() else 1e-4
    raise_unless(error < bound and loss < bound, f"packed rows do not train as they do alone: {error:.1e}, {loss:.1e}")


def gradients_of(
    run: training_runs.Run, rows: TrainingData, **changed: object
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all rows' tokens, and the gradients of the adapters, B away from zero; changed: settings."""
    trainer = trainer_for(run, rows, **changed)
    trainer.model.zero_grad()
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # rows that are packed otherwise would draw other masks
    tokens = sum(label != -100 for row in rows.examples for label in row["labels"][1:])
    total = 0.0
    for batch in trainer.get_train_dataloader():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(tokens))
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.float().cpu() for n, p in trainer.model.named_parameters() if p.requires_grad}


def trainer_for(run: training_runs.Run, rows, **changed) -> AssistantTrainer:
    """A trainer of the notebook on the run's model."""
    chosen = training_runs.settings_for(run.base, run.folder, run.changes | changed)
    plan = dataclasses.replace(run.planned(chosen, rows), model_path=run.base)
    held_out = [
        row | {"pair": {"prompt": "Why?", "response": "So.", "history": []}} for row in rows.examples[:HELD_OUT]
    ]
    return AssistantTrainer(run.model, chosen, plan, RunInputs(run.template, rows, held_out))


def notebook(given: argparse.Namespace) -> None:
    """The notebook's way: self-check, training, an interruption, the merge with its verification.

    A GPU adds gradients up in another order each time, and Adam moves small ones as far as large ones: there a second
    run from the same checkpoint says how far two of them are apart. On a CPU they are the same.
    """
    changes = OURS | {"max_steps": STEPS, "save_steps": STEPS // 2, "max_new_tokens": 16, "resume": True}
    if not on_gpu():
        changes |= training_runs.step_of(1024)  # a CPU computes a step of the real job in minutes
    rows = rows_for(given.size, 400 if on_gpu() else 20)
    expected = trained(given, changes, rows)
    run, trainer = resumed(given, changes, rows)
    first = adapter_of(trainer)
    found = {"difference of the adapter": farthest(first, expected)}
    if on_gpu():
        del trainer
        run.close()
        run, trainer = resumed(given, changes, rows)
        found["difference of two resumed runs"] = farthest(adapter_of(trainer), first)
    figures = [measuring.figure(name, "1", [value]) for name, value in found.items()]
    record(given, f"resumed with {trainer.plan.optimizer}", figures)
    merge(given, trainer, run)
    error, noise = found["difference of the adapter"], found.get("difference of two resumed runs", 0.0)
    bound = max(1e-3, 3 * noise) if on_gpu() else 0.0
    raise_unless(error <= bound, f"a resumed run ends with another adapter: {error:.1e}, two of them {noise:.1e}")


def trained(given: argparse.Namespace, changes: dict, rows: TrainingData) -> dict[str, torch.Tensor]:
    """The adapter of a run that nothing interrupts, after the self-check."""
    run = training_runs.Run(given.base, given.folder / "whole", changes, rows)
    for row in rows.examples:
        row["input_ids"][-1] = row["labels"][-1] = min(run.template.stop_token_ids)
    trainer = trainer_for(run, rows)
    print(selfcheck.run(trainer).table.to_string(index=False))
    train(trainer)
    adapter = adapter_of(trainer)
    del trainer
    run.close()
    return adapter


def resumed(given: argparse.Namespace, changes: dict, rows: TrainingData) -> tuple[training_runs.Run, AssistantTrainer]:
    """The same run, gone on with after half its steps. Raises ValueError for one that begins with other values."""
    run = training_runs.Run(given.base, given.folder / "whole", changes, rows)
    checkpoints = run.folder / "run" / "checkpoints"
    drive.remove(checkpoints / f"checkpoint-{STEPS}")
    trainer = trainer_for(run, rows)
    loaded = Loaded(trainer, checkpoints / f"checkpoint-{STEPS // 2}")
    trainer.add_callback(loaded)
    outcome = train(trainer)
    raise_unless(outcome.resumed_from == loaded.checkpoint.name, f"resumed from {outcome.resumed_from}")
    raise_unless(loaded.different == [], f"a resumed run begins with other values than it had: {loaded.different}")
    return run, trainer


class Loaded(TrainerCallback):
    """What of adapter and optimizer is otherwise than in the checkpoint, once a resumed run has loaded both.

    different: names, at most three; None before the run has begun.
    """

    different: list[str] | None = None

    def __init__(self, trainer: Trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        saved = load_peft_weights(str(self.checkpoint), device="cpu")
        saved |= moments(torch.load(self.checkpoint / "optimizer.pt", map_location="cpu", weights_only=True))
        loaded = {qlora.saved_name(n): p for n, p in self.trainer.model.named_parameters() if p.requires_grad}
        loaded |= moments(self.trainer.optimizer.state_dict())
        names = sorted(saved.keys() | loaded.keys())
        self.different = [name for name in names if not same(saved.get(name), loaded.get(name))][:3]


def moments(state: dict) -> dict[str, object]:
    """What an optimizer holds of each parameter; bitsandbytes' has its tensors one level deeper than its step."""
    return {f"{index}.{name}": x for index, values in state["state"].items() for name, x in flat(values)}


def flat(values: dict) -> Iterator[tuple[str, object]]:
    """The entries of a dictionary, and in place of dictionaries in it theirs."""
    for name, value in values.items():
        yield from flat(value) if isinstance(value, dict) else ((name, value),)


def same(one: object, other: object) -> bool:
    """Whether two tensors or numbers are equal to the bit; None is equal to nothing."""
    if one is None or other is None:
        return False
    return torch.equal(*(torch.as_tensor(x).detach().cpu().double() for x in (one, other)))


def adapter_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of what the run trains, by name."""
    return {n: p.detach().to("cpu", copy=True) for n, p in trainer.model.named_parameters() if p.requires_grad}


def farthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of any tensor."""
    return max(relative(found[name], tensor) for name, tensor in expected.items())


def merge(given: argparse.Namespace, trainer: AssistantTrainer, run: training_runs.Run) -> None:
    """Saves, merges into both bases and verifies, as the notebook does; seconds, losses, and what was checked."""
    save_adapter(trainer)
    plan, held_out, template = trainer.plan, trainer.run_inputs.held_out, trainer.run_inputs.template
    loss = scoreboard.held_out_loss(trainer.model, held_out, template)
    held_weights.save(trainer.model, plan)
    quantised = merging.quantised_names(trainer.model)
    del trainer
    run.close()
    begun = time.perf_counter()
    merged = verify.merge_and_verify(plan, quantised, template, held_out, loss)
    seconds = time.perf_counter() - begun
    print(merged.checks.to_string(index=False))
    ratios = [
        measuring.figure(f"loss over the trained one, {base}", "1", [x / loss]) for base, x in merged.losses.items()
    ]
    record(given, "merge and verification", [measuring.figure("time", "s", [seconds]), *ratios])


def on_gpu() -> bool:
    return torch.cuda.is_available()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def raise_unless(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)
