"""The pair record: JSON lines in and out, a user's own formats, and what stands in both files."""

import json
import os
import random

import pandas as pd
import pytest
from forests import random_tree
from mutations import mutated

from llm_finetuning.data import leaks, own_data, pairs
from llm_finetuning.data.duplicates import normalise
from llm_finetuning.data.oasst import flatten

PAIR = {"prompt": "Größe?\nIn cm", "response": " 180 \u2028", "history": [], "lang": "de"}
FULL = PAIR | {
    "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}],
    "message_tree_id": "t",
    "message_id": "m",
    "rank": 0,
}


def write(path, *records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.mark.parametrize("value", [2**63 - 1, 2**64, -(2**70), 1e308, 0.1, {"deep": [2**90, None, "\u2028"]}])
def test_a_column_of_ones_own_is_written_as_pythons_json_reads_it(tmp_path, value):
    path = pairs.write_jsonl([PAIR | {"own": value}, PAIR], tmp_path / "pairs.jsonl")
    first, second = map(json.loads, path.read_bytes().decode("utf-8").removesuffix("\n").split("\n"))
    assert first == PAIR | {"own": value} and second == PAIR


def test_what_is_written_is_read_again(tmp_path):
    path = pairs.write_jsonl([PAIR, FULL], tmp_path / "data" / "pairs.jsonl")
    assert pairs.to_records(pairs.read_jsonl(path)) == [PAIR, FULL]
    assert path.read_text(encoding="utf-8").count("\n") == 2
    assert "Größe" in path.read_text(encoding="utf-8")


def test_flattened_pairs_survive_the_file(tmp_path):
    messages = pd.DataFrame([row for n in range(20) for row in random_tree(f"t{n}", 9, random.Random(n))])
    for recipe in ("best", "all", "joined"):
        flat = flatten(messages, recipe).pairs
        back = pairs.read_jsonl(pairs.write_jsonl(flat, tmp_path / "pairs.jsonl"))
        pd.testing.assert_frame_equal(back, flat)


def test_prompt_and_response_alone_are_complete(tmp_path):
    write(tmp_path / "pairs.jsonl", {"prompt": "Q", "response": "A"})
    found = pairs.read_jsonl(tmp_path / "pairs.jsonl")
    assert found.loc[0, ["prompt", "response", "history"]].tolist() == ["Q", "A", []]
    assert found.loc[0, ["lang", "message_tree_id", "message_id", "rank"]].isna().all()


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"response": "A"}, "prompt is missing"),
        ({"prompt": "Q"}, "response is missing"),
        ({"prompt": "Q", "response": None}, "response is None"),
        ({"prompt": "Q", "response": ""}, "response is empty"),
        ({"prompt": ["Q", "R"], "response": "A"}, "prompt is"),
        ({"prompt": "Q", "response": "A", "history": "Hi"}, "history is str"),
        ({"prompt": "Q", "response": "A", "history": [{"role": "user"}]}, "turn 1 of history"),
        ({"prompt": "Q", "response": "A", "history": [{"role": "critic", "content": ""}]}, "turn 1 of history"),
        ({"prompt": "Q", "response": "A", "rank": "first"}, "rank is 'first'"),
        ({"prompt": "Q", "response": "A", "lang": 5}, "lang is 5"),
        ({"prompt": "\ud800", "response": "A"}, "surrogate"),
    ],
)
def test_a_bad_line_is_named_or_skipped(record, problem, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write(path, PAIR, record, FULL)
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2: .*{problem}"):
        pairs.read_jsonl(path)
    found = own_data.read_pairs(path, on_error="skip")
    assert len(found) == 2 and found.attrs["skipped"][0]["line"] == 2


def test_a_missing_an_empty_and_a_broken_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not found"):
        pairs.read_jsonl(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        pairs.read_jsonl(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1: not valid JSON"):
        pairs.read_jsonl(tmp_path / "broken.jsonl")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = pairs.write_jsonl([PAIR], tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="pair 2 for pairs.jsonl: the response is empty"):
        pairs.write_jsonl([PAIR, PAIR | {"response": ""}], path)
    with pytest.raises(ValueError, match="no pair to write"):
        pairs.write_jsonl([], path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pairs.write_jsonl([FULL], path)
    assert pairs.to_records(pairs.read_jsonl(path)) == [PAIR]
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"data/pairs\.jsonl could not be written .* set drive_folder"):
        pairs.write_jsonl([PAIR], tmp_path / "data" / "pairs.jsonl")
    assert (tmp_path / "data").read_text() == "a file, not a folder"


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye!"},
    ],
    "lang": "en",
}


def test_a_chat_gives_a_pair_for_each_assistant_turn(tmp_path):
    write(tmp_path / "chat.jsonl", CHAT)
    found = own_data.read_pairs(tmp_path / "chat.jsonl")
    assert found["prompt"].tolist() == ["Hi", "Bye"] and found["response"].tolist() == ["Hello!", "Bye!"]
    assert found["history"].tolist() == [CHAT["messages"][:1], CHAT["messages"][:3]]
    assert found["lang"].tolist() == ["en", "en"] and found["message_tree_id"].nunique() == 1


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        (["user", "user"], "the turns are user, user"),
        (["assistant", "user"], "the turns are assistant, user"),
        (["user", "system", "assistant"], "the turns are user, system, assistant"),
        (["user"], "the turns are user;"),
        ([], "the turns are none"),
        (["user", "critic"], "turn 2 of messages lacks a role"),
    ],
)
def test_a_chat_whose_turns_do_not_alternate_is_refused(roles, problem, tmp_path):
    write(tmp_path / "chat.jsonl", CHAT, {"messages": [{"role": role, "content": "text"} for role in roles]})
    with pytest.raises(ValueError, match=f"line 2: {problem}"):
        own_data.read_pairs(tmp_path / "chat.jsonl")


def test_a_csv_with_quotes_newlines_and_other_columns(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text('\ufeffid,prompt,response,lang\n1,"Q, one","A ""1""\nline 2",\n2,Q2,A2,de\n', encoding="utf-8")
    found = own_data.read_pairs(path)
    assert found["prompt"].tolist() == ["Q, one", "Q2"] and found["response"].tolist() == ['A "1"\nline 2', "A2"]
    assert found["lang"].tolist() == [None, "de"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"title,text\n1,2\n", r"line 2: read as CSV, but no known shape fits: its keys are title, text"),
        (b"prompt,response\nQ,A\nQ\n", r"line 3: expected 2 values"),
        (b"prompt,response\nQ,A,more\n", r"line 2: expected 2 values"),
        (b"prompt,response\nQ,\n", r"line 2: response is missing"),
        (b'prompt,response\nQ,"A\n', r"after line 1: not valid CSV"),
        ("prompt,response\nQ,größer\n".encode("latin-1"), "not UTF-8"),
        (b"prompt,response\n", "no pairs"),
    ],
)
def test_a_bad_csv_is_refused(content, problem, tmp_path):
    (tmp_path / "own.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"own\.csv.*(?:{problem})"):
        own_data.read_pairs(tmp_path / "own.csv")


@pytest.mark.parametrize("name", ["own.jsonl", "chat.jsonl", "own.csv"])
def test_a_mutated_file_gives_pairs_or_the_documented_error(name, tmp_path):
    chance, path, outcomes = random.Random(name), tmp_path / name, {"read": 0, "refused": 0}
    if name == "own.csv":
        pd.DataFrame([PAIR, {"prompt": 'Q, "1"', "response": "A"}]).to_csv(path, index=False)
    else:
        write(path, *([CHAT, CHAT] if name == "chat.jsonl" else [PAIR, FULL]))
    content = path.read_bytes()
    for _ in range(150):
        path.write_bytes(mutated(content, chance))
        for on_error in ("raise", "skip"):
            try:
                found = own_data.read_pairs(path, on_error=on_error)
            except ValueError as error:
                outcomes["refused"] += 1
                assert name in str(error)
            else:
                outcomes["read"] += 1
                pairs.write_jsonl(own_data.flatten_pairs(found).pairs, tmp_path / "out.jsonl")
    assert min(outcomes.values()) >= 10, outcomes


def test_own_pairs_are_told_from_messages_by_content(tmp_path):
    for name, record, expected in (
        ("a", {"prompt": "Q", "response": "A"}, True),
        ("b", CHAT, True),
        ("c", {"message_id": "m", "role": "prompter", "text": "Q"}, False),
        ("d", {"prompt": {"message_id": "m"}}, False),
        ("e", {"response": "A"}, True),
    ):
        write(tmp_path / name, record)
        assert own_data.is_pairs_file(tmp_path / name) is expected, name


def test_conversations_that_start_alike_stay_on_one_side_of_the_split(tmp_path):
    records = [{"prompt": f"Question {n // 2}{'?' * (n % 2)}", "response": f"Answer {n}"} for n in range(200)]
    write(tmp_path / "own.jsonl", *records)
    train, validation = (own_data.read_pairs(tmp_path / "own.jsonl", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 200 and 4 <= len(validation) <= 50
    assert not set(train["prompt"].map(normalise)) & set(validation["prompt"].map(normalise))


def test_own_pairs_go_through_the_filters_with_a_funnel(tmp_path):
    records = [{"prompt": "Q1", "response": "Long answer"}, {"prompt": "q1 ", "response": "Another one"}]
    records += [{"prompt": "Q2", "response": "Hm"}, {"prompt": "Q3", "response": "Lange Antwort", "lang": "de"}]
    write(tmp_path / "own.jsonl", *records, {"prompt": "Q4"})
    read = own_data.read_pairs(tmp_path / "own.jsonl", on_error="skip")
    flat = own_data.flatten_pairs(read, replies="best", languages=["en"], min_response_chars=3, drop_duplicates=True)
    assert flat.pairs["response"].tolist() == ["Long answer"]
    assert flat.funnel["kept"].tolist() == [5, 4, 3, 2, 2, 2, 1]
    assert flat.funnel["dropped"].tolist() == [0, 1, 1, 1, 0, 0, 1]


def table(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["message_tree_id", "message_id", "prompt"], dtype=object)


def test_leaks_are_found_by_tree_message_prompt_and_near_prompt():
    question = "Which of the many Norwegian fjords is the longest one, and how deep is it?"
    others = table(("t1", "m1", question), ("t2", "m2", "Thanks"), (None, None, "Own"))
    ours = table(
        ("t1", "m5", "Something else"),
        ("t6", "m2", "Something else"),
        ("t7", "m7", "  thanks!"),
        ("t8", "m8", question.replace("many ", "")),
        ("t9", "m9", "Which of the many Swedish lakes is the largest one?"),
        (None, None, "Nothing like it"),
    )
    kinds, in_others = leaks.overlaps(ours, others, threshold=0.7)
    assert kinds.tolist() == ["tree", "message", "prompt", "near prompt", None, None]
    assert in_others.tolist() == ["tree", "message", None]
    assert leaks.overlaps(ours, others)[0].tolist() == ["tree", "message", "prompt", None, None, None]
    assert leaks.count(kinds) == {"tree": 1, "message": 1, "prompt": 1, "near prompt": 1}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is it?", " what  IS it", True),
        ("Ｆｊｏｒｄ", "fjord", True),
        ("Straße", "STRASSE", True),
        ("What is C?", "What is C++?", False),
        ("你好。", "你好", True),
        ("What is 5+3?", "What is 5-3?", False),
    ],
)
def test_normalising(one, other, same):
    assert (normalise(one) == normalise(other)) is same
