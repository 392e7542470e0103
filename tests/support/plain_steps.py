"""A training step by step: as the trainer takes it, and as transformers and PEFT alone do with the same documents."""

import json

import torch

from llm_finetuning.training import resumable


def documents_of(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each document that is packed into a micro-batch, whose positions begin again at 0."""
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    pairs = zip(starts, starts[1:], strict=False)
    return [(batch["input_ids"][:, a:b], batch["labels"][:, a:b]) for a, b in pairs]


def train_recorded(trainer) -> tuple[list[tuple[float, float]], list[list[dict]]]:
    """Trains to the end; returns ((loss, gradient norm) of each step, the micro-batches of each)."""
    steps: dict[int, list[dict]] = {}
    compute = trainer.compute_loss

    def recorded(model, inputs, *others, **more):
        copied = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
        steps.setdefault(trainer.state.global_step, []).append(copied)
        return compute(model, inputs, *others, **more)

    trainer.compute_loss = recorded
    resumable.train(trainer)
    entries = [json.loads(line) for line in trainer.settings.folders.metrics.read_text().splitlines()]
    return [(entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry], list(steps.values())


def initial_adapter(model) -> dict[str, torch.Tensor]:
    """The weights of the adapters before a training."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def take(model, initial: dict, steps: list[list[tuple]], chosen) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each optimizer step of a PEFT model, one document after the other.

    steps: the (ids, labels) of each. Nothing of this package computes.
    """
    assert not model.load_state_dict(initial, strict=False).unexpected_keys
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == initial.keys()
    optimizer = torch.optim.AdamW(trained.values(), lr=chosen.learning_rate, weight_decay=0.0)
    taken = []
    for documents in steps:
        tokens = sum(int((labels[:, 1:] != -100).sum()) for _, labels in documents)
        total = 0.0
        for ids, labels in documents:
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), chosen.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        taken.append((total, float(norm)))
    return taken
