"""Each step of a family's training is the step that plain transformers and PEFT take with the same documents."""

import pytest
import torch
from families import tiny_base_of
from plain_steps import documents_of, initial_adapter, take, train_recorded
from training_fixtures import prepare, small_settings

FOURTEEN = ("llama", "phi3", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox")
FOURTEEN += ("olmo2", "stablelm", "starcoder2", "granitemoe")


def plain_steps(base, steps: list[list[dict]], initial: dict, chosen) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each optimizer step by transformers and PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    names = sorted({name.partition(".lora_")[0].rpartition(".")[-1] for name in initial})
    model = get_peft_model(model, LoraConfig(r=chosen.lora_r, lora_alpha=chosen.lora_alpha, target_modules=names))
    documents = [[document for batch in batches for document in documents_of(batch)] for batches in steps]
    return take(model, initial, documents, chosen)


@pytest.mark.parametrize(
    "family", [*FOURTEEN[:2], *(pytest.param(name, marks=pytest.mark.more) for name in FOURTEEN[2:])]
)
def test_each_step_is_that_of_plain_transformers(family, tmp_path):
    base = tiny_base_of(family, tmp_path / "base")
    steady = {"use_4bit": False, "lora_dropout": 0.0, "max_steps": 4, "warmup_ratio": 0.0, "max_grad_norm": 0.5}
    sizes = {"micro_batch_tokens": 192, "tokens_per_step": 384}
    chosen = small_settings(tmp_path / "run", base, **steady, **sizes)
    small = prepare(chosen)
    initial = initial_adapter(small.model)
    ours, steps = train_recorded(small.trainer)
    assert any(len(documents_of(batch)) > 1 for batches in steps for batch in batches), "packed"
    plain = plain_steps(base, steps, initial, chosen)
    print(
        f"\n{family}: "
        + "; ".join(f"{a[0]:.5f} / {b[0]:.5f}, {a[1]:.5f} / {b[1]:.5f}" for a, b in zip(ours, plain, strict=True))
    )
    assert len(ours) == 4
    for (loss, norm), (plain_loss, plain_norm) in zip(ours, plain, strict=True):
        assert loss == pytest.approx(plain_loss, rel=1e-4)
        assert norm == pytest.approx(plain_norm, rel=2e-3)
