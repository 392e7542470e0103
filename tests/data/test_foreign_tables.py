"""Tables as other programs write them: lists in CSV files of pandas, rows of the dataset viewer, damaged columns."""

import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_files import SHARE, TRICKY, chat, pair, siblings, write_columns

from llm_finetuning.data import own_data, preferences
from llm_finetuning.data.pairs import to_records
from llm_finetuning.data.reading import literal

LONG = "It's \"quoted\", [1, 2] {'a': 'b'} <UTC> ... " * 9 + TRICKY
"""What the text of an array must not be told apart by: quotes of both kinds, brackets, numpy's mark, line breaks."""


def found(frame: pd.DataFrame) -> list[dict]:
    return [{name: row[name] for name in row if name != "message_tree_id"} for row in to_records(frame)]


def csv_of_parquet(records: list[dict], folder: Path) -> Path:
    """The CSV that pandas writes of a parquet file, in which it holds lists as arrays of numpy."""
    write_columns(records, "parquet", folder / "data.parquet")
    frame = pd.read_parquet(folder / "data.parquet")
    assert any(type(value) is np.ndarray for value in frame.iloc[0])
    frame.to_csv(folder / "data.csv")
    return folder / "data.csv"


RATED = [{"answer": "Bad", "rank": 2.0}, {"answer": LONG, "rank": 1.0}]
PARTS = [
    {"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("user", "Q"), ("assistant", LONG))
]
ARRAYS = {
    "messages": ([{"messages": chat("Q", LONG, "Q2", "A2")}], [pair("Q", LONG), pair("Q2", "A2", "Q", LONG)]),
    "one turn": ([{"messages": chat("Q", LONG)}, {"messages": chat("R", "A", "S", "B")[:2]}],
                 [pair("Q", LONG), pair("R", "A")]),
    "conversations": ([{"conversations": chat(LONG, "A", **SHARE)}], [pair(LONG, "A")]),
    "content parts": ([{"messages": PARTS}], [pair("Q", LONG)]),
    "chosen and rejected": ([{"prompt": "Q", "chosen": chat("Q", LONG), "rejected": chat("Q", "Bad")}],
                            [pair("Q", LONG) | {"rejected": "Bad"}]),
    "chosen alone": ([{"chosen": chat("Q", LONG), "rejected": chat("Q", "Bad")}],
                     [pair("Q", LONG) | {"rejected": "Bad"}]),
    "a list of one turn": ([{"prompt": chat("Q", "A", "R"), "completion": chat("Q", LONG)[1:]}],
                           [pair("R", LONG, "Q", "A")]),
    "Nectar": ([{"prompt": "Q", "answers": RATED}], siblings("Q", ("Bad", 1), (LONG, 0))),
    "distilabel": ([{"instruction": "Q", "generations": ["A", LONG], "ratings": [3.0, 4.5]}],
                   siblings("Q", ("A", 1), (LONG, 0))),
    "Chatbot Arena": ([{"conversation_a": chat("Q", "Bad"), "conversation_b": chat("Q", LONG), "winner": "model_b"}],
                      [pair("Q", LONG) | {"rejected": "Bad"}]),
    "texts in turn": ([{"conversations": ["Q", LONG]}], [pair("Q", LONG)]),
    "history": ([{"prompt": "Q", "response": "A", "history": [["x", LONG]]}], [pair("Q", "A", "x", LONG)]),
}  # fmt: skip


@pytest.mark.parametrize("layout", ARRAYS)
def test_lists_in_a_csv_that_pandas_writes_are_read(layout, tmp_path):
    records, expected = ARRAYS[layout]
    assert found(own_data.read_pairs(csv_of_parquet(records, tmp_path))) == expected


def test_a_csv_of_a_dataset_is_read(tmp_path):
    from datasets import Dataset

    rows = [{"messages": chat("Q", LONG), "id": 1}, {"messages": chat("R", "A"), "id": 2}]
    Dataset.from_list(rows).to_csv(str(tmp_path / "data.csv"))
    assert found(own_data.read_pairs(tmp_path / "data.csv")) == [pair("Q", LONG), pair("R", "A")]


def test_one_turn_in_a_cell_is_no_text_to_imitate(tmp_path):
    rows = [{"prompt": "Q", "completion": {"role": "assistant", "content": LONG}}]
    pd.DataFrame(rows).to_csv(tmp_path / "data.csv", index=False)
    assert found(own_data.read_pairs(tmp_path / "data.csv")) == [pair("Q", LONG)]


VALUES = ["a", "it's", 'say "no"', "[x] {y}", "\n", "", 1, -2, 2.5, 1e-7, True, None, {"k": "v"}, {"k": ["v", "w"]}]


def test_arrays_of_any_values_are_read_as_they_were():
    chance = random.Random(0)
    for _ in range(300):
        values = chance.choices(VALUES, k=chance.randint(0, 6))
        array = np.empty(len(values), dtype=object)
        array[:] = values
        nested = {"x": array, "y": [array]}
        assert literal(str(array)) == values and literal(str(nested)) == {"x": values, "y": [values]}
    times = pd.Timestamp("2023-04-09", tz="UTC")
    turn = {"content": "Q", "at": times.to_pydatetime(), "n": np.int64(1), "score": np.float64(0.5), "flag": np.True_}
    assert literal(str(np.array([turn], dtype=object))) == [turn | {"at": None}]
    assert literal("[1. nan 3.]") == [1.0, None, 3.0] and literal("['Q', 'A']") == ["Q", "A"]
    left_out = str(np.array(["x"] * 2000, dtype=object))
    assert literal(left_out) == left_out and literal("[see 1] 'x' 'y'") == "[see 1] 'x' 'y'"


CUT = str(np.array(chat("Q", "A" * 200), dtype=object))


@pytest.mark.parametrize("cell", [CUT[:100], CUT[:30], CUT.replace("}", "", 1)])
@pytest.mark.parametrize("names", [("prompt", "chosen", "rejected"), ("prompt", "response", ""), ("", "messages", "")])
def test_a_list_of_turns_that_cannot_be_read_is_never_a_response(cell, names, tmp_path):
    row = {name: cell if name in ("chosen", "response", "messages") else "Q" for name in names if name}
    pd.DataFrame([row | {"id": 1}]).to_csv(tmp_path / "data.csv", index=False)
    with pytest.raises(ValueError, match=r"line \d: .* begins as a list, but is cut off, or neither JSON nor Python"):
        own_data.read_pairs(tmp_path / "data.csv")


@pytest.mark.parametrize("text", ["[{'a': 1}, and so on", "{'role': 'x'} is a dict", "[1] See there.", "[{x}]", "[]"])
def test_a_response_that_begins_with_a_bracket_is_a_text(text, tmp_path):
    (tmp_path / "data").write_text(json.dumps({"prompt": "Q", "response": text}))
    assert found(own_data.read_pairs(tmp_path / "data")) == [pair("Q", text)]


def viewer(*cut: list[str]) -> dict:
    """Rows as the Hub's dataset viewer gives them; cut: names of the texts of each that it shortened."""
    rows = [
        {"row_idx": n, "row": {"question": f"Q{n}", "answer": f"A{n}"}, "truncated_cells": names}
        for n, names in enumerate(cut)
    ]
    features = [{"feature_idx": 0, "name": "question", "type": {"dtype": "string", "_type": "Value"}}]
    return {"features": features, "rows": rows, "num_rows_total": 99, "num_rows_per_page": 100, "partial": False}


def test_rows_of_the_dataset_viewer_are_records(tmp_path):
    for indent in (None, 2):
        (tmp_path / "rows.json").write_text(json.dumps(viewer([], []), indent=indent))
        assert found(own_data.read_pairs(tmp_path / "rows.json")) == [pair("Q0", "A0"), pair("Q1", "A1")]
    (tmp_path / "rows.json").write_text(json.dumps(viewer([], ["answer"], [])))
    with pytest.raises(ValueError, match=r"record 2: the dataset viewer cut off \['answer'\]; name the dataset itself"):
        own_data.read_pairs(tmp_path / "rows.json")
    frame = own_data.read_pairs(tmp_path / "rows.json", on_error="skip")
    assert found(frame) == [pair("Q0", "A0"), pair("Q2", "A2")] and len(frame.attrs["skipped"]) == 1


@pytest.mark.parametrize("form", ["parquet", "arrow file", "arrow stream"])
def test_columns_that_are_damaged_inside_are_named(form, tmp_path):
    """Bytes in the middle of a file are other ones: it is read with other values, or refused with the file's name."""
    rows = [{"prompt": f"Question {n}" * 9, "response": f"Größe {n}" * 9} for n in range(500)]
    path = tmp_path / "data"
    write_columns(rows, form, path)
    whole, chance, refused = path.read_bytes(), random.Random(1), 0
    for number in range(40):
        at = chance.randrange(len(whole) // 8, len(whole) * 7 // 8)
        path = tmp_path / f"data{number}"  # another one: the last may still be mapped into memory
        path.write_bytes(whole[:at] + chance.randbytes(64) + whole[at + 64 :])
        try:
            own_data.read_pairs(path, on_error="skip")
        except ValueError as error:
            assert str(path) in str(error)
            refused += "after row" in str(error) and "damaged" in str(error)
    assert refused > 3


def test_a_page_of_parquet_that_cannot_be_decompressed_is_named(tmp_path):
    table = pa.table({"prompt": ["Q" * 50] * 900, "response": [f"A{n}" * 20 for n in range(900)]})
    pq.write_table(table, tmp_path / "data", compression="zstd", use_dictionary=False)
    content = bytearray((tmp_path / "data").read_bytes())
    middle = len(content) // 3
    content[middle : middle + 40] = bytes(40)
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=r"data, after row \d+: damaged .*\. Download or copy it again"):
        own_data.read_pairs(tmp_path / "data")


def test_preferences_that_are_cut_off_are_named(tmp_path):
    path = tmp_path / "preferences_train.jsonl"
    preferences.write([{"prompt": f"Q{n}", "history": [], "chosen": "A", "rejected": "B"} for n in range(3)], path)
    assert len(preferences.read(path)) == 3
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"preferences_train.jsonl, line 3: not valid JSON .* write it again"):
        preferences.read(path)
