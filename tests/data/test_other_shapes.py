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
        ("### System:\nS\n\n### User:\nQ\n\n### Assistant:\nA", [pair("Q", "A", system="S")]),
        ("System: S\nUser: Q\nAssistant: A", [pair("Q", "A", system="S")]),
        (f"{VICUNA} USER: Like this:\nInput: 3\nOutput: 4 ASSISTANT: 6</s>",
         [pair("Like this:\nInput: 3\nOutput: 4", "6", system=VICUNA)]),
        ("You are kind.\n\nHuman: Do it.\nQuestion: Q\nAnswer: one word\n\nAssistant: A",
         [pair("Do it.\nQuestion: Q\nAnswer: one word", "A", system="You are kind.")]),
        ("<|im_start|>user name=Bob\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>", [pair("Q", "A")]),
        ("### Instruction:\nI\n\n### Response:\nA\n\n### End", [pair("I", "A")]),
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
        "<|im_start|> \nQ<|im_end|>",
        "<|start_header_id|> <|end_header_id|>Q",
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
    assert [row["prompt"] for row in found(other)] == ["Add the numbers.\n\n1, 2", f"Repeat: {CODE}"]


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
        ({"prompt": "Q", "completion": "A", "label": "false"}, [pair("Q", "A") | DOWN]),
        ({"prompt": "Q", "completion": "A", "label": 0}, [pair("Q", "A")]),
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


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("<s>[INST] Q [/INST]", "A </s>"),
        ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
        ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant", "\nA<|im_end|>\n"),
        ("<|user|>\nQ</s>\n<|assistant|>\n", "A</s>"),
        ("### Instruction:\nQ\n\n### Response:", "\nA"),
        ("USER: Q ASSISTANT:", " A</s>"),
        ("Human: Q\nAssistant:", " A"),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "A",
        ),
    ],
)
def test_a_prompt_that_a_template_wrote_is_asked_without_it(prompt, response, tmp_path):
    """The model's own template would stand around the other one's markers."""
    assert found(read(tmp_path, {"prompt": prompt, "completion": response})) == [pair("Q", "A")]
    rated = read(tmp_path, {"prompt": prompt, "chosen": response, "rejected": response.replace("A", "B")})
    assert found(rated) == [pair("Q", "A") | {"rejected": "B"}]


@pytest.mark.parametrize("prompt", ["Question: Q\nAnswer:", "Input: 1\nOutput:", "What is [INST]?", "### Human: Q"])
def test_a_prompt_with_words_of_its_own_stays_as_it_is(prompt, tmp_path):
    assert found(read(tmp_path, {"prompt": prompt, "completion": "A"})) == [pair(prompt, "A")]


def test_the_last_newline_of_a_dialogue_loses_no_record(tmp_path):
    prompt = "Human: Q1\n\nAssistant: A1\n\nHuman: Q2\nAssistant:"
    expected = pair("Q2", "A2", "Q1", "A1")
    assert found(read(tmp_path, {"prompt": prompt, "completion": " A2"})) == [expected]
    assert found(read(tmp_path, {"prompt": prompt, "chosen": " A2", "rejected": " B"})) == [
        expected | {"rejected": "B"}
    ]


TOOLS = [
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>function\n{}<|im_end|>\n"
    "<|im_start|>assistant\nB<|im_end|>",
    "[INST] Q [/INST] A</s>[INST] R [/INST][TOOL_CALLS] [{}]</s>[TOOL_RESULTS] {} [/TOOL_RESULTS] B</s>",
    "<|user|>\nQ\n<|assistant|>\nA\n<|tool|>\n{}\n<|assistant|>\nB",
]


@pytest.mark.parametrize("text", TOOLS)
def test_what_a_tool_said_is_no_answer(text, tmp_path):
    frame = read(tmp_path, {"text": text}, on_error="skip")
    assert found(frame) == [pair("Q", "A")] and frame.attrs["reasons"] == {"tool calls": 1}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversation": [{"system": "S", "input": "Q", "output": "A"}]}, [pair("Q", "A", system="S")]),
        ({"conversation": [{"input": "Q", "output": "A", "output_with_loss": False}, {"input": "R", "output": "B"}]},
         [pair("R", "B", "Q", "A")]),
        ({"messages": [*chat("Q", "A")[:1], chat("Q", "A")[1] | {"train": False}, *chat("R", "B")]},
         [pair("R", "B", "Q", "A")]),
        ({"prompt": "Translate", "input": "hello", "output": "bonjour"}, [pair("Translate\n\nhello", "bonjour")]),
        ({"prompt": "Who?", "context": "Ada did.", "response": "Ada"}, [pair("Who?\n\nAda did.", "Ada")]),
        ({"prompt": "Ada did. Who?", "context": "Ada did. ", "response": "Ada"}, [pair("Ada did. Who?", "Ada")]),
        ({"question": "Q", "answers": {"text": ["A", "A", "A"], "answer_start": [1, 1, 1]}}, [pair("Q", "A")]),
        ({"question": "Q", "answer": ["A"]}, [pair("Q", "A")]),
        ({"dialogue": "Amy: Hi\r\nBob: Ho", "summary": "Greetings"}, [pair("Amy: Hi\r\nBob: Ho", "Greetings")]),
        ({"dialogue": "User: Hi\nAssistant: Ho", "summary": "S"}, [pair("User: Hi\nAssistant: Ho", "S")]),
        ({"article": "Long", "summary": "Short"}, [pair("Long", "Short")]),
        ({"inputs": "Q", "targets": "A"}, [pair("Q", "A")]),
        ({"contents": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}]},
         [pair("Q", "A")]),
        ({"system": [{"text": "S"}], "messages": [{"role": "user", "content": [{"text": "Q"}]},
                                                  {"role": "assistant", "content": [{"text": "A"}]}]},
         [pair("Q", "A", system="S")]),
        ({"messages": [{"role": "User", "content": "Q"}, {"role": "Chatbot", "content": "A"}]}, [pair("Q", "A")]),
    ],
)  # fmt: skip
def test_records_of_other_programs_are_read(record, expected, tmp_path):
    assert found(read(tmp_path, record)) == expected


def test_a_role_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="lacks a role .* \\('narrator' is none\\)"):
        read(tmp_path, {"messages": [{"role": "narrator", "content": "Q"}, {"role": "assistant", "content": "A"}]})


def test_tables_of_pandas_by_column_and_by_row_are_read(tmp_path):
    frame = pd.DataFrame({"prompt": ["Q1", "Q2"], "response": ["A1", "A2"]})
    for orient in ("columns", "index", "records", "split"):
        (tmp_path / "data.json").write_text(frame.to_json(orient=orient))
        assert found(own_data.read_pairs(tmp_path / "data.json")) == [pair("Q1", "A1"), pair("Q2", "A2")], orient
    turns = dict(zip(("prompt", "completion"), chat("Q", "A"), strict=True))
    assert found(read(tmp_path, turns)) == [pair("Q", "A")]


def test_a_header_with_another_delimiter_in_quotes_is_read(tmp_path):
    (tmp_path / "data.csv").write_text('"question","answer (yes; no; maybe)"\n"Q","yes"\n')
    frame = own_data.read_pairs(tmp_path / "data.csv", columns=Columns(response="answer (yes; no; maybe)"))
    assert found(frame) == [pair("Q", "yes")]


def test_a_later_record_without_a_shape_has_its_cure(tmp_path):
    with pytest.raises(ValueError, match="line 2: .*no known shape fits.*on_error"):
        read(tmp_path, {"text": "### Human: Q### Assistant: A"}, {"text": "### Human: only"})
