"""The engine of transformers models: its cache is the one that the model fills."""

import pytest
import torch
from inference_fixtures import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from llm_finetuning.inference.engines import TorchEngine

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def model_of(family: str, **changed):
    if family == "phi":
        return make_model(rows=320).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | changed)).eval()


FORGETFUL = {
    "gemma3_text": {"sliding_window": 16, "head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
"""Families whose caches hold a window, or a state that runs along, and what makes them do it in small."""


@pytest.mark.parametrize("family", ["phi", "llama", "qwen2"])
@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8, 9]]], ids=["one sequence", "a padded batch"])
def test_the_cache_grows_by_one_for_each_token_that_is_pushed(family, prompts):
    """A cache under a name that the model swallows stays empty, and each token would be computed without the others."""
    model = model_of(family)
    session = TorchEngine(model).session(prompts)
    longest = max(map(len, prompts))
    assert session.cache.get_seq_length() == longest
    for number in range(1, 5):
        session.push([10 + number] * len(prompts))
        assert session.cache.get_seq_length() == longest + number
    whole = torch.tensor([[*prompts[0], 11, 12, 13, 14]])
    with torch.no_grad():
        expected = model(input_ids=whole, use_cache=False).logits[0, -1]
    assert torch.allclose(session.logits[0], expected, atol=1e-4)


@pytest.mark.parametrize("family", FORGETFUL)
@pytest.mark.parametrize("asked", [60, 10], ids=["beyond the window", "within the window"])
def test_a_cache_that_forgets_tokens_serves_another_question(family, asked):
    """The next conversation shares its beginning alone with the last; what came after it has to be taken back."""
    model = model_of(family, **FORGETFUL[family])
    first = [5 + number for number in range(asked)]
    second = [*first[: asked // 2], 301, 302, 303]
    engine = TorchEngine(model)
    for ids, next_ids in ((first, [7, 8]), (second, [9, 10])):
        fresh = TorchEngine(model).session([ids])
        session = engine.session([ids])
        for token in next_ids:
            assert torch.allclose(session.logits, fresh.logits, atol=1e-4)
            session.push([token])
            fresh.push([token])
        assert torch.allclose(session.logits, fresh.logits, atol=1e-4)
        session.close()
