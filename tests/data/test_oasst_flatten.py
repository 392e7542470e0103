"""Flattening: the original's rows to the letter, and what must hold of every pair."""

import random

import pandas as pd
import pytest
from forests import forests, original_rows, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_finetuning.data.filters import Filters
from llm_finetuning.data.oasst import flatten, read_messages

RECIPES = ("best", "all", "joined")
FILTERS = {
    "languages": ["en"],
    "tree_states": ["ready_for_export"],
    "drop_deleted": True,
    "drop_unreviewed": True,
    "drop_synthetic": True,
    "min_quality": 0.3,
    "max_toxicity": 0.5,
    "max_detoxify": 0.5,
    "min_response_chars": 3,
    "drop_duplicates": True,
    "near_duplicates": 0.8,
    "truncate": lambda pairs: [pair if len(pair["response"]) < 12 else None for pair in pairs],
}
some_filters = st.sets(st.sampled_from(sorted(FILTERS))).map(lambda names: {name: FILTERS[name] for name in names})


def forest(*rows: tuple, **columns) -> pd.DataFrame:
    """Messages of one tree "t": (id, parent, role, text, rank)."""
    names = ["message_id", "parent_id", "role", "text", "rank"]
    return pd.DataFrame(rows, columns=names).assign(message_tree_id="t", lang="en", **columns)


def rows_of(flat) -> list[tuple[str, str]]:
    return list(zip(flat.pairs["prompt"], flat.pairs["response"], strict=True))


def test_joined_gives_the_originals_rows_on_real_trees(real_trees):
    messages = read_messages(real_trees)
    assert rows_of(flatten(messages, "joined")) == original_rows(messages)


@given(forests())
@settings(deadline=None, max_examples=60)
def test_joined_gives_the_originals_rows_on_any_forest(messages):
    assert rows_of(flatten(messages, "joined")) == original_rows(messages)


@given(forests(), st.sampled_from(RECIPES), st.integers(0, 2**32), some_filters)
@settings(deadline=None, max_examples=60)
def test_row_order_changes_nothing(messages, recipe, seed, filters):
    mixed = shuffled(messages, random.Random(seed))
    one, other = flatten(messages, recipe, **filters), flatten(mixed, recipe, **filters)
    pd.testing.assert_frame_equal(one.pairs, other.pairs)
    pd.testing.assert_frame_equal(one.funnel, other.funnel)


@given(forests(), st.sampled_from(RECIPES), some_filters)
@settings(deadline=None, max_examples=60)
def test_every_loss_is_counted(messages, recipe, filters):
    flat = flatten(messages, recipe, **filters)
    totals = {"tree": messages["message_tree_id"].nunique(), "message": len(messages)}
    for unit, steps in flat.funnel.groupby("unit"):
        assert steps["kept"].iloc[0] == totals.get(unit, steps["kept"].iloc[0])
        assert steps["dropped"].iloc[0] == 0
        before = steps["kept"].shift(fill_value=steps["kept"].iloc[0])
        assert (steps["kept"] + steps["dropped"] == before).all()
    assert flat.funnel["kept"].iloc[-1] == len(flat.pairs)


@given(forests(), st.sampled_from(("best", "all")), some_filters)
@settings(deadline=None, max_examples=60)
def test_pairs_are_true_paths_of_their_trees(messages, recipe, filters):
    by_id = messages.set_index("message_id").to_dict("index")
    flat = flatten(messages, recipe, **filters)
    assert flat.pairs["message_id"].is_unique
    for pair in flat.pairs.to_dict("records"):
        reply = by_id[pair["message_id"]]
        path, above = [], reply["parent_id"]
        while isinstance(above, str):
            path.insert(0, by_id[above])
            above = by_id[above]["parent_id"]
        assert reply["role"] == "assistant" and reply["text"] == pair["response"]
        assert path[-1]["role"] == "prompter" and path[-1]["text"] == pair["prompt"]
        assert [turn["content"] for turn in pair["history"]] == [message["text"] for message in path[:-1]]
        assert [turn["role"] for turn in pair["history"]] == ["user", "assistant"] * (len(path) // 2)


@given(forests())
@settings(deadline=None, max_examples=60)
def test_all_takes_each_reply_once_and_best_the_preferred_one(messages):
    replies = messages[(messages["role"] == "assistant") & (messages["text"] != "")]
    assert flatten(messages, "all").pairs["message_id"].tolist() == replies["message_id"].tolist()
    expected = []
    for _, siblings in replies.groupby("parent_id", sort=False):
        ranked = siblings[siblings["rank"].notna()] if siblings["rank"].notna().any() else siblings
        lowest = ranked[ranked["rank"] == ranked["rank"].min()] if len(ranked["rank"].dropna()) else ranked
        best = lowest[lowest["quality"] == lowest["quality"].max()] if lowest["quality"].notna().any() else lowest
        expected.append(best["message_id"].iloc[0])
    assert sorted(flatten(messages, "best").pairs["message_id"]) == sorted(expected)


@given(forests(), st.sampled_from(RECIPES))
@settings(deadline=None, max_examples=30)
def test_filters_leave_nothing_they_should_take(messages, recipe):
    unwanted = messages[messages["deleted"] | messages["review_result"].eq(False) | messages["lang"].eq("de")]
    marked = messages.assign(text=messages["message_id"].map(lambda name: f"<{name}>"))
    flat = flatten(marked, recipe, languages=["en"], drop_deleted=True, drop_unreviewed=True)
    everything = flat.pairs.to_json()
    assert not [name for name in unwanted["message_id"] if f"<{name}>" in everything]


def test_the_next_best_reply_takes_the_place_of_one_that_a_filter_took():
    messages = forest(
        ("q", None, "prompter", "Question", None),
        ("a", "q", "assistant", "Deleted answer", 0),
        ("b", "q", "assistant", "Unreviewed answer", 1),
        ("c", "q", "assistant", "Synthetic answer", 2),
        ("d", "q", "assistant", "Poor answer", 3),
        ("e", "q", "assistant", "Toxic answer", 4),
        ("f", "q", "assistant", "Rude answer", 5),
        ("g", "q", "assistant", "No", 6),
        ("h", "q", "assistant", "Much too long an answer", 7),
        ("i", "q", "assistant", "Good answer", 8),
        ("j", "q", "assistant", "Late answer", 9),
        deleted=[name == "a" for name in "qabcdefghij"],
        review_result=[name != "b" for name in "qabcdefghij"],
        synthetic=[name == "c" for name in "qabcdefghij"],
        quality=[0.1 if name == "d" else 0.9 for name in "qabcdefghij"],
        toxicity=[0.9 if name == "e" else 0.1 for name in "qabcdefghij"],
        detoxify=[0.9 if name == "f" else 0.1 for name in "qabcdefghij"],
    )
    asked = {
        "drop_deleted": ("Unreviewed answer", True),
        "drop_unreviewed": ("Synthetic answer", True),
        "drop_synthetic": ("Poor answer", True),
        "min_quality": ("Toxic answer", 0.5),
        "max_toxicity": ("Rude answer", 0.5),
        "max_detoxify": ("No", 0.5),
        "min_response_chars": ("Much too long an answer", 3),
        "truncate": ("Good answer", lambda pairs: [p if len(p["response"]) < 20 else None for p in pairs]),
    }
    filters = {}
    for name, (expected, value) in asked.items():
        filters[name] = value
        assert flatten(messages, "best", **filters).pairs["response"].tolist() == [expected], name


@pytest.mark.parametrize(
    ("replies", "best"),
    [
        ([("a", None, 0.9), ("b", 1, 0.1), ("c", 0, 0.1)], "c"),  # rank before quality and order
        ([("a", None, 0.1), ("b", None, 0.9)], "b"),  # no rank at all: quality
        ([("a", None, None), ("b", None, 0.1)], "b"),  # a label before none
        ([("a", None, 0.5), ("b", None, 0.5)], "a"),  # nothing else: order
        ([("a", 0, 0.1), ("b", 0, 0.9)], "b"),  # equal ranks: quality
        ([("a", None, None)], "a"),  # without siblings
    ],
)
def test_preference(replies, best):
    rows = [("q", None, "prompter", "Question", None)]
    rows += [(name, "q", "assistant", f"answer {name}", rank) for name, rank, _ in replies]
    messages = forest(*rows, quality=[None, *(quality for _, _, quality in replies)])
    assert flatten(messages, "best").pairs["message_id"].tolist() == [best]


def test_a_trailing_prompt_and_a_lone_tree_give_no_pair():
    messages = forest(
        ("q", None, "prompter", "Question", None),
        ("a", "q", "assistant", "Answer", None),
        ("thanks", "a", "prompter", "Thanks", None),
    )
    flat = flatten(messages, "best")
    assert rows_of(flat) == [("Question", "Answer")]
    assert flat.funnel.query("unit == 'message'")["dropped"].tolist() == [0, 1]


def test_what_hangs_below_a_deleted_message_goes_with_it():
    messages = forest(
        ("q", None, "prompter", "Question", None),
        ("a", "q", "assistant", "Deleted", 0),
        ("b", "q", "assistant", "Answer", 1),
        ("then", "a", "prompter", "And then?", None),
        ("c", "then", "assistant", "Then this", None),
        deleted=[False, True, False, False, False],
    )
    assert rows_of(flatten(messages, "best", drop_deleted=True)) == [("Question", "Answer")]
    assert len(flatten(messages, "best").pairs) == 2


def test_a_filtered_reply_stays_in_the_history_of_what_was_said_after_it():
    messages = forest(
        ("q", None, "prompter", "Question", None),
        ("a", "q", "assistant", "By a model", 0),
        ("then", "a", "prompter", "And then?", None),
        ("b", "then", "assistant", "By a person", None),
        synthetic=[False, True, False, False],
    )
    flat = flatten(messages, "best", drop_synthetic=True)
    assert rows_of(flat) == [("And then?", "By a person")]
    assert [turn["content"] for turn in flat.pairs["history"].iloc[0]] == ["Question", "By a model"]


def test_filters_travel_as_one_object_and_single_ones_replace_its_fields():
    messages = forest(
        ("q", None, "prompter", "Question", None),
        ("a", "q", "assistant", "By a model", 0),
        ("b", "q", "assistant", "No", 1),
        ("c", "q", "assistant", "By a person", 2),
        synthetic=[False, True, False, False],
    )
    filters = Filters(drop_synthetic=True, min_response_chars=3)
    assert rows_of(flatten(messages, "all", filters=filters)) == [("Question", "By a person")]
    assert len(flatten(messages, "all", filters=filters, min_response_chars=0).pairs) == 2
    assert len(flatten(messages, "all", ["de"], filters=filters).pairs) == 0
    assert len(flatten(messages, "all").pairs) == 3
    with pytest.raises(TypeError, match="drop_synthetics"):
        flatten(messages, drop_synthetics=True)


def test_the_cut_pair_is_the_one_that_is_kept():
    messages = forest(
        ("q", None, "prompter", "Question", None),
        ("a", "q", "assistant", "Answer", None),
        ("then", "a", "prompter", "And then?", None),
        ("b", "then", "assistant", "This", None),
    )
    flat = flatten(messages, "all", truncate=lambda pairs: [pair | {"history": []} for pair in pairs])
    assert flat.pairs["history"].tolist() == [[], []]


def test_prompts_asked_before_leave_and_several_replies_to_one_stay():
    first = forest(("q", None, "prompter", "What is a fjord?", None), ("a", "q", "assistant", "An inlet.", 0))
    second = first.assign(message_tree_id="u", message_id=["q2", "a2"], parent_id=[None, "q2"])
    again = second.assign(text=["what  is a FJORD", "Again."])
    near = second.assign(text=["What is a fjord then?", "Near."])
    more = forest(("b", "q", "assistant", "A drowned valley.", 1))
    for other, filters in ((again, {"drop_duplicates": True}), (near, {"near_duplicates": 0.5})):
        messages = pd.concat([first, more, other], ignore_index=True)
        assert len(flatten(messages, "all").pairs) == 3
        left = flatten(messages, "all", **filters)
        assert left.pairs["response"].tolist() == ["An inlet.", "A drowned valley."]
        assert left.funnel.iloc[-1][["kept", "dropped"]].tolist() == [2, 1]


def test_the_same_follow_up_in_another_conversation_is_no_duplicate():
    def tree(name: str, question: str) -> pd.DataFrame:
        rows = [(name, None, "prompter", question, None), (f"{name}a", name, "assistant", "Answer", None)]
        rows += [(f"{name}b", f"{name}a", "prompter", "Thanks, go on", None)]
        rows += [(f"{name}c", f"{name}b", "assistant", "More", None)]
        return forest(*rows).assign(message_tree_id=name)

    messages = pd.concat([tree("s", "How deep is a fjord?"), tree("t", "Who wrote Peer Gynt?")])
    assert len(flatten(messages, "all", drop_duplicates=True, near_duplicates=0.7).pairs) == 4


def test_a_tree_state_that_is_not_wanted_is_counted_as_a_tree():
    messages = pd.concat([forest(("q", None, "prompter", "Q", None), ("a", "q", "assistant", "A", None))] * 2)
    messages["message_tree_id"] = ["s", "s", "t", "t"]
    messages["message_id"], messages["parent_id"] = ["q", "a", "r", "b"], [None, "q", None, "r"]
    messages["tree_state"] = ["growing", "growing", "ready_for_export", "ready_for_export"]
    flat = flatten(messages, "best", tree_states=["ready_for_export"])
    assert flat.pairs["message_id"].tolist() == ["b"]
    assert flat.funnel.query("unit == 'tree'")["kept"].tolist() == [2, 1]
    messages["tree_state"] = [None, None, "ready_for_export", "ready_for_export"]  # not known: not left out
    assert len(flatten(messages, "best", tree_states=["ready_for_export"]).pairs) == 2


def test_messages_that_were_thinned_out_by_hand_still_add_up():
    messages = pd.concat([forest(("q", None, "prompter", "Q", None)), forest(("r", None, "prompter", "R", None))])
    messages["message_tree_id"] = ["s", "t"]
    messages.attrs = {"trees": 2, "split": None, "skipped": []}
    assert flatten(messages.iloc[:1]).funnel.query("unit == 'tree'")["kept"].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"parent_id": [None, "q", "nobody"]}, "orphan"),
        ({"parent_id": ["a", "q", "a"]}, "circle"),
        ({"message_id": ["q", "a", "a"]}, "second time"),
        ({"role": ["prompter", "assistant", "assistant"]}, "two messages in a row by the assistant"),
        ({"role": ["assistant", "prompter", "assistant"]}, "starts with role 'assistant'"),
        ({"text": ["Q", None, "T"]}, "text is null"),
    ],
)
def test_rows_that_are_no_forest_are_refused(change, problem):
    messages = forest(
        ("q", None, "prompter", "Q", None), ("a", "q", "assistant", "A", None), ("b", "a", "prompter", "T", None)
    )
    with pytest.raises(ValueError, match=problem):
        flatten(messages.assign(**change))


def test_an_unknown_recipe_and_missing_columns_are_refused():
    messages = forest(("q", None, "prompter", "Q", None))
    with pytest.raises(ValueError, match="replies = 'most'"):
        flatten(messages, "most")
    with pytest.raises(ValueError, match="lack the columns parent_id"):
        flatten(messages.drop(columns="parent_id"))
