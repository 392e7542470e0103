"""Each step of a family's training is the step that plain transformers and PEFT take with the same documents."""

import json

import pytest
import torch
from families import tiny_base_of
from training_fixtures import prepare, small_settings

from llm_finetuning.training import resumable as training

THIRTEEN = ("llama", "phi3", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox")
THIRTEEN += ("olmo2", "stablelm", "starcoder2")


def documents_of(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each document that is packed into a micro-batch, whose positions begin again at 0."""
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    pairs = zip(starts, starts[1:], strict=False)
    return [(batch["input_ids"][:, a:b], batch["labels"][:, a:b]) for a, b in pairs]


def plain_steps(base, steps: list[list[dict]], initial: dict, chosen) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each optimizer step, one document after the other, without anything of this package."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    names = sorted({name.partition(".lora_")[0].rpartition(".")[-1] for name in initial})
    model = get_peft_model(model, LoraConfig(r=chosen.lora_r, lora_alpha=chosen.lora_alpha, target_modules=names))
    assert not model.load_state_dict(initial, strict=False).unexpected_keys
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=chosen.learning_rate, weight_decay=0.0)
    taken = []
    for batches in steps:
        documents = [document for batch in batches for document in documents_of(batch)]
        tokens = sum(int((labels[:, 1:] != -100).sum()) for _, labels in documents)
        total = 0.0
        for ids, labels in documents:
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, chosen.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        taken.append((total, float(norm)))
    return taken


@pytest.mark.parametrize(
    "family", [*THIRTEEN[:2], *(pytest.param(name, marks=pytest.mark.more) for name in THIRTEEN[2:])]
)
def test_each_step_is_that_of_plain_transformers(family, tmp_path):
    base = tiny_base_of(family, tmp_path / "base")
    steady = {"use_4bit": False, "lora_dropout": 0.0, "max_steps": 4, "warmup_ratio": 0.0, "max_grad_norm": 0.5}
    sizes = {"micro_batch_tokens": 192, "tokens_per_step": 384}
    chosen = small_settings(tmp_path / "run", base, **steady, **sizes)
    small = prepare(chosen)
    initial = {name: p.detach().clone() for name, p in small.model.named_parameters() if p.requires_grad}
    steps: dict[int, list[dict]] = {}
    compute = small.trainer.compute_loss

    def recorded(model, inputs, *others, **more):
        steps.setdefault(small.trainer.state.global_step, []).append(
            {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
        )
        return compute(model, inputs, *others, **more)

    small.trainer.compute_loss = recorded
    training.train(small.trainer)
    entries = [json.loads(line) for line in chosen.folders.metrics.read_text().splitlines()]
    ours = [(entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]
    assert any(len(documents_of(batch)) > 1 for batches in steps.values() for batch in batches), "packed"
    plain = plain_steps(base, list(steps.values()), initial, chosen)
    print(
        f"\n{family}: "
        + "; ".join(f"{a[0]:.5f} / {b[0]:.5f}, {a[1]:.5f} / {b[1]:.5f}" for a, b in zip(ours, plain, strict=True))
    )
    assert len(ours) == 4
    for (loss, norm), (plain_loss, plain_norm) in zip(ours, plain, strict=True):
        assert loss == pytest.approx(plain_loss, rel=1e-4)
        assert norm == pytest.approx(plain_norm, rel=2e-3)
