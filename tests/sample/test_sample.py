"""The embedded default: its trees are what the file says, and have what a real export has."""

import json

import pytest

from llm_finetuning import prompts
from llm_finetuning.data.duplicates import normalise
from llm_finetuning.sample import TREES, languages, phi, trees, world


@pytest.fixture(scope="module")
def forest() -> list[dict]:
    return [json.loads(line) for line in TREES.read_text(encoding="utf-8").splitlines()]


def messages_of(tree: dict) -> list[dict]:
    found, waiting = [], [tree["prompt"]]
    while waiting:
        message = waiting.pop()
        found.append(message)
        waiting += message["replies"]
    return found


def all_messages(forest: list[dict]) -> list[dict]:
    return [message for tree in forest for message in messages_of(tree)]


def is_validation(tree: dict, share: float = 0.1) -> bool:
    return trees.share_of(tree["message_tree_id"]) < share


def asked(tree: dict) -> set[str]:
    """Prompts of a tree that somebody answered."""
    return {normalise(m["text"]) for m in messages_of(tree) if m["role"] == "prompter" and m["replies"]}


def depth(message: dict) -> int:
    return 1 + max(map(depth, message["replies"]), default=0)


def best(message: dict) -> dict:
    """The most preferred reply, as the data preparation picks it: synthetic, deleted, unreviewed ones left out."""
    good = [r for r in message["replies"] if r["review_result"] and not r["deleted"] and not r["synthetic"]]
    return min(good, key=lambda reply: reply.get("rank", 0))


def test_the_committed_file_is_what_the_script_writes(tmp_path):
    trees.write(tmp_path / "trees.jsonl")
    assert (tmp_path / "trees.jsonl").read_bytes() == TREES.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["trees.jsonl"]


def test_there_are_enough_trees_and_each_id_is_there_once(forest):
    ids = [tree["message_tree_id"] for tree in forest]
    messages = [message["message_id"] for message in all_messages(forest)]
    assert len(ids) >= 200 and len(ids) == len(set(ids)) and len(messages) == len(set(messages))
    assert all(tree["prompt"]["message_id"] == tree["message_tree_id"] for tree in forest)
    assert sum(map(is_validation, forest)) >= 30


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
    assert ours - real_fields <= {"user_id", "created_date", "labels"}  # in the hub's rows


def test_the_features_of_a_full_export_are_there(forest):
    messages = all_messages(forest)
    ready = [tree for tree in forest if tree["tree_state"] == "ready_for_export"]
    assert {message["lang"] for message in messages} == {"en", *languages.LANGUAGES}
    assert {depth(tree["prompt"]) for tree in ready} >= {2, 3, 4, 5, 6}
    assert {message.get("rank") for message in messages} == {None, 0, 1, 2, 3}
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
    assert any(order != sorted(order) for order in ranked)


def test_the_best_reply_is_the_right_one(forest):
    right = {fact.answer for fact in world.facts()}
    english = [m for m in all_messages(forest) if m["role"] == "prompter" and m["lang"] == "en"]
    answered = [m for m in english if any(r["review_result"] and not r["deleted"] for r in m["replies"])]
    assert len(answered) > 300
    assert {best(message)["text"] for message in answered} <= right


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_validation_asks_in_words_that_train_does_not_use(forest, share):
    held_out = [tree for tree in forest if is_validation(tree, share)]
    train = [tree for tree in forest if not is_validation(tree, share)]
    assert {tree["message_tree_id"] for tree in held_out} == {
        tree["message_tree_id"] for tree in forest if is_validation(tree)
    }
    assert not set().union(*map(asked, held_out)) & set().union(*map(asked, train))


def test_every_fact_of_validation_is_taught_in_several_wordings(forest):
    openings = {}
    for tree in forest:
        if tree["prompt"]["replies"] and not is_validation(tree) and tree["prompt"]["lang"] == "en":
            openings.setdefault(best(tree["prompt"])["text"], set()).add(tree["prompt"]["text"])
    held_out = [tree for tree in forest if is_validation(tree) and tree["prompt"]["lang"] == "en"]
    assert all(len(openings[best(tree["prompt"])["text"]]) >= 2 for tree in held_out)
    taught = {fact.attribute for fact in world.facts() if fact.answer in openings}
    assert taught == set(world.QUESTIONS)


def test_follow_ups_need_the_history(forest):
    names = {*world.PEOPLE, *world.ANIMALS, *world.TOWNS}
    follow_ups = [m for fact in world.facts() for m in fact.follow_ups()]
    assert not any(name in question for name in names for question in follow_ups)
    held_out = [m["text"] for tree in forest if is_validation(tree) for m in messages_of(tree)]
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
    pairs = [{"prompt": q, "response": f.answer} for f in world.facts() for q in f.questions()]
    assert max(row["response"] for row in prompts.lengths(pairs, template)) <= 24
