"""Records of own data that are nearly of a known shape: dialogues in one text, unknown names, thumbs, whole prompts."""

import json
from pathlib import Path

import pandas as pd
import pytest
from own_files import SHARE, chat, csv_text, pair

from llm_finetuning.data import own_data
from llm_finetuning.data.pairs import to_records
from llm_finetuning.data.shapes import Columns


def found(frame: pd.DataFrame) -> list[dict]:
    return [{name: row[name] for name in row if name != "message_tree_id"} for row in to_records(frame)]


def read(folder: Path, *records: dict, **options: object) -> pd.DataFrame:
    (folder / "data").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return own_data.read_pairs(folder / "data", **options)


TWICE = [pair("Q1", "A1"), pair("Q2", "A2", "Q1", "A1")]
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
VICUNA = "A chat between a curious user and an assistant. The assistant is polite."
ALPACA = "Below is an instruction that describes a task. Write a response.\n\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("### Human: Q1### Assistant: A1### Human: Q2### Assistant: A2", TWICE),
        ("### Human: Q1\n### Assistant: A1\n### Human: Q2\n### Assistant: A2</s>\n", TWICE),
        ("### User: Q\n\n### Assistant: See\n### Input: x", [pair("Q", "See\n### Input: x")]),
        ("### System: S\n### Human: Q\n### Assistant: A", [pair("Q", "A", system="S")]),
        ("### Instruction:\nI\n\n### Response:\nA", [pair("I", "A")]),
        ("### Instruction:\nI\n\n### Input:\nx\n\n### Response:\nA", [pair("I\n\nx", "A")]),
        (f"{ALPACA}### Instruction:\nI\n\n### Input:\n\n\n### Output:\nA", [pair("I", "A", system=ALPACA.strip())]),
        ("USER: Q1\n\n\nASSISTANT: A1 <|endoftext|>\n\n\nUSER: Q2\n\n\nASSISTANT: A2 <|endoftext|>", TWICE),
        ("USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>", TWICE),
        ("Human: Q1\nAssistant: A1\n\nHuman: Q2\nAssistant: A2", TWICE),
        ("### Question\nQ\n\n### Context\nx\n\n### Answer\nA", [pair("Q\n\nx", "A")]),
        ("### Context:\nx\n### Question:\nQ\n### Answer:\nA", [pair("x\n\nQ", "A")]),
        ("Instruct: Sum.\nOutput: So:\nInput: 1\nOutput: 2\n", [pair("Sum.", "So:\nInput: 1\nOutput: 2")]),
        ("Question: Q1\nAnswer: A1\nQuestion: Q2\nAnswer: A2", TWICE),
        ("Q: Which?\nA: One of\nA: ant\nB: bee", [pair("Which?", "One of\nA: ant\nB: bee")]),
        ("Instruction: I\nInput: x\nResponse: A", [pair("I\n\nx", "A")]),
        ("<s>[INST] Q1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>", TWICE),
        ("[INST] Q1[/INST] A1</s>[INST] Q2[/INST] A2</s>", TWICE),
        ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>", [pair("Q", "A", system="S")]),
        (f"{LLAMA.format('system', 'S')}{LLAMA.format('user', 'Q')}{LLAMA.format('assistant', 'A')}<|end_of_text|>",
         [pair("Q", "A", system="S")]),
        ("<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<eos>", [pair("Q", "A")]),
        ("<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>", [pair("Q", "A", system="S")]),
        ("<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|endoftext|>", [pair("Q", "A")]),
        ("<|prompter|>Q1<|endoftext|><|assistant|>A1<|endoftext|><|prompter|>Q2<|endoftext|><|assistant|>A2", TWICE),
        ("<|prompt|>Q<|endoftext|><|answer|>A<|endoftext|>", [pair("Q", "A")]),
        ("<human>: Q1\n<bot>: A1\n<human>: Q2\n<bot>: A2", TWICE),
        (f"{VICUNA} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
         [one | {"history": [{"role": "system", "content": VICUNA}, *one["history"]]} for one in TWICE]),
        ("<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>A<|im_end|>", [pair("Q", "A")]),
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
         [pair("Q", "A", system="S")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["text", "chat", "Conversation", "formatted_text"])
def test_a_dialogue_in_one_text_is_a_chat(name, text, expected, tmp_path):
    assert found(read(tmp_path, {name: text, "id": 1})) == expected
    (tmp_path / "table").write_text(csv_text([{name: text}], ","), encoding="utf-8")
    assert found(own_data.read_pairs(tmp_path / "table")) == expected and own_data.is_pairs_file(tmp_path / "table")


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time.",
        "Question: alone",
        "Answer: A\nQuestion: Q",
        "You are a poet. Sing.",
        "He said:\n### Human: Q### Assistant: A",
        "### Human: alone",
        "### Assistant: A### Human: Q",
    ],
)
def test_any_other_text_has_no_shape(text, tmp_path):
    with pytest.raises(ValueError, match="line 1: read as JSON lines, but no known shape fits: its keys are text"):
        read(tmp_path, {"text": text})


def test_a_dialogue_beside_a_prompt_and_its_response_is_not_used(tmp_path):
    frame = read(tmp_path, {"instruction": "I", "output": "A", "text": "### Human: I### Assistant: A"})
    assert found(frame) == [pair("I", "A")] and frame.attrs["not_used"] == {"text": 1}
    named = read(tmp_path, {"text": "### Human: Q### Assistant: A", "answer": "B"}, columns=Columns(prompt="text"))
    assert named["response"].tolist() == ["B"], "the user says that text is the prompt"


def test_calls_of_functions_in_a_dialogue_are_counted(tmp_path):
    text = "USER: Q\n\n\nASSISTANT: A <|endoftext|>\n\n\nUSER: R\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\n"
    frame = read(tmp_path, {"chat": f"{text}FUNCTION RESPONSE: 1\n\n\nASSISTANT: One <|endoftext|>"}, on_error="skip")
    assert found(frame) == [pair("Q", "A")] and frame.attrs["reasons"] == {"tool calls": 1}


EXTRA = "Q1\n<extra_id_1>Assistant\nA1\n\nand\n<extra_id_1>User\nQ2"


@pytest.mark.parametrize("prompt", [EXTRA, f"<extra_id_1>User\n{EXTRA}\n<extra_id_1>Assistant\n"])
def test_turns_inside_a_prompt_of_helpsteer_are_its_history(prompt, tmp_path):
    expected = pair("Q2", "A2", "Q1", "A1\n\nand")
    assert found(read(tmp_path, {"prompt": prompt, "response": "A2"})) == [expected]
    compared = {"prompt": prompt, "response_1": "B", "response_2": "A2", "preference_strength": 2}
    assert found(read(tmp_path, compared)) == [expected | {"rejected": "B"}]
    assert found(read(tmp_path, {"prompt": "What is <extra_id_1>User?", "response": "A"}))[0]["history"] == []


@pytest.mark.parametrize(
    ("names", "parameter"),
    [
        ("Context,Response", "prompt_column"),
        ("prompt,reply", "response_column"),
        ("text,response", "prompt_column"),
        ("question,solution", "response_column"),
        ("input,target", "response_column"),
        ("id,Completion,ask", "prompt_column"),
    ],
)
def test_one_unknown_name_is_cured_by_its_parameter(names, parameter, tmp_path):
    (tmp_path / "data").write_text(f"{names}\n{','.join('XYZ'[: names.count(',') + 1])}\n")
    listed = names.replace(",", ", ")
    with pytest.raises(ValueError, match=f"line 2: .* is missing: the record has {listed}. Set {parameter} to the one"):
        own_data.read_pairs(tmp_path / "data")
    with pytest.raises(ValueError, match=f"Set {parameter} to the one"):
        own_data.read_pairs(tmp_path / "data", on_error="skip")


def test_later_records_and_records_without_other_columns_name_no_parameter(tmp_path):
    whole = {"prompt": "Q", "response": "A", "id": 1}
    for records in ([whole, {"prompt": "Q", "id": 2}], [{"prompt": "Q"}], [{"prompt": "Q", "chosen": "A"}]):
        with pytest.raises(ValueError, match="is missing. Correct the file"):
            read(tmp_path, *records)


def test_two_responses_of_foreign_names_are_not_taken_for_one(tmp_path):
    record = {"frage": "Q", "antwort_a": "A", "antwort_b": "B", "besser": "a"}
    for names in (record, {"prompt" if name == "frage" else name: record[name] for name in record}):
        with pytest.raises(ValueError, match="_column.*; to compare antwort_a and antwort_b, name them "):
            read(tmp_path, names)


WHOLE = "Below is an instruction.\n\n### Instruction:\nSum two.\n\n### Input:\n1, 2\n\n### Output:\n"
CODE = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize("code", [CODE, "a + b", f"{CODE}\n"])
@pytest.mark.parametrize("name", ["instruction", "question"])
def test_a_prompt_that_holds_the_answer_is_not_asked(code, name, tmp_path):
    record = {name: "Sum two.", "input": "1, 2", "output": code, "prompt": WHOLE + code}
    frame = read(tmp_path, record)
    assert found(frame) == [pair("Sum two.\n\n1, 2", code)] and frame.attrs["not_used"] == {"prompt": 1}
    other = read(tmp_path, record | {"prompt": "Add the numbers."}, {"prompt": f"Repeat: {CODE}", "output": CODE})
    assert [row["prompt"] for row in found(other)] == ["Add the numbers.", f"Repeat: {CODE}"]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Ada Lovelace of London wrote it first.\nWho wrote it, by the text above?", "Ada Lovelace of London"),
        ("Which is the larger one? 3, 7", "7"),
    ],
)
def test_an_answer_out_of_the_prompt_does_not_take_it_away(prompt, answer, tmp_path):
    assert found(read(tmp_path, {"question": "Who?", "prompt": prompt, "answer": answer})) == [pair(prompt, answer)]


DOWN = {"rank": 1, "liked": False}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": chat("Q", "A"), "label": False}, [pair("Q", "A") | DOWN]),
        ({"messages": chat("Q", "A"), "label": "False"}, [pair("Q", "A") | DOWN]),
        ({"messages": chat("Q1", "A1", "Q2", "A2"), "label": False}, [pair("Q2", "A2", "Q1", "A1") | DOWN]),
        ({"messages": chat("Q1", "A1", "Q2", "A2"), "label": True},
         [pair("Q1", "A1"), pair("Q2", "A2", "Q1", "A1") | {"rank": 0, "liked": True}]),
        ({"conversations": chat("Q", "A", **SHARE), "kto_tag": False}, [pair("Q", "A") | DOWN]),
        ({"conversations": chat("Q", "A", **SHARE), "kto_tag": 0}, [pair("Q", "A") | DOWN]),
        ({"instruction": "Q", "output": "A", "kto_tag": "false"}, [pair("Q", "A") | DOWN]),
        ({"prompt": "Q", "completion": "A", "label": 0}, [pair("Q", "A") | DOWN]),
        ({"prompt": "Q", "completion": "A", "label": "1"}, [pair("Q", "A") | {"rank": 0, "liked": True}]),
        ({"prompt": "Q", "completion": "A", "label": 2}, [pair("Q", "A")]),
        ({"messages": chat("Q", "A"), "label": 0}, [pair("Q", "A")]),
        ({"messages": chat("Q", "A"), "label": "spam"}, [pair("Q", "A")]),
    ],
)  # fmt: skip
def test_a_thumb_on_a_chat_is_one_on_its_last_answer(record, expected, tmp_path):
    assert found(read(tmp_path, record)) == expected


def test_disliked_chats_are_rejected_and_not_imitated(tmp_path):
    thumbs = [{"messages": chat("Q", "Good"), "label": True}, {"messages": chat("Q", "Bad"), "label": False}]
    flat = own_data.flatten_pairs(read(tmp_path, *thumbs, {"messages": chat("R", "Worse"), "label": False}))
    assert flat.pairs["response"].tolist() == ["Good"] and "liked" not in flat.pairs.columns
    assert [(record["chosen"], record["rejected"]) for record in flat.preferences] == [("Good", "Bad")]
    assert "response that people liked" in flat.funnel["step"].tolist()
