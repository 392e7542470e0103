"""Variable-length attention honours what a model asks of it, or is not chosen for it."""

import dataclasses

import pytest
import torch
import transformers
from families import FAMILIES
from packaging.version import Version
from training_fixtures import small_settings
from transformers import AutoConfig, AutoModelForCausalLM

from llm_finetuning import models
from llm_finetuning.hardware import GIB, Machine
from llm_finetuning.training import attention, model_size

GPU = Machine("cuda:0", "A100", (8, 0), 40 * GIB, 40 * GIB, 12 * GIB, 2, 250e12, True)
SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0}
WINDOWED = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20}
LATENT |= {"num_key_value_heads": 2}
DENSE = {"first_k_dense_replace": 2, "n_routed_experts": 2, "num_experts_per_tok": 1}
EXACT = {
    "phi": {"num_key_value_heads": 2},
    "llama": {"head_dim": 20},
    "mistral": {"sliding_window": 32},
    "gemma3_text": {"head_dim": 32, **WINDOWED},
    "qwen3": {"head_dim": 32, "use_sliding_window": True, **WINDOWED},
    "deepseek_v2": LATENT | DENSE,
    "minicpm3": LATENT,
}
WITHOUT = {
    "gemma2": {"head_dim": 32, **WINDOWED},
    "gpt_oss": {"head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1, **WINDOWED},
}
PADDED = {
    "gemma4_text": {"head_dim": 256, **WINDOWED, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 128},
    "helium": {"head_dim": 264, "hidden_size": 528},
    "deepseek_v3": LATENT | DENSE | {"qk_nope_head_dim": 256},
    "starcoder2": {"attention_dropout": 0.1},
    "gpt_bigcode": {"attn_pdrop": 0.1},
    "biogpt": {"attention_probs_dropout_prob": 0.1},
    **({"falcon": {}} if Version(transformers.__version__) < Version("5.24") else {}),
}
"""What sdpa serves and the kernel does not: wide heads, dropout, attention that is not taken from a register."""


def tiny(family: str) -> AutoConfig:
    return AutoConfig.for_model(family, **SHAPE | (FAMILIES | EXACT | WITHOUT | PADDED)[family])


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


def strict_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Stands for torch's function on a GPU: refuses the widths that its operator refuses there, or computes exactly."""
    widths = [x.shape[-1] for x in (query, key, value)]
    if len(set(widths)) > 1 or widths[0] % 8 or widths[0] > 256:
        raise RuntimeError(f"FlashAttention: heads of {widths} values")
    return exact_varlen(query, key, value, cu_seq_q, max_q, scale, None if window_size[0] < 0 else window_size[0] + 1)


@pytest.fixture
def kernel(monkeypatch):
    """torch's variable-length attention as a GPU has it."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", strict_varlen)
    monkeypatch.setattr(attention, "_causal_window", attention._causal_window.__wrapped__)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("width", "of_values"), [(80, 80), (100, 100), (192, 128), (96, 64), (64, 100), (255, 255)])
def test_heads_of_any_width_reach_the_kernel_as_it_asks_for_them(kernel, width, of_values, scale):
    q, k, v = (torch.randn(50, 3, size, requires_grad=True) for size in (width, width, of_values))
    borders = torch.tensor([0, 20, 21, 50], dtype=torch.int32)
    for window in (None, 8):
        found = attention.causal_varlen(q, k, v, borders, 29, scale, window)
        expected = exact_varlen(q, k, v, borders, 29, scale, window)
        assert torch.allclose(found, expected, atol=1e-5)
        weights = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def documents(lengths: list[int]) -> dict:
    """A packed batch as TRL hands it over."""
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ids = torch.randint(1, 128, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    both = {f"cu_seq_lens_{side}": borders for side in "qk"} | {f"max_length_{side}": max(lengths) for side in "qk"}
    return {"input_ids": ids, "position_ids": positions, **both}


@pytest.mark.parametrize("lengths", [[96], [96, 40, 1, 70]])
@pytest.mark.parametrize("family", EXACT)
def test_packed_documents_are_computed_as_eager_computes_each_alone(family, lengths, kernel):
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


@pytest.mark.parametrize("family", PADDED)
def test_what_the_kernel_cannot_serve_is_padded(family, tmp_path):
    chosen, config = small_settings(tmp_path, "m"), tiny(family)
    assert attention.choose_attention(chosen, GPU, torch.bfloat16, config) == "sdpa"
    with pytest.raises(ValueError, match=f"attention = 'varlen': {family} does not support it"):
        attention.choose_attention(dataclasses.replace(chosen, attention="varlen"), GPU, torch.bfloat16, config)


CHEAP = (*PADDED, "gpt_neo", "olmo2", "stablelm")


@pytest.mark.parametrize(
    "family", [*CHEAP, *(pytest.param(name, marks=pytest.mark.more) for name in FAMILIES if name not in CHEAP)]
)
def test_a_model_computes_with_what_is_chosen_for_it(family, tmp_path, kernel):
    """In training mode, where dropout counts."""
    config, batch = tiny(family), documents([9, 1, 6])
    name = attention.choose_attention(small_settings(tmp_path, "m"), GPU, torch.bfloat16, config)
    attention.register()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=name).train()
    given = batch if name == attention.NAME else {key: batch[key] for key in ("input_ids", "position_ids")}
    assert model(**given, use_cache=False).logits.isfinite().all()


OTHERS = {"mamba": "in_proj, x_proj"} | dict.fromkeys(("jamba", "recurrent_gemma", "bamba"), "down_proj")


@pytest.mark.parametrize("family", OTHERS)
def test_other_kinds_of_models_are_planned_for(family, tmp_path, capsys):
    """Without attention, or with kinds of layers that other settings say: they come as far as the self-check."""
    config = AutoConfig.for_model(family, vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    chosen = small_settings(tmp_path, "m", lora_target_modules=OTHERS[family], packing=False)
    kind = attention.choose_attention(chosen, GPU, torch.bfloat16, config)
    assert kind in ("sdpa", "eager")
    attention.choose_attention(dataclasses.replace(chosen, packing=True), GPU, torch.bfloat16, config)
    assert model_size.measure_size(chosen, config, torch.bfloat16, True, kind).heads >= 0


@pytest.mark.parametrize("family", ["deepseek_v2", "minicpm3", "llama"])
def test_activations_of_uneven_heads_are_counted(family, tmp_path, capsys):
    chosen = small_settings(tmp_path, "m", lora_target_modules="o_proj")
    assert model_size.measure_size(chosen, tiny(family), torch.bfloat16, True).activation_bytes > 0
    assert "estimated" not in capsys.readouterr().out
