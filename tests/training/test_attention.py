"""Variable-length attention honours what a model asks of it, or is not chosen for it."""

import dataclasses

import pytest
import torch
from training_fixtures import small_settings
from transformers import AutoConfig, AutoModelForCausalLM

from llm_finetuning import models
from llm_finetuning.hardware import GIB, Machine
from llm_finetuning.training import attention

GPU = Machine("cuda:0", "A100", (8, 0), 40 * GIB, 40 * GIB, 12 * GIB, 2, 250e12, True)
SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0}
WINDOWED = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
EXACT = {
    "phi": {"num_key_value_heads": 2},
    "llama": {},
    "mistral": {"sliding_window": 32},
    "gemma3_text": {"head_dim": 32, **WINDOWED},
    "qwen3": {"head_dim": 32, "use_sliding_window": True, **WINDOWED},
}
WITHOUT = {
    "gemma2": {"head_dim": 32, **WINDOWED},
    "gpt_oss": {"head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1, **WINDOWED},
}


def tiny(family: str) -> AutoConfig:
    return AutoConfig.for_model(family, **SHAPE | (EXACT | WITHOUT)[family])


def exact_varlen(q, k, v, cu_seq_lens, max_length, scale=None, window=None):
    """What the kernel computes, in float32 with one mask for each document. (T, H, D)."""
    parts = []
    for start, end in zip(cu_seq_lens[:-1].tolist(), cu_seq_lens[1:].tolist(), strict=True):
        before = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (before >= 0) & (before < (window or end - start))
        one = (x[start:end].transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=seen, scale=scale)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def documents(lengths: list[int]) -> dict:
    """A packed batch as TRL hands it over."""
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ids = torch.randint(1, 128, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    both = {f"cu_seq_lens_{side}": borders for side in "qk"} | {f"max_length_{side}": max(lengths) for side in "qk"}
    return {"input_ids": ids, "position_ids": positions, **both}


@pytest.mark.parametrize("lengths", [[96], [96, 40, 1, 70]])
@pytest.mark.parametrize("family", EXACT)
def test_packed_documents_are_computed_as_eager_computes_each_alone(family, lengths, monkeypatch):
    monkeypatch.setattr(attention, "causal_varlen", exact_varlen)
    torch.manual_seed(0)
    config = tiny(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    batch = documents(lengths)
    with torch.no_grad():
        alone = [model(input_ids=ids, use_cache=False).logits for ids in batch["input_ids"].split(lengths, dim=1)]
        model.set_attn_implementation(attention.register())
        packed = model(**batch, use_cache=False).logits
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=2e-5)


@pytest.mark.parametrize("family", WITHOUT)
def test_what_the_kernel_lacks_is_neither_chosen_nor_swallowed(family, tmp_path, monkeypatch):
    config = tiny(family)
    chosen = small_settings(tmp_path, "m")
    assert models.padded_attention(config) == "eager"
    assert attention.choose_attention(chosen, GPU, torch.bfloat16, config) == "eager"
    for wanted in ("varlen", "sdpa"):
        with pytest.raises(ValueError, match=f"attention = '{wanted}': {family} does not support it"):
            attention.choose_attention(dataclasses.replace(chosen, attention=wanted), GPU, torch.bfloat16, config)
    monkeypatch.setattr(attention, "causal_varlen", exact_varlen)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.set_attn_implementation(attention.register())
    with pytest.raises(ValueError, match="varlen attention does not know (softcap|s_aux) of this model"):
        model(**documents([8, 5]), use_cache=False)


@pytest.mark.parametrize("family", EXACT)
def test_a_gpu_takes_the_kernel_for_models_that_it_serves(family, tmp_path):
    chosen, config = small_settings(tmp_path, "m"), tiny(family)
    assert attention.choose_attention(chosen, GPU, torch.bfloat16, config) == "varlen"
    assert attention.choose_attention(chosen, GPU, torch.float32, config) == "sdpa"
