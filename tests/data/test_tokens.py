"""Token counts: those of whole conversations for every kind of template, and each text tokenised once."""

import copy
import random
from functools import cache
from importlib.resources import files

import pytest
from inference_fixtures import make_tokenizer

from llm_finetuning import models, prompts
from llm_finetuning.data import pairs, tokens
from llm_finetuning.data.oasst import flatten, read_messages
from llm_finetuning.data.tokens import TokenCounter

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "phi-2": "",
    "chatml": TURNS + OPEN,
    "trimmed": TURNS.replace("m.content", "m.content | trim") + OPEN,
    "thoughts are dropped from earlier turns": TURNS.replace(
        "m.content", "(m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1])"
    )
    + OPEN,
    "no system message": "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + TURNS + OPEN,
    "counts its turns": TURNS.replace("m.role +", "m.role + loop.index | string +") + "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant' + (messages | length + 1) | string + '\n' }}{% endif %}",
    "turns without a special token": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
}
TEXTS = ["Hi", " two\n\nlines ", "", "<think>Hm</think>Yes", "12 of <|im_end|> it", "日本語", "Why is it so? " * 9]


@cache
def tokenizer_of_tests():
    return make_tokenizer()


def template_of(chat_template: str, system: str = "") -> prompts.Template:
    tokenizer = copy.deepcopy(tokenizer_of_tests())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template or None
    return prompts.template_for(tokenizer, system)


def random_pair(chance: random.Random, system: bool) -> dict:
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": chance.choice(TEXTS)} for n in range(2 * chance.randrange(6))
    ]
    start = [{"role": "system", "content": chance.choice(TEXTS)}] if system and chance.random() < 0.4 else []
    return {"prompt": chance.choice(TEXTS), "response": f"A{chance.choice(TEXTS)}", "history": start + turns}


def expected_truncations(some: list[dict], template: prompts.Template, limit: int) -> list[dict | None]:
    return [cut.pair if cut.example else None for cut in prompts.truncate_histories(some, template, limit)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_counts_and_truncations_are_those_of_whole_conversations(name):
    template, chance = template_of(TEMPLATES[name]), random.Random(name)
    some = [random_pair(chance, system=name != "no system message") for _ in range(40)]
    counter = TokenCounter(template)
    assert counter.lengths(some) == prompts.lengths(some, template)
    assert counter.adds_up is (name not in ("counts its turns", "turns without a special token"))
    for limit in (30, 120):
        assert counter.truncate(some, limit) == expected_truncations(some, template, limit)


@pytest.mark.parametrize(("batch", "parts"), [(3, 5), (1, 1), (50, 7)])
def test_counts_are_the_same_in_pieces_of_any_size(batch, parts, monkeypatch):
    template, chance = template_of(TEMPLATES["chatml"]), random.Random(batch)
    some = [random_pair(chance, system=True) for _ in range(60)]
    whole = TokenCounter(template).lengths(some)
    monkeypatch.setattr(tokens, "BATCH", batch)
    monkeypatch.setattr(tokens, "PARTS", parts)
    counter = TokenCounter(template)
    assert counter.lengths(some[:20]) + counter.lengths(some) == whole[:20] + whole
    known = counter.lengths(some)
    assert counter.truncate(some, 60, known) == expected_truncations(some, template, 60)


def test_a_fault_while_texts_are_tokenised_beside_is_raised(monkeypatch):
    counter = TokenCounter(template_of(TEMPLATES["chatml"]))

    def broken(self: TokenCounter, texts: list[str]) -> list[int]:
        raise RuntimeError("no tokens")

    monkeypatch.setattr(TokenCounter, "_sizes", broken)
    monkeypatch.setattr(TokenCounter, "_check_openings", lambda self, pairs: None)
    with pytest.raises(RuntimeError, match="no tokens"):
        counter.lengths([{"prompt": "a new one", "response": "yes"}])
    assert not any("a new one" in str(part) for part in counter.parts)


@pytest.mark.more
def test_counts_hold_for_every_template_that_trl_ships():
    found = 0
    for file in sorted(files("trl").joinpath("chat_templates").iterdir(), key=str):
        if not file.name.endswith(".jinja"):
            continue
        some = [random_pair(random.Random(seed), system=False) for seed in range(25)]
        try:
            template = template_of(file.read_text(encoding="utf-8"))
            whole = prompts.lengths(some, template)
        except ValueError:
            continue  # it asks for tools, or writes a finished turn in other words
        found += 1
        counter = TokenCounter(template)
        assert counter.lengths(some) == whole, file.name
        assert counter.truncate(some, 60) == expected_truncations(some, template, 60), file.name
    assert found >= 10


def test_real_trees_with_the_real_tokenizer_give_the_counts_of_encoding(real_trees, phi2_tokenizer_folder):
    template = prompts.template_for(models.tokenizer("microsoft/phi-2", str(phi2_tokenizer_folder)), "Be helpful.")
    some = pairs.to_records(flatten(read_messages(real_trees), "all").pairs)
    counter = TokenCounter(template)
    assert counter.adds_up and counter.lengths(some) == prompts.lengths(some, template)
    some = some[:150]
    for limit in (200, 1024):
        assert counter.truncate(some, limit) == expected_truncations(some, template, limit)


def test_a_chat_costs_as_many_texts_as_it_has_turns(monkeypatch):
    template = template_of("", "Be brief.")
    sizes = []
    plain = TokenCounter._sizes

    def counted(self, texts):
        sizes.append(sum(map(len, texts)))
        return plain(self, texts)

    monkeypatch.setattr(TokenCounter, "_sizes", counted)
    spent = {}
    for turns in (40, 80, 160):
        counter, texts = TokenCounter(template), [f"What is it with number {n}?" for n in range(turns)]
        chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        some = [{"prompt": texts[n], "response": texts[n + 1], "history": chat[:n]} for n in range(0, turns, 2)]
        sizes.clear()
        counter.lengths(some)
        cut = counter.truncate(some, 200)
        spent[turns] = sum(sizes)
        assert turns > 40 or cut == expected_truncations(some, template, 200)
    assert spent[80] < 2.5 * spent[40] and spent[160] < 2.5 * spent[80]


def test_an_answer_that_melts_into_the_prompt_is_counted_as_it_is_encoded():
    template = template_of(TEMPLATES["turns without a special token"].replace("'assistant:'", "'assistant: '"))
    some = [{"prompt": "Q", "response": "Answer", "history": []}]
    assert TokenCounter(template).lengths(some) == prompts.lengths(some, template)


def test_turns_out_of_order_are_refused():
    pair = {"prompt": "Q", "response": "A", "history": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(ValueError, match="the roles are user, user, assistant"):
        TokenCounter(template_of("")).lengths([pair])
