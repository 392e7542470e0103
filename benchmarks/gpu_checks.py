"""That training on a GPU is right: the kernel, the whole model, and the notebook's own way from a step to a merge."""

import argparse
import dataclasses
import time

import measuring
import numpy as np
import torch
import training_runs
from gpu_variants import OURS, rows_for

from llm_finetuning import hardware
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.files import drive
from llm_finetuning.release import held_weights, merging, verify
from llm_finetuning.training import attention, selfcheck
from llm_finetuning.training.dataset import RunInputs
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
    """Loss and gradients of the whole model: one packed micro-batch as the plan has it, against sdpa row by row."""
    rows = rows_for(given.size, 8)
    gradients, losses = {}, {}
    sides = {"packed": {}, "alone": {"packing": False, "attention": "sdpa"}}
    for side, changes in sides.items():
        tokens = sum(rows.lengths) if side == "packed" else 1024
        run = training_runs.Run(given.base, given.folder, OURS | changes | training_runs.step_of(tokens), rows)
        losses[side], gradients[side] = gradients_of(run, rows)
        run.close()
    names = gradients["alone"].keys()
    error = relative(*(torch.cat([gradients[side][n].flatten() for n in names]) for side in sides))
    loss = abs(losses["packed"] / losses["alone"] - 1)
    figures = [measuring.figure("relative error of the gradients", "1", [error])]
    record(given, "packed against alone", [*figures, measuring.figure("relative error of the loss", "1", [loss])])
    bound = 1e-4 if next(iter(gradients["alone"].values())).dtype == torch.float32 and not on_gpu() else 5e-2
    raise_unless(error < bound and loss < bound, f"packed rows do not train as they do alone: {error:.1e}, {loss:.1e}")


def gradients_of(run: training_runs.Run, rows) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all rows' tokens, and the gradients of the adapters, B away from zero."""
    trainer = trainer_for(run, rows)
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
    """The notebook's way: self-check, training, an interruption, the merge with its verification."""
    changes = OURS | {"max_steps": STEPS, "save_steps": STEPS // 2, "max_new_tokens": 16, "resume": True}
    if not on_gpu():
        changes |= training_runs.step_of(1024)  # a CPU computes a step of the real job in minutes
    rows = rows_for(given.size, 400 if on_gpu() else 20)
    whole = training_runs.Run(given.base, given.folder / "whole", changes, rows)
    for row in rows.examples:
        row["input_ids"][-1] = row["labels"][-1] = min(whole.template.stop_token_ids)
    trainer = trainer_for(whole, rows)
    print(selfcheck.run(trainer).table.to_string(index=False))
    train(trainer)
    expected = {n: p.detach().cpu() for n, p in trainer.model.named_parameters() if p.requires_grad}
    del trainer
    whole.close()
    again = training_runs.Run(given.base, given.folder / "whole", changes, rows)
    checkpoints = again.folder / "run" / "checkpoints"
    drive.remove(checkpoints / f"checkpoint-{STEPS}")
    trainer = trainer_for(again, rows)
    outcome = train(trainer)
    raise_unless(outcome.resumed_from == f"checkpoint-{STEPS // 2}", f"resumed from {outcome.resumed_from}")
    errors = [relative(p.detach().cpu(), expected[n]) for n, p in trainer.model.named_parameters() if p.requires_grad]
    optimizer = trainer.plan.optimizer
    record(given, f"resumed with {optimizer}", [measuring.figure("difference of the adapter", "1", [max(errors)])])
    merge(given, trainer, again)
    raise_unless(max(errors) < 1e-3, f"a resumed run ends with another adapter: {max(errors):.1e}")


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
