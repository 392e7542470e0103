"""The engine of transformers models: its cache is the one that the model fills, and kept for each conversation."""

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


@pytest.mark.parametrize("family", ["phi", "llama"])
@torch.inference_mode()
def test_a_step_that_is_interrupted_between_two_layers_leaves_no_cache(family):
    """One layer has the new token then and the next has not: cut to a prefix, it would miss a token in silence."""
    model = model_of(family)
    engine, asked = TorchEngine(model), [5, 6, 7, 8]
    session = engine.session([asked])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.push([9])
    hook.remove()
    session.close()
    expected = TorchEngine(model).session([asked]).logits
    assert torch.equal(engine.session([asked]).logits, expected)


@pytest.mark.parametrize("family", FORGETFUL)
@pytest.mark.parametrize("asked", [60, 10], ids=["beyond the window", "within the window"])
@torch.inference_mode()
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


@torch.inference_mode()
def answered(engine: TorchEngine, ids: list[int], tokens: int = 3) -> tuple[list[int], torch.Tensor, int]:
    """Runs a greedy session; returns prompt and answer, the logits after it, and how many ids the prefill was fed."""
    fed, forward = [], engine.model.forward
    engine.model.forward = lambda **inputs: fed.append(inputs["input_ids"].shape[1]) or forward(**inputs)
    session, ids = engine.session([ids]), list(ids)
    for _ in range(tokens):
        ids.append(int(session.logits.argmax()))
        session.push(ids[-1:])
    session.close()
    engine.model.forward = forward
    return ids, session.logits, fed[0]


SYSTEM = list(range(40, 46))
VISITORS = {"one": [*SYSTEM, *range(60, 80)], "two": [*SYSTEM, *range(160, 174)], "three": [*SYSTEM, *range(260, 277)]}


def test_each_of_several_visitors_finds_the_cache_of_their_conversation():
    engine, model = TorchEngine(model_of("llama")), model_of("llama")
    talks = {name: answered(engine, ids)[0] for name, ids in VISITORS.items()}
    for turn in range(2):
        for name, talk in talks.items():
            ids, logits, fed = answered(engine, [*talk, 7, 8 + turn])
            assert fed == 2
            assert torch.allclose(logits, answered(TorchEngine(model), [*talk, 7, 8 + turn])[1], atol=1e-4)
            talks[name] = ids


def test_a_short_question_leaves_the_other_conversations_with_its_system_message_alone():
    engine = TorchEngine(model_of("llama"))
    talk, _, _ = answered(engine, VISITORS["one"])
    _, logits, fed = answered(engine, [*SYSTEM, 9])
    assert fed == 1  # of the system message there is a copy
    assert torch.allclose(logits, answered(TorchEngine(model_of("llama")), [*SYSTEM, 9])[1], atol=1e-4)
    assert answered(engine, [*talk, 5])[2] == 1


def test_another_try_at_the_last_question_reads_nothing_anew():
    engine = TorchEngine(model_of("llama"))
    first, logits, _ = answered(engine, VISITORS["one"], tokens=50)
    again, same, fed = answered(engine, VISITORS["one"], tokens=50)
    assert (again, fed) == (first, 1) and torch.allclose(logits, same, atol=1e-4)


def test_kept_conversations_have_together_as_many_tokens_as_a_context():
    engine = TorchEngine(model_of("llama"))  # a context of 128
    for name, ids in VISITORS.items():
        answered(engine, [*ids, *range(30)], tokens=len(name))
    assert [ids[6] for ids, _ in engine.kept] == [260, 160]
    answered(engine, list(range(100, 220)), tokens=20)
    assert [len(ids) for ids, _ in engine.kept] == [140]
