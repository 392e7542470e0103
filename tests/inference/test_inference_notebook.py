"""What the inference notebook calls: questions, tables, a file of prompts, the box; and the notebook itself."""

import json
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest
from inference_fixtures import COLOURS, NUMBERS, ask, counting, pairs

from llm_finetuning.files.atomic import partial_name
from llm_finetuning.inference import answer_file, examples, tables
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.settings import Inference

NOTEBOOK = Path(__file__).parents[2] / "Inference" / "Phi-2 Inference.ipynb"
ROOM = SamplingParameters(max_new_tokens=80)


@pytest.fixture
def settings(tmp_path):
    def make(**changes) -> Inference:
        cell = next(c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", []))
        names: dict = {}
        exec(cell.source, names)
        fields = {name: names[name] for name in Inference.__dataclass_fields__ if name in names}
        return Inference(**fields | {"drive_folder": str(tmp_path)} | changes)

    return make


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_questions_come_from_the_user_the_validation_file_or_are_general(settings, tmp_path):
    assert examples.conversations(settings(questions=["Hi?"])) == [ask("Hi?")]
    assert [c[-1]["content"] for c in examples.conversations(settings())] == examples.GENERAL_QUESTIONS
    write_jsonl(tmp_path / "data" / "finetuning_data_val.jsonl", pairs())
    asked = examples.conversations(settings())
    assert [c[-1]["content"] for c in asked] == [p["prompt"] for p in pairs()][:5]
    first_with_history = next(p for p in pairs() if "history" in p)
    said = [first_with_history["history"][0]["content"], first_with_history["prompt"]]
    assert examples.dialogue(settings()) == said


def test_bad_settings_are_all_named(settings):
    with pytest.raises(ValueError) as error:
        settings(temperature=-1.0, top_p=0.0, questions=[" "], batch_size=0)
    for name in ("temperature", "top_p", "questions", "batch_size"):
        assert name in str(error.value)


def test_the_tables_show_the_answers(chat):
    said = ["Which colour does bram like?", "And where is the house?"]
    assert list(tables.dialogue(chat, said, ROOM).assistant) == ["bram likes blue.", "In Sunnet."]
    answers = tables.answers(chat, [ask("Count."), ask(said[0])], ROOM)
    assert list(answers.answer) == [NUMBERS, "bram likes blue."] and set(answers["ended by"]) == {"end"}
    both = tables.side_by_side(answers, answers)
    assert list(both["base", "answer"]) == list(both["finetuned", "answer"]) == list(answers.answer)
    sampled = tables.sampled(chat, ask("Count."), [ROOM, SamplingParameters(5, temperature=1.0)])
    assert sampled.answer[0] == NUMBERS and list(sampled["ended by"]) == ["end", "length"]


def test_a_file_of_prompts_is_answered_in_order_with_its_other_fields(chat, tmp_path):
    rows = [p | {"id": number} for number, p in enumerate(pairs())]
    answers = answer_file.answer_file(chat, write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", ROOM, 4)
    written = read_jsonl(answers)
    assert [row["answer"] for row in written] == [row["response"] for row in rows]
    assert [row["id"] for row in written] == list(range(len(rows)))
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_file_goes_on_where_it_stopped(chat, tmp_path):
    rows = [{"prompt": f"Which colour does {name} like?", "id": "a\u2028b\x85"} for name in COLOURS]
    prompts = write_jsonl(tmp_path / "in.jsonl", rows)
    broken = counting(chat)
    answer_batch, calls = broken.generate_batch, []

    def fails_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer_batch(*args)

    broken.generate_batch = fails_the_second_time
    with pytest.raises(KeyboardInterrupt):
        answer_file.answer_file(broken, prompts, tmp_path / "out.jsonl", ROOM, 2)
    assert not (tmp_path / "out.jsonl").exists()
    partial = partial_name(tmp_path / "out.jsonl")
    partial.write_bytes(partial.read_bytes() + b'{"prompt": "cut o')
    counted = counting(chat)
    asked = []
    counted.generate_batch = lambda batch, sampling: asked.extend(batch) or chat.generate_batch(batch, sampling)
    answer_file.answer_file(counted, prompts, tmp_path / "out.jsonl", ROOM, 2)
    assert len(asked) == 2
    assert [row["answer"] for row in read_jsonl(tmp_path / "out.jsonl")] == [
        f"{n} likes {c}." for n, c in COLOURS.items()
    ]


def test_answers_of_two_models_or_samplings_are_never_in_one_file(chat, tmp_path, capsys):
    """The model is trained anew, or the temperature changed, between the two calls."""
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"Which colour does {name} like?"} for name in COLOURS])
    old = [{"prompt": f"Which colour does {name} like?", "answer": "old"} for name in list(COLOURS)[:2]]
    for changed in ({"model": "another"}, {"max_new_tokens": 3}):
        partial = write_jsonl(partial_name(tmp_path / "out.jsonl"), old)
        made_by = {"model": chat.digest, **asdict(ROOM)} | changed
        partial.with_name(f"{partial.name}.by").write_text(json.dumps(made_by))
        answers = read_jsonl(answer_file.answer_file(chat, prompts, tmp_path / "out.jsonl", ROOM))
        assert [row["answer"] for row in answers] == [f"{name} likes {colour}." for name, colour in COLOURS.items()]
        assert "begun afresh" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_partial_file_of_other_prompts_is_not_mixed_in(chat, tmp_path):
    write_jsonl(partial_name(tmp_path / "out.jsonl"), [{"prompt": "Other", "answer": "x"}])
    with pytest.raises(ValueError, match="line 1 answers another prompt"):
        prompts = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "Hi"}])
        answer_file.answer_file(chat, prompts, tmp_path / "out.jsonl", ROOM)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('{"prompt": "Hi"}\n{"question": "Hi"}\n', 'line 2: no "prompt"'),
        ('{"prompt": "Hi"}\nHi\n', "line 2: not valid JSON"),
        ('{"prompt": " "}\n', "line 1: the message is empty"),
        ('{"prompt": "Hi", "history": [{"role": "assistant", "content": "x"}]}\n', "line 1: the roles are"),
        ("", "is empty"),
    ],
)
def test_a_bad_prompts_file_names_the_line_before_the_first_answer(chat, tmp_path, lines, problem):
    (tmp_path / "in.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=problem):
        answer_file.answer_file(chat, tmp_path / "in.jsonl", tmp_path / "out.jsonl", ROOM)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_prompts_file(chat, tmp_path):
    with pytest.raises(FileNotFoundError, match="in.jsonl not found"):
        answer_file.answer_file(chat, tmp_path / "in.jsonl", tmp_path / "out.jsonl", ROOM)


def test_the_chat_box_answers_and_shows_markup_as_text(chat):
    pytest.importorskip("ipywidgets", reason="the chat box needs ipywidgets: pip install ipywidgets")
    from llm_finetuning.inference.chat_box import chat_box

    box = chat_box(chat, ROOM)
    shown, line, buttons = box.children
    line.value = "Which colour does petra like?"
    assert "petra likes white." in shown.value and line.value == ""
    line.value = "And where is the house?"
    assert "In Harrowick." in shown.value
    buttons.children[1].click()
    assert shown.value == ""
    line.value = "<b>bold</b>?"
    assert "&lt;script&gt;" in shown.value and "<script>" not in shown.value
    line.value = "x" * 3_000
    assert "too long" in shown.value


@pytest.mark.pipeline
def test_the_notebook_runs_on_the_published_folder(published, tmp_path):
    import papermill

    write_jsonl(tmp_path / "data" / "finetuning_data_val.jsonl", pairs())
    given = {"drive_folder": str(tmp_path), "model_folder": str(published), "model_name": str(published)}
    executed = papermill.execute_notebook(
        str(NOTEBOOK), str(tmp_path / "out.ipynb"), given | {"max_new_tokens": 60}, progress_bar=False
    )
    printed = json.dumps(executed, ensure_ascii=False)
    assert NUMBERS in printed and "tokens/s" in printed and "finetuned" in printed
    assert [row["answer"] for row in read_jsonl(tmp_path / "answers.jsonl")] == [p["response"] for p in pairs()[:5]]
