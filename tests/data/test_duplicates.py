"""Near duplicates: what differs decides, not how much text two prompts share."""

import random
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest

from llm_finetuning.data import leaks
from llm_finetuning.data.duplicates import NearSearch, _buckets, hunks, like_earlier, normalise, shingles, similarity

INSTRUCTION = (
    "You are a careful assistant who writes for children. Read the word at the end, think about what it means in "
    "everyday life, and explain it in exactly two short sentences, without difficult words, without lists, and in a "
    "friendly tone, so that a child of six years understands every part of it. The word is: "
)
NOUNS = ["house", "mouse", "horse", "tree", "cat", "car", "bat", "rat", "dog", "dogs", "book", "look", "boat", "coat"]


def nouns(number: int, seed: int = 0) -> list[str]:
    chance, found = random.Random(seed), dict.fromkeys(NOUNS)
    while len(found) < number:
        found["".join(chance.choice("bdfgklmnprstv") + chance.choice("aeiou") for _ in range(chance.randint(2, 4)))] = (
            None
        )
    return list(found)[:number]


def left(prompts: list[str], histories=None, threshold: float = 0.9) -> list[str]:
    """The prompts that stay, each asked by another message."""
    histories = histories or [[]] * len(prompts)
    pairs = [{"prompt": p, "response": "R", "history": h} for p, h in zip(prompts, histories, strict=True)]
    found = like_earlier(pairs, list(range(len(pairs))), threshold)
    return [prompt for prompt, like in zip(prompts, found, strict=True) if like is None]


SHOTS = "".join(
    f"Q: What is the {a} of {b}?\nA: The {c}.\n\n" for a, b, c in zip(*[iter(nouns(180, 3))] * 3, strict=True)
)
PASSAGE = "The fjord is a long, narrow inlet with steep sides, made by a glacier that went down to the sea. " * 9
TEMPLATED = {
    "instruction first": [INSTRUCTION + noun for noun in nouns(240)],
    "instruction last": [f"{noun.title()}.\n{INSTRUCTION}" for noun in nouns(240)],
    "in the middle": [INSTRUCTION[:150] + noun + INSTRUCTION[150:] for noun in nouns(240)],
    "words that are one letter apart": [INSTRUCTION + noun for noun in NOUNS],
    "few shots": [SHOTS + f"Q: What is the {a} of {b}?" for a, b in zip(nouns(120, 5), nouns(120, 6), strict=True)],
    "a number": [f"{INSTRUCTION} {number}" for number in range(300)],
    "two tasks with each text": [
        f"Translate into {language}: {INSTRUCTION} {noun}" for noun in nouns(60) for language in ("French", "German")
    ],
    "questions about one passage": [
        PASSAGE + q for q in ("Who made it?", "How long is it?", "What is it?", "Where is it?")
    ],
    "labels of short texts": [
        f"{INSTRUCTION} the film is {word}" for word in ("good", "not good", "bad", "very bad", "fine", "not bad")
    ],
    "no blanks between words": [
        f"请把下面这个词翻译成法语，并且用两句话解释它的意思，{'写得清楚一些，' * 20}{word}"
        for word in "猫狗马牛羊猪鸡鸭"
    ],
}


@pytest.mark.parametrize("name", TEMPLATED)
def test_prompts_of_a_template_are_different_prompts(name):
    prompts = TEMPLATED[name]
    assert left(prompts) == prompts


@pytest.mark.parametrize("name", TEMPLATED)
def test_prompts_of_a_template_are_no_leaks(name):
    prompts = TEMPLATED[name]
    rows = pd.DataFrame({"prompt": prompts, "message_tree_id": None, "message_id": None})
    for kinds in leaks.overlaps(rows[::2], rows[1::2], 0.9):
        assert kinds.isna().all()


TRIFLES = {
    "case": INSTRUCTION.upper(),
    "white space": INSTRUCTION.replace(" ", "  ").replace(".", ".\n"),
    "closing punctuation": INSTRUCTION.strip().rstrip(":") + "?!",
    "punctuation": INSTRUCTION.replace(",", ""),
    "a letter left out": INSTRUCTION.replace("careful", "carful"),
    "a letter too many": INSTRUCTION.replace("everyday", "everryday"),
    "a letter replaced": INSTRUCTION.replace("friendly", "frxendly"),
    "letters swapped": INSTRUCTION.replace("children", "chlidren"),
    "a short word's letters swapped": INSTRUCTION.replace("The word", "Teh word"),
    "a blank left out": INSTRUCTION.replace("a child", "achild"),
    "a short word too many": INSTRUCTION.replace("short", "very short"),
    "two slips": INSTRUCTION.replace("careful", "carful").replace("difficult", "dificult"),
}


@pytest.mark.parametrize("name", TRIFLES)
def test_prompts_that_differ_in_trifles_are_near(name):
    assert left([INSTRUCTION, TRIFLES[name]]) == [INSTRUCTION]
    assert left([PASSAGE, INSTRUCTION, "Hi", TRIFLES[name]]) == [PASSAGE, INSTRUCTION, "Hi"]


def test_all_of_many_slightly_different_copies_but_one_go():
    words = INSTRUCTION.split()
    long = [place for place, word in enumerate(words) if len(word) > 5]
    copies = [" ".join([*words[:at], words[at][:2] + words[at][3:], *words[at + 1 :]]) for at in long]
    assert left([INSTRUCTION, *copies]) == [INSTRUCTION]
    assert left([*copies, INSTRUCTION]) == copies[:1]


@pytest.mark.parametrize("place", [5, 100, 700])
def test_a_slip_in_a_templates_own_text_is_found_among_many(place):
    prompts = [INSTRUCTION + noun for noun in nouns(800)]
    again = prompts[place].replace("careful", "carful")
    assert left([*prompts, again]) == prompts
    train = pd.DataFrame({"prompt": prompts, "message_tree_id": None, "message_id": None})
    in_train, in_validation = leaks.overlaps(train, train.iloc[:1].assign(prompt=again), 0.9)
    assert in_train[in_train.notna()].index.tolist() == [place] and in_validation.tolist() == ["near prompt"]


def test_the_time_of_a_template_grows_with_the_number_of_prompts(monkeypatch):
    compared = []
    monkeypatch.setattr(NearSearch, "_hunks", lambda self, one, other: compared.append((one, other)))
    for make in (
        lambda n: [INSTRUCTION + noun for noun in nouns(n)],
        lambda n: [f"{INSTRUCTION} {k}" for k in range(n)],
    ):
        spent = {}
        for number in (250, 1000):
            compared.clear()
            left(make(number))
            spent[number] = len(compared)
        assert spent[1000] < 8 * max(spent[250], 1)


def test_personas_asking_the_same_question_are_different_conversations():
    personas = [[{"role": "system", "content": f"You are {noun}."}] for noun in nouns(40)]
    prompts = [INSTRUCTION] * 40
    assert left(prompts, personas) == prompts
    assert left(prompts) == prompts[:1]
    rows = pd.DataFrame({"prompt": prompts, "history": personas, "message_tree_id": None, "message_id": None})
    assert all(kinds.isna().all() for kinds in leaks.overlaps(rows[:20], rows[20:], 0.9))


def test_prompts_with_different_numbers_are_not_near():
    assert len(left(["count from 1 to 100, please", "count from 1 to 10, please"], threshold=0.5)) == 2
    assert len(left(["count from 1 to 100, please", "count from 1 to 100, pleas"], threshold=0.5)) == 1


def test_similar_texts_are_proposed():
    chance = random.Random(0)
    texts = ["".join(chance.choices("abcdefgh ", k=120)) for _ in range(60)]
    texts += [text[:20] + chance.choice("xyz") + text[21:] for text in texts]
    search, parts = NearSearch(0.7, texts), shingles(texts)
    found = 0
    for place in range(len(texts)):
        expected = {o for o in range(len(texts)) if o != place and similarity(parts[place], parts[o]) >= 0.7}
        assert expected <= set(search._proposed(place, 0))
        found += len(expected)
    assert found >= 100


@pytest.mark.parametrize("texts", [0, 1, 30, 200])
def test_buckets_hold_the_texts_with_equal_labels_and_hashes(texts):
    bands, rows, chance = 3, 2, np.random.default_rng(texts)
    hashes = chance.integers(2**32 - 4, 2**32, size=(texts, bands * rows), dtype=np.uint64)
    labels = [str(number) for number in chance.integers(0, 3, size=texts)]
    expected = defaultdict(list)
    for place, label in enumerate(labels):
        for band in range(bands):
            expected[label, band, *hashes[place, band * rows : (band + 1) * rows].tolist()].append(place)
    assert _buckets(hashes, bands, labels) == [places for places in expected.values() if len(places) > 1]


def test_hunks_are_where_two_texts_differ():
    one, other = list("abcdef"), list("axcdfg")
    assert [(h.first, h.second) for h in hunks(one, other)] == [(["b"], ["x"]), (["e"], []), ([], ["g"])]
    assert hunks(one, one) == [] and normalise(" A  b! ") == "a b"
