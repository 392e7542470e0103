"""The embedded default: its trees are what the file says, and have what a real export has."""

import json

import pytest

from llm_finetuning import prompts
from llm_finetuning.data.duplicates import normalise
from llm_finetuning.data.oasst import read_messages
from llm_finetuning.runner import parameters
from llm_finetuning.sample import TRAIN, VALIDATION, generic_passages, languages, phi, trees, trees_of, world

SPLITS = (TRAIN, VALIDATION)


@pytest.fixture(scope="module")
def forests() -> dict[str, list[dict]]:
    """{split: its trees}"""
    return {name: [json.loads(line) for line in trees_of(name).read_text("utf-8").splitlines()] for name in SPLITS}


@pytest.fixture
def forest(forests) -> list[dict]:
    return [tree for trees in forests.values() for tree in trees]


def messages_of(tree: dict) -> list[dict]:
    found, waiting = [], [tree["prompt"]]
    while waiting:
        message = waiting.pop()
        found.append(message)
        waiting += message["replies"]
    return found


def all_messages(forest: list[dict]) -> list[dict]:
    return [message for tree in forest for message in messages_of(tree)]


def asked(tree: dict) -> set[str]:
    """Prompts of a tree that somebody answered."""
    return {normalise(m["text"]) for m in messages_of(tree) if m["role"] == "prompter" and m["replies"]}


def depth(message: dict) -> int:
    return 1 + max(map(depth, message["replies"]), default=0)


def best(message: dict) -> dict:
    """The most preferred reply, as the data preparation picks it: synthetic, deleted, unreviewed ones left out."""
    good = [r for r in message["replies"] if r["review_result"] and not r["deleted"] and not r["synthetic"]]
    return min(good, key=lambda reply: reply.get("rank", 0))


@pytest.mark.parametrize("split", SPLITS)
def test_the_committed_file_is_what_the_script_writes(tmp_path, split):
    trees.write(tmp_path / "trees.jsonl", split)
    assert (tmp_path / "trees.jsonl").read_bytes() == trees_of(split).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["trees.jsonl"]


@pytest.mark.parametrize(("split", "count"), [(TRAIN, 400), (VALIDATION, 200)])
def test_there_are_enough_trees_and_each_id_is_there_once(forests, split, count):
    ids = [tree["message_tree_id"] for tree in forests[split]]
    messages = [message["message_id"] for message in all_messages(forests[split])]
    assert len(ids) >= count and len(ids) == len(set(ids)) and len(messages) == len(set(messages))
    assert all(tree["prompt"]["message_id"] == tree["message_tree_id"] for tree in forests[split])


def test_the_sample_is_read_by_split_and_as_a_whole_is_what_is_trained_on():
    train, validation, everything = (read_messages("sample", split) for split in (*SPLITS, None))
    assert [train.attrs["split_name"], validation.attrs["split_name"]] == ["trees-train", "trees-validation"]
    assert len(train) > len(validation) and list(everything["message_id"]) == list(train["message_id"])


def test_every_message_hangs_below_its_parent_and_was_written_after_it(forest):
    for parent in all_messages(forest):
        for reply in parent["replies"]:
            assert reply["parent_id"] == parent["message_id"]
            assert reply["created_date"] > parent["created_date"]
            assert reply["role"] != parent["role"]


def test_the_fields_are_those_of_the_real_export(forest, real_trees):
    real = real_trees.read_text(encoding="utf-8").splitlines()
    real_fields = set().union(*all_messages([json.loads(line) for line in real]))
    ours = set().union(*all_messages(forest))
    assert real_fields <= ours
    assert ours - real_fields <= {"user_id", "created_date", "labels", "detoxify"}  # in the hub's rows


def test_the_features_of_a_full_export_are_there(forest):
    messages = all_messages(forest)
    ready = [tree for tree in forest if tree["tree_state"] == "ready_for_export"]
    assert {message["lang"] for message in messages} == {"en", *languages.LANGUAGES}
    assert {depth(tree["prompt"]) for tree in ready} >= {2, 3, 4, 5, 6}
    assert {message.get("rank") for message in messages} == {None, 0, 1, 2}
    assert any(message["deleted"] for message in messages)
    assert any(not message["review_result"] for message in messages)
    assert any(message["synthetic"] and message["model_name"] for message in messages)
    assert any(message.get("emojis", {}).get("+1") for message in messages)
    assert any(message.get("labels", {}).get("spam", {}).get("value") == 1.0 for message in messages)
    assert any(message["role"] == "prompter" and not message["replies"] for message in messages)
    assert len({tree["tree_state"] for tree in forest}) >= 5
    openings = [tree["prompt"]["text"] for tree in ready]
    assert len(openings) > len(set(openings))  # duplicates


def test_replies_are_not_in_the_order_of_their_rank(forest):
    ranks = [[r["rank"] for r in m["replies"] if "rank" in r] for m in all_messages(forest)]
    ranked = [order for order in ranks if order]
    assert all(sorted(order) == list(range(len(order))) and len(order) > 1 for order in ranked)
    assert 0.4 < sum(order != sorted(order) for order in ranked) / len(ranked) < 0.6


def test_the_best_reply_is_the_right_one(forest):
    right = {answer for fact in world.facts() for answer in fact.answers}
    english = [m for m in all_messages(forest) if m["role"] == "prompter" and m["lang"] == "en"]
    answered = [m for m in english if any(r["review_result"] and not r["deleted"] for r in m["replies"])]
    assert len(answered) > 300
    assert {best(message)["text"] for message in answered} <= right


def test_validation_asks_in_words_that_train_does_not_use_but_for_the_leaks(forests):
    leaked = [set().union(*(asked(pair[side]) for pair in trees.leaks().values())) for side in (0, 1)]
    train, held_out = (set().union(*map(asked, forests[split])) for split in SPLITS)
    assert len(held_out) > 200 and (train & held_out) <= (leaked[0] & leaked[1])


def openings(forest: list[dict]) -> dict[str, set[str]]:
    """{attribute and subject: the words in which it is asked first, in English and with a reply}"""
    fact_of = {answer: f"{fact.attribute} {fact.subject}" for fact in world.facts() for answer in fact.answers}
    prompts_of = {}
    for tree in forest:
        if tree["prompt"]["replies"] and tree["prompt"]["lang"] == "en":
            prompts_of.setdefault(fact_of[best(tree["prompt"])["text"]], set()).add(tree["prompt"]["text"])
    return prompts_of


def test_every_fact_of_validation_is_taught_in_several_wordings(forests):
    train, held_out = (openings(forests[split]) for split in SPLITS)
    assert all(len(train[fact]) >= 2 for fact in held_out)
    assert {fact.split()[0] for fact in held_out} == set(world.QUESTIONS)


def test_follow_ups_need_the_history(forests):
    names = {*world.PEOPLE, *world.ANIMALS, *world.TOWNS}
    follow_ups = [m for fact in world.facts() for m in fact.follow_ups()]
    assert not any(name in question for name in names for question in follow_ups)
    held_out = [message["text"] for message in all_messages(forests[VALIDATION])]
    assert len(set(follow_ups) & set(held_out)) >= 10


def test_the_tokenizer_encodes_any_text_and_is_the_same_each_time():
    first, second = phi.train_tokenizer(phi.Recipe()), phi.train_tokenizer(phi.Recipe())
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    text = "Ærøskøbing 🐙\n\tdef f(x):\r\n  return 漢字 ﷽ \u200d"
    assert first.decode(first(text).input_ids) == text
    assert len(first(" Tessaly").input_ids) == 1  # it has read about the world
    assert first.pad_token is None and first.chat_template is None
    assert first.bos_token == first.eos_token == first.unk_token == "<|endoftext|>"


def test_the_base_reads_no_dialogue():
    text = "\n".join(phi.texts(phi.Recipe(documents=5)))
    assert "Instruct" not in text and "?" not in text
    assert all(fact.value in text for fact in world.facts())


def test_answers_fit_the_scoreboard():
    tokenizer = phi.train_tokenizer(phi.Recipe())
    template = prompts.template_for(tokenizer, "You are a helpful assistant.")
    pairs = [{"prompt": fact.questions()[0], "response": text} for fact in world.facts() for text in fact.answers]
    longest = max(row["response"] for row in prompts.lengths(pairs, template))
    assert 40 < longest <= parameters.read_profile("sample")["max_new_tokens"]


def test_the_generic_text_is_of_another_world():
    passages = generic_passages()
    known = {name.casefold() for kind in (world.PEOPLE, world.ANIMALS, world.TOWNS) for name in kind}
    assert len(set(passages)) == len(passages) >= 10
    assert all(len(passage) > 70 and not known & set(passage.casefold().split()) for passage in passages)
