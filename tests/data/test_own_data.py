"""A user's own data in every usual shape and container gives its pairs, or says what is in the way."""

import gzip
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_own_data import run
from mutations import mutated
from own_files import (
    COMPARISONS,
    COMPRESSIONS,
    ENCODINGS,
    FLAT,
    SHAPES,
    SHARE,
    TEXTS,
    chat,
    csv_text,
    pair,
    write_columns,
    zipped,
)

from llm_finetuning.data import own_data, reading
from llm_finetuning.data.oasst import flatten, read_messages
from llm_finetuning.data.pairs import to_records
from llm_finetuning.data.shapes import Columns

FEW = {"json_lines", "pretty_array", "pretty_wrapper", "parquet"}
"""Forms in which the many layouts of several responses are tried."""
FILES = [(shape, form, "", "utf-8") for shape in SHAPES for form in TEXTS if shape not in COMPARISONS or form in FEW]
FILES += [("messages", form, compression, "utf-8") for form in ("json_lines", "array") for compression in COMPRESSIONS]
FILES += [("Alpaca", form, "", encoding) for form in ("json_lines", "pretty_array") for encoding in ENCODINGS[1:]]
FILES += [("ShareGPT", "pretty_objects", "zip", "utf-16"), ("Dolly", "wrapper", "gz", "utf-8-sig")]
TABLES = [(shape, delimiter, "utf-8") for shape in FLAT for delimiter in ",;\t"]
TABLES += [("Alpaca", ";", encoding) for encoding in ENCODINGS[1:]]
COLUMNS = [
    (shape, form)
    for shape in SHAPES
    for form in ("parquet", "arrow file", "arrow stream", "saved")
    if shape not in COMPARISONS or form in FEW
]


def found(frame: pd.DataFrame) -> list[dict]:
    """The pairs as read, without the ids of their trees."""
    return [{name: row[name] for name in row if name != "message_tree_id"} for row in to_records(frame)]


def read(folder: Path, content: bytes | str, name: str = "data", **options) -> pd.DataFrame:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return own_data.read_pairs(path, **options)


@pytest.mark.parametrize(("shape", "form", "compression", "encoding"), FILES)
def test_json_of_any_form_gives_its_pairs(shape, form, compression, encoding, tmp_path):
    if compression == "zst":
        pytest.importorskip("zstandard")
    records, expected = SHAPES[shape]
    content = TEXTS[form](records).encode(encoding)
    content = COMPRESSIONS[compression](content) if compression else content
    frame = read(tmp_path, content, "EXPORT.TXT")  # the name says nothing
    assert found(frame) == expected and frame.attrs["skipped"] == []
    assert own_data.is_pairs_file(tmp_path / "EXPORT.TXT")


@pytest.mark.parametrize(("shape", "delimiter", "encoding"), TABLES)
def test_a_table_of_text_gives_its_pairs(shape, delimiter, encoding, tmp_path):
    records, expected = SHAPES[shape]
    assert found(read(tmp_path, csv_text(records, delimiter).encode(encoding), "Mappe1")) == expected


@pytest.mark.parametrize(("shape", "form"), COLUMNS)
def test_columns_give_their_pairs(shape, form, tmp_path):
    records, expected = SHAPES[shape]
    path = write_columns(records, form, tmp_path / "data")
    assert own_data.is_pairs_file(path) and found(own_data.read_pairs(path)) == expected


@pytest.mark.parametrize("layout", COMPARISONS)
def test_several_responses_to_a_prompt_give_their_preferences(layout, tmp_path):
    records, _, expected = COMPARISONS[layout]
    frame = read(tmp_path, json.dumps(records))
    flat = own_data.flatten_pairs(frame, replies="best")
    assert [(record["chosen"], record["rejected"]) for record in flat.preferences] == expected
    (shape,) = frame.attrs["shapes"]
    assert f"{len(records)} records of the shape {shape}" in own_data.reading_sentences(frame)
    assert not {each["rejected"] for each in flat.preferences} & set(flat.pairs["response"])


ANSWERED = {"prompt": "Q", "response_a": "A", "response_b": "B"}
SCORED = {"question": "Q", "answer_0": "A", "answer_1": "B"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (ANSWERED | {"winner": "B"}, ("B", "A")),
        (ANSWERED | {"Preferred": "response_a"}, ("A", "B")),
        (ANSWERED | {"winner": "[[A]]", "score_a": 1, "score_b": 2}, ("A", "B")),
        (ANSWERED | {"winner_model_a": "0", "winner_model_b": "1"}, ("B", "A")),
        (ANSWERED | {"winner_model_a": "True", "winner_model_b": "False"}, ("A", "B")),
        (SCORED | {"score_0": "-0.5", "score_1": "0.5"}, ("B", "A")),
        (SCORED | {"question": "{'id': '1', 'full_text': 'Q'}", "rating_0": 1, "rating_1": "4.5"}, ("B", "A")),
        (SCORED | {"answer_0_score": 3, "answer_1_score": 2}, ("A", "B")),
        (SCORED | {"choice": "0"}, ("A", "B")),
        ({"query": "Q", "output_1": "A", "output_2": "B", "overall_preference": "-1.0"}, ("A", "B")),
        ({"instruction": "Q", "accepted": "A", "rejected": "B"}, ("A", "B")),
        ({"question": "Q", "chosen_response": "A", "rejected_response": "B"}, ("A", "B")),
        ({"messages": chat("Q", "A"), "rejected_messages": chat("Q", "B")}, ("A", "B")),
        ({"messages": chat("Q", "A"), "rejected_response": "B"}, ("A", "B")),
        ({"Prompt": "Q", "Response A": "A", "Response B": "B", "Winner": "Response B"}, ("B", "A")),
        ({"question.full_text": "Q", "answer_0": "A", "answer_1": "B", "score_0": 1, "score_1": 0}, ("A", "B")),
        ({"columns": [*ANSWERED, "winner"], "index": [0], "data": [["Q", "A", "B", "b"]]}, ("B", "A")),
    ],
)
def test_the_better_of_two_is_told_in_many_ways(record, expected, tmp_path):
    (row,) = found(read(tmp_path, json.dumps(record)))
    assert (row["prompt"], row["history"], row["response"], row["rejected"]) == ("Q", [], *expected)


@pytest.mark.parametrize(
    "more", [{"answers": ["4"]}, {"outputs": ["x", "y"], "score": 1}, {"text_1": "x", "text_2": "y"}]
)
def test_a_chat_with_answers_beside_it_is_a_chat(more, tmp_path):
    frame = read(tmp_path, json.dumps({"messages": chat("Q", "A")} | more))
    assert found(frame) == [pair("Q", "A")] and frame.attrs["not_used"] == dict.fromkeys(more, 1)
    compared = {"messages": chat("Q"), "response_a": "A", "response_b": "B", "winner": "a"}
    assert found(read(tmp_path, json.dumps(compared))) == [pair("Q", "A") | {"rejected": "B"}]


def test_ties_and_responses_without_a_score_are_counted(tmp_path):
    records = [ANSWERED | {"winner": tie} for tie in ("tie", "tie (bothbad)", "both_bad", "a")]
    records += [SCORED | {"score_0": 0, "score_1": 0.0}, ANSWERED | {"response_b": "", "winner": "a"}]
    answers = [{"text": text, "rank": rank} for text, rank in (("", "1"), ("C", 2.0), (None, 3), ("D", None))]
    frame = read(tmp_path, json.dumps([*records, {"prompt": "Q", "answers": answers}]))
    expected = [("A", None), ("A", None), ("C", 1), ("D", None)]
    assert [(row["response"], row.get("rank")) for row in found(frame)] == expected
    with pytest.raises(ValueError, match="no pairs; line 1: votes for neither of two different answers"):
        read(tmp_path, json.dumps(records[0]))
    assert frame.attrs["reasons"] == {
        "no preference pair: chosen and rejected are alike, or one is empty": 1,
        "votes for neither of two different answers": 4,
        "empty responses among several": 2,
        "responses without a score among several": 1,
    }


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (ANSWERED, "response_a and response_b are there, but no column says which is better. Export them as prompt, "),
        (ANSWERED | {"response_b": None, "winner": "a"}, "response_b is None, expected a text"),
        ({"prompt": "Q", "response_b": "B", "winner": "a"}, "the response to compare response_b with is missing"),
        (SCORED | {"score_0": 10**30 * 10**300, "score_1": 1}, "score_0 and score_1: 1"),
        (SCORED | {"label": 1}, "answer_0 and answer_1 are there, but no column says which is better"),
        (
            ANSWERED | {"winner": "model_c"},
            "winner: 'model_c', which says of neither of response_a and response_b that",
        ),
        (ANSWERED | {"winner": "1"}, "winner: '1', which says of neither"),
        (SCORED | {"score_0": "high", "score_1": "low"}, "score_0 and score_1: 'high', 'low', which says of neither"),
        (
            {"question": "Q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}},
            "answers holds 2 responses, and nothing that ranks them. Exp",
        ),
        ({"prompt": "Q", "responses": ["A", "B"]}, "responses holds 2 responses, and nothing that ranks them. Export"),
        (
            {"instruction": "Q", "generations": ["A", "B"], "ratings": [1]},
            "generations holds 2 responses, and ratings 1 scores",
        ),
        (
            {"instruction": "Q", "generations": ["A", "B"], "ratings": [None, "N/A"]},
            "generations holds 2 responses, and nothing that ranks",
        ),
        (
            ANSWERED | {"prompt": '["Q", "R"]', "response_a": '["A"]', "response_b": '["B"]', "winner": "a"},
            "prompt and res",
        ),
        ({"context": "Q", "response1": "A", "response2": "B", "overall_preference": "x"}, "overall_preference: 'x'"),
        ({"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 2}, "labels: 2, which says of neither"),
        ({"prompt": "Q", "completions": [{"text": 5, "score": 1}]}, "response is 5, expected a text"),
        ({"prompt": "Q", "completions": "A", "scores": [1]}, "completions is str, expected a list of responses"),
    ],
)
def test_several_responses_that_nothing_compares_are_refused(record, problem, tmp_path):
    with pytest.raises(ValueError, match=f"line 1: {problem}"):
        read(tmp_path, json.dumps(record) + "\n" + json.dumps(ANSWERED | {"winner": "a"}))


LISTS = [chat("Q", "A"), chat("Q1", "A1", "Q2", "A2", role="from", content="value", names=("human", "gpt"))]


@pytest.mark.parametrize("form", ["json_lines", "windows_lines", "array", "pretty_array", "wrapper"])
def test_lists_of_turns_need_no_key(form, tmp_path):
    expected = [pair("Q", "A"), pair("Q1", "A1"), pair("Q2", "A2", "Q1", "A1")]
    assert found(read(tmp_path, TEXTS[form](LISTS))) == expected
    assert found(read(tmp_path, json.dumps(LISTS[0], indent=1))) == expected[:1]  # one conversation, and no more


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sep=;\r\nPrompt;Response\r\nQ;A\r\n", [pair("Q", "A")]),
        ("\ufeffid;prompt;response\r\n1;Q;A\r\n;;\r\n\r\n2;Q2;A2;;\r\n", [pair("Q", "A"), pair("Q2", "A2")]),
        (",prompt,response\n0,Q,A\n", [pair("Q", "A")]),  # pandas writes its index without a name
        ('\n\nprompt\tresponse\n"Q\n\nand more"\tA\n', [pair("Q\n\nand more", "A")]),
        ("prompt,response\rQ,A\rQ2,A2\r", [pair("Q", "A"), pair("Q2", "A2")]),
        ("prompt,response,history\nQ,A,\"[['x', 'y']]\"\n", [pair("Q", "A", "x", "y")]),
        ('history,prompt,response\n"[{\'role\': \'user\', \'content\': \'x\'}, '
         "{'role': 'assistant', 'content': 'y'}]\",Q,A\n", [pair("Q", "A", "x", "y")]),
        ('prompt,response,rank\nQ,A,1\nQ,B,0.0\nQ,C,\n', [pair("Q", "A") | {"rank": 1}, pair("Q", "B") | {"rank": 0},
                                                          pair("Q", "C")]),
        ('conversation\n"[{""from"":""human"",""value"":""Q""},{""from"":""gpt"",""value"":""A""}]"\n',
         [pair("Q", "A")]),
        ('messages\tlang\n"[{""role"":""user"",""content"":""Q""},{""role"":""assistant"",""content"":""A""}]"\tde\n',
         [pair("Q", "A") | {"lang": "de"}]),
    ],
)  # fmt: skip
def test_tables_as_programs_write_them(content, expected, tmp_path):
    assert found(read(tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"prompt":"Q","response":"A"}{"prompt":"Q2","response":"A2"}', [pair("Q", "A"), pair("Q2", "A2")]),
        ('\n\n  {"prompt": "Q",\n"response": "A"}\n', [pair("Q", "A")]),
        ('[\n{"prompt": "Q", "response": "A"},\n]', [pair("Q", "A")]),
        ('{"prompt": NaN, "question": "Q", "answer": "A"}', [pair("Q", "A")]),
        ('{"messages": null, "prompt": "Q", "response": "A"}', [pair("Q", "A")]),
        ('{"prompt": "Q", "response": "A", "history": [["x", "y"]]}', [pair("Q", "A", "x", "y")]),
        ('{"conversations": ["x", "y", "Q", "A"]}', [pair("x", "y"), pair("Q", "A", "x", "y")]),
        ('{"messages": [{"role": "USER ", "content": "Q"}, {"Role": "Assistant", "Content": "A"}]}', [pair("Q", "A")]),
        ('{"system": "S", "messages": [{"role": "system", "content": "T"}, {"role": "user", "content": "Q"}, '
         '{"role": "assistant", "content": "A"}]}', [pair("Q", "A", system="S\n\nT")]),
        ('{"prompt": "\\n\\nHuman: Q\\n\\nAssistant:", "chosen": " A", "rejected": " B"}',
         [pair("Q", "A") | {"rejected": "B"}]),
        ('{"instruction": "I", "input": "x", "output": "O", "history": [["a", "b"]], "system": "S"}',
         [pair("I\n\nx", "O", "a", "b", system="S")]),
        ('{"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}', [pair("Q", "A")]),
    ],
)  # fmt: skip
def test_records_as_people_write_them(content, expected, tmp_path):
    assert found(read(tmp_path, content)) == expected


def test_what_has_no_use_is_named_once_with_its_count(tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "Hm"}]
    records = [{"messages": turns, "id": n, "tools": None} for n in range(3)]
    frame = read(tmp_path, json.dumps(records))
    assert frame.attrs["not_used"] == {"id": 3, "reasoning_content": 3}
    assert "column reasoning_content is not used (3 times)" in own_data.reading_sentences(frame)
    assert list(frame.columns) == ["prompt", "response", "history", "lang", "message_tree_id", "message_id", "rank"]


USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("turns", "expected", "reason"),
    [
        ([USER, USER | {"content": "R"}, ANSWER], [pair("Q\n\nR", "A")], "two turns in a row by the user"),
        ([USER, ANSWER, ANSWER | {"content": "B"}], [pair("Q", "A\n\nB")], "two turns in a row by the assistant"),
        ([ANSWER | {"content": "Hello"}, USER, ANSWER], [pair("Q", "A")], "the assistant speaks first"),
        ([USER, ANSWER, USER, CALL, {"role": "tool", "content": "1"}, ANSWER], [pair("Q", "A")], "tool calls"),
        ([USER, ANSWER, {"role": "system", "content": "S"}, USER, ANSWER], [pair("Q", "A")], "a system turn after"),
        ([USER, ANSWER, {"role": "critic", "content": "Q"}, ANSWER], [pair("Q", "A")], "turns without a role"),
        ([USER, ANSWER, USER | {"content": [{"type": "image_url"}]}, ANSWER], [pair("Q", "A")], "parts that are no"),
        ([USER, ANSWER, USER, ANSWER | {"content": ""}], [pair("Q", "A")], "values that cannot be used"),
        ([USER, ANSWER, USER, ANSWER | {"weight": 0.5}], [pair("Q", "A")], "weights other than 0 and 1"),
        ([USER, CALL], [], "tool calls"),
    ],
)
def test_of_a_chat_what_can_be_used_is_used_and_the_rest_counted(turns, expected, reason, tmp_path):
    content = "".join(json.dumps({"messages": chat}) + "\n" for chat in ([USER, ANSWER], turns))
    with pytest.raises(ValueError, match=r'data, line 2: .*on_error="skip", which uses what can be used'):
        read(tmp_path, content)
    frame = read(tmp_path, content, on_error="skip")
    assert found(frame) == [pair("Q", "A"), *expected]
    assert [entry["line"] for entry in frame.attrs["skipped"]] == [2]
    assert list(frame.attrs["reasons"].values()) == [1] and next(iter(frame.attrs["reasons"])).startswith(reason)
    assert f"{next(iter(frame.attrs['reasons']))}: 1" in own_data.reading_sentences(frame)


def test_other_names_of_columns(tmp_path):
    content = csv_text([{"Frage": "Q", "Antwort ": "A", "Rolle": "S", "response": "x"}], ";")
    frame = read(tmp_path, content, columns=Columns("frage", "ANTWORT", "Rolle"))
    assert found(frame) == [pair("Q", "A", system="S")] and frame.attrs["not_used"] == {"response": 1}
    half = read(
        tmp_path, csv_text([{"instruction": "I", "input": "x", "Antwort": "A"}], ","), columns=Columns("", "Antwort")
    )
    assert found(half) == [pair("I\n\nx", "A")]
    with pytest.raises(ValueError, match="line 2: frage is missing"):
        read(tmp_path, "prompt,response\nQ,A\n", columns=Columns("Frage", "response"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"prompt": {"0": "Q"}, "response": "A"}', "line 1: prompt is {'0': 'Q'}, expected a text"),
        (zipped(b"", "[Content_Types].xml", "xl/workbook.xml"), "an Excel or Word file. Save it as CSV UTF-8"),
        (zipped(b"{}", "one.jsonl", "two.jsonl"), r"a zip archive of 2 files \(one.jsonl, two.jsonl\). Unpack it"),
        (b"<!DOCTYPE html><html>", "data is a page of HTML, not data; download the file itself."),
        (b"%PDF-1.7", "data is a PDF; export"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS, not the data; run git"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Excel or Word file; save it as CSV UTF-8"),
        (b"once upon a time\nthere was\n", "neither JSON nor a CSV with a header; it begins with 'once upon"),
        (b'{"prompt": "Q"}\n', "line 1: response is missing. Correct the file"),
        (b'{"question": "Q"}\n', "line 1: response is missing"),
        (b'{"prompt": 5, "response": "A"}\n', "line 1: prompt is 5, expected a text"),
        (b'{"prompt": "Q", "response": ""}\n', "line 1: the response is empty"),
        (b'{"chosen": "A", "rejected": "B"}\n', "line 1: chosen has no prompt"),
        (b'{"messages": "Q"}\n', "line 1: messages is str, expected a list of turns"),
        (b'{"title": "T", "Body": "B"}\n', "line 1: read as JSON lines, but no known shape fits: its keys are title, "
         "Body. Known are: trees and messages of Open-Assistant; prompt \\+ chosen"),
        (b'[\n{"prompt": "Q", "response": "A"},\n{"prompt" "Q"}\n]', "line 3: not valid JSON .Expecting ':' delimiter"),
        (b'[{"prompt": "Q", "response": "A"}, {"prompt": "Q"}]', "record 2: response is missing"),
        (b'{"data": [{"prompt": "Q", "response": "A"}, {"prompt": "Q"}]}', "record 2: response is missing"),
        (b'[{"prompt" "Q"}]', "data: not valid JSON .* It is one line, so nothing can be left out"),
        (b'[{"prompt": "Q", "response": "A"}', "the array has no end: the file is cut off"),
        (b'[{"prompt": "Q", "response": "A"}] x', "data: not valid JSON"),
        (b'[]', "no pairs; record 1: no record with a response"),
        (b'[\n"\xff"]', "line 2: not UTF-8"),
        (b"prompt,prompt\nQ,A\n", "two columns are named prompt"),
        ("prompt;response\nQ;größer\n".encode("cp1252"), r"not UTF-8 .* \(in Excel: CSV UTF-8\)"),
        (b'prompt,response\nQ,"A" b\n', "after line 1: not valid CSV"),
        ("x".encode("utf-16")[:-1], "cut off or damaged .not UTF-16"),
        (gzip.compress(b'{"prompt": "Q", "response": "A"}\n' * 99)[:-9], "cut off or damaged"),
        (COMPRESSIONS["xz"](b'{"prompt": "Q", "response": "A"}\n' * 99)[:-9], "cut off or damaged"),
        (COMPRESSIONS["bz2"](b'{"prompt": "Q", "response": "A"}\n' * 99)[:-9], "cut off or damaged"),
        (zipped(b"prompt,response\nQ,A\n")[:-9], "cut off or damaged"),
        (b"ARROW1\0\0" + b"\0" * 64, "is not a complete arrow file"),
        (b'// mine\n{"prompt": "Q", "response": "A"}\n', "line 1: not valid JSON .*: a comment, .* convert it to"),
        (b'{"prompt": "Q", "response": "A",}\n', "line 1: not valid JSON .*: a comma before a closing bracket"),
        (b"{'prompt': 'Q', 'response': 'A'}\n", "line 1: not valid JSON .*: a name or text without double quotes"),
        (b'[\n {\n  prompt: "Q",\n  "response": "A"\n }\n]\n', "line 2: not valid JSON .*: a name or text without"),
        (b'[\n {\n  "prompt": "Q", // Hm\n  "response": "A"\n }\n]\n', "line 2: not valid JSON .*: a comment, which"),
        (b"| prompt | response |\r\n|:---|---:|\r\n| Q | A |\r\n", "a table in Markdown. Save it as JSON lines or CSV"),
        (b"prompt | response\n--- | ---\nQ | A\n", "a table in Markdown. Save it as JSON lines or CSV"),
        (b'data = [{"prompt":"Q","response":"A"}]\n', "neither JSON nor a CSV with a header"),
        (b"- prompt: Q\n  response: A\n", "neither JSON nor a CSV with a header; .* Save it as JSON lines or CSV"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(content, problem, tmp_path):
    with pytest.raises(ValueError, match=problem) as caught:
        read(tmp_path, content)
    assert "data" in str(caught.value) and "tree is" not in str(caught.value)


def test_what_describes_the_data_in_an_archive_is_not_taken_for_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for name, content in (
            ("x/README.md", "# Export"),
            ("x/LICENSE", "MIT"),
            ("x/all.csv", "prompt,response\nQ,A\n"),
        ):
            archive.writestr(name, content)
    assert found(own_data.read_pairs(tmp_path / "export.zip")) == [pair("Q", "A")]


def test_a_frame_of_zstandard_that_is_cut_off_is_noticed(tmp_path):
    pytest.importorskip("zstandard")
    whole = COMPRESSIONS["zst"](TEXTS["json_lines"](SHAPES["messages"][0]).encode())
    assert len(found(read(tmp_path, whole + whole))) == 6  # two frames, one after the other
    with pytest.raises(ValueError, match="cut off or damaged"):
        read(tmp_path, whole[:-3])


@pytest.mark.parametrize("form", ["pretty_array", "pretty_objects", "array_of_lines"])
def test_a_broken_record_of_a_document_is_left_out_alone(form, tmp_path):
    records = [{"prompt": f"Q{n}", "response": f"A{n}"} for n in range(5)]
    content = TEXTS[form](records).replace('"Q2",', '"Q2"')
    frame = read(tmp_path, content, on_error="skip")
    assert frame["prompt"].tolist() == ["Q0", "Q1", "Q3", "Q4"] and len(frame.attrs["skipped"]) == 1


def test_a_preference_without_a_difference_is_a_pair_and_counted(tmp_path):
    rows = [("Q", "A", "B"), ("Q2", "A", "A"), ("Q3", "A", "")]
    records = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    records += [{"chosen": chat("Q4", "A"), "rejected": chat("Q5", "B")}]
    frame = read(tmp_path, json.dumps(records))
    assert frame["prompt"].tolist() == ["Q", "Q2", "Q3", "Q4"] and frame.attrs["skipped"] == []
    (record,) = own_data.ready_preferences(frame)
    assert record == {"prompt": "Q", "history": [], "chosen": "A", "rejected": "B"} | {
        "message_tree_id": own_data.tree_of({"prompt": "Q"})
    }
    assert list(frame.attrs["reasons"].values()) == [2, 1]
    assert "rejected" not in own_data.flatten_pairs(frame).pairs.columns


NUMBERED = [{"prompt": f"Q{n}", "response": "A"} for n in range(60)]


def write_layout(folder: Path, *names: str) -> Path:
    """A folder of these files, each of 20 of 60 pairs in turn; parquet, or JSON lines in gzip."""
    for part, name in enumerate(names):
        path, records = folder / name, NUMBERED[20 * part : 20 * part + 20]
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_bytes(gzip.compress(TEXTS["json_lines"](records).encode()))
    return folder


LAYOUTS = {
    "shards": ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
               "data/validation-00000-of-00001.parquet"),
    "converted": ("default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"),
    "bare": ("train.parquet", "train_2.parquet", "validation.parquet"),
    "test alone": ("train.jsonl.gz", "z/train/0001.JSONL.GZ", "test.jsonl.gz"),
    "dev": ("x_train.jsonl.gz", "train/part.jsonl.gz", "x_dev.jsonl.gz"),
}  # fmt: skip


def prompts_of(source: object, **options) -> list[list[str]]:
    return [own_data.read_pairs(source, split, **options)["prompt"].tolist() for split in ("train", "validation")]


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("layout", ["shards", "converted", "bare", "test alone"])
def test_splits_of_a_folder_and_of_the_hub_are_found(layout, hub, tmp_path, monkeypatch):
    folder = write_layout(tmp_path / "snapshots" / "0a1b", *LAYOUTS[layout])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    train, validation = prompts_of("someone/data" if hub else folder)
    assert train == [f"Q{n}" for n in range(40)] and validation == [f"Q{n}" for n in range(40, 60)]


def test_splits_by_stage_are_found_or_named(tmp_path):
    names = ("data/train_sft-00000-of-00001-ab.parquet", "data/test_sft-00000-of-00001.parquet")
    folder = write_layout(tmp_path, *names, "data/train_gen-00000-of-00001.parquet")
    assert [len(part) for part in prompts_of(folder)] == [20, 20]
    frame = own_data.read_pairs(folder, "validation")
    assert frame.attrs["split_name"] == "test_sft" and frame.attrs["other_splits"] == ["train_gen"]
    assert "the source's split test_sft; not read: train_gen" in own_data.reading_sentences(frame)
    named = prompts_of(folder, splits=("train_gen", "train_sft"))
    assert named == [[f"Q{n}" for n in range(40, 60)], [f"Q{n}" for n in range(20)]]
    with pytest.raises(ValueError, match="no split 'dev'; it has test_sft, train_gen, train_sft"):
        prompts_of(folder, splits=("", "dev"))


def test_splits_that_are_not_told_apart_are_named(tmp_path):
    folder = write_layout(tmp_path / "a", "train_a.parquet", "train_b.parquet")
    with pytest.raises(ValueError, match="several splits for train: train_a, train_b. Set train_split to one"):
        prompts_of(folder)
    folder = write_layout(tmp_path / "b", "en/train/0000.parquet", "de/train/0000.parquet")
    with pytest.raises(ValueError, match=r"the configurations de, en\. Set source = .*/b/de\."):
        prompts_of(folder)
    with pytest.raises(ValueError, match="one file, without splits. Leave train_split"):
        prompts_of(folder / "en/train/0000.parquet", splits=("train", ""))


@pytest.mark.parametrize(
    "names", [("train.parquet",), ("all.parquet", "more.parquet"), ("train.parquet", "extra.parquet")]
)
def test_a_source_without_validation_is_split_by_conversation(names, tmp_path):
    train, validation = prompts_of(write_layout(tmp_path, *names), validation_share=0.3)
    assert len(train) + len(validation) == 20 * (1 if "train.parquet" in names else 2)
    assert len(validation) >= 2 and not set(train) & set(validation)


def test_a_saved_dataset_keeps_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_list(NUMBERED)
    parts = DatasetDict(train=whole.select(range(39, -1, -1)), test=whole.select(range(40, 60)))
    parts.save_to_disk(str(tmp_path / "saved"))
    train, validation = prompts_of(tmp_path / "saved")
    assert train == [f"Q{n}" for n in range(39, -1, -1)] and validation == [f"Q{n}" for n in range(40, 60)]


MESSAGES = [
    {"message_tree_id": "t", "message_id": "t", "role": "prompter", "text": "Q", "deleted": False},
    {"message_tree_id": "t", "message_id": "a", "parent_id": "t", "role": "assistant", "text": "A", "rank": 0}
    | {"labels": {"quality": {"value": "0.75", "count": 3}}, "deleted": False},
]
TREE = {"message_tree_id": "t", "prompt": MESSAGES[0] | {"replies": [MESSAGES[1]]}}


@pytest.mark.parametrize("form", TEXTS)
def test_trees_and_messages_are_read_from_any_form(form, tmp_path):
    for records in (MESSAGES, [TREE]):
        path = tmp_path / "data.zip"
        path.write_bytes(zipped(TEXTS[form](records).encode("utf-16")))
        messages = read_messages(path)
        assert messages["text"].tolist() == ["Q", "A"] and messages["quality"].tolist()[1] == 0.75
        assert not own_data.is_pairs_file(path)


def test_messages_are_read_from_a_table_of_text_and_from_arrow(tmp_path):
    rows = [row | {"labels": json.dumps(row["labels"]) if "labels" in row else None} for row in MESSAGES]
    (tmp_path / "a.csv").write_text(csv_text(rows, ","), encoding="utf-8")
    write_columns(rows, "arrow stream", tmp_path / "b")
    write_columns(MESSAGES, "saved", tmp_path / "c")
    write_columns([TREE], "parquet", tmp_path / "d")
    for name in ("a.csv", "b", "c", "d"):
        messages = read_messages(tmp_path / name)
        assert messages["text"].tolist() == ["Q", "A"] and messages["rank"].tolist()[1] == 0
        assert messages["quality"].tolist()[1] == 0.75 and messages["deleted"].tolist() == [False, False]


def paths(message: dict, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The texts from the first prompt to each reply."""
    texts = (*before, message["text"])
    for reply in message.get("replies", []):
        yield from paths(reply, texts)
    if message["role"] == "assistant":
        yield texts


@pytest.mark.parametrize("form", ["json_lines", "pretty_array"])
def test_real_threads_as_chats_give_the_pairs_of_their_trees(form, real_trees, tmp_path):
    trees = [json.loads(line) for line in real_trees.read_text(encoding="utf-8").splitlines()]
    threads = [{"conversations": chat(*texts, **SHARE)} for tree in trees for texts in paths(tree["prompt"])]
    content = TEXTS[form](threads)
    answered = {repr(row) for row in found(read(tmp_path, content))}
    expected = flatten(read_messages(real_trees), "all").pairs[["prompt", "response", "history"]].to_dict("records")
    assert answered == {repr(row) for row in expected} and len(answered) > 600


def outcome(parse, line: bytes) -> str:
    try:
        return repr(parse(line))
    except ValueError as error:
        return f"refused: {error}"


def test_the_fast_parser_gives_what_the_careful_one_does():
    chance, refused = random.Random(0), 0
    lines = [
        json.dumps(record, ensure_ascii=n % 2).encode() for n, record in enumerate(SHAPES["OpenAI"][0] + [TREE, LISTS])
    ]
    for _ in range(1000):
        for line in mutated(b"\n".join(lines), chance).splitlines():
            if b"0" * 20 not in line:  # a whole number of more than 64 bits
                assert outcome(reading.parse, line) == outcome(reading._parse_carefully, line)
                refused += outcome(reading.parse, line).startswith("refused")
    assert refused > 200


@pytest.mark.parametrize("number", [1000, pytest.param(10_000, marks=pytest.mark.more)])
def test_mutated_records_give_clear_errors_and_take_no_other_with_them(number, tmp_path):
    counts = run(number, tmp_path, seed=number)
    refused = sum(count for name, count in counts.items() if "refused" in name)
    assert counts["mutated records"] >= number and refused <= counts["files"] / 10
    assert counts["problems that were counted"] > number / 4
    assert counts["mutated records that gave pairs or messages"] > number / 10


@pytest.mark.parametrize("prompt", ["prompt", "Instruction", "question", "Query ", "input", "human", "USER"])
@pytest.mark.parametrize("response", ["response", "completion", "Output", "answer", "assistant"])
def test_any_name_of_a_prompt_goes_with_any_name_of_a_response(prompt, response, tmp_path):
    file = tmp_path / "data"
    file.write_text(json.dumps({"id": 1, prompt: "Q", response: "A", "system": "S"}) + "\n")
    (pair,) = own_data.read_pairs(file).to_dict("records")
    assert (pair["prompt"], pair["response"]) == ("Q", "A")
    assert pair["history"] == [{"role": "system", "content": "S"}]
