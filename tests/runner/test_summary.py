"""What a run prints at its end."""

import json
import re

import pytest

from llm_finetuning.data import pairs
from llm_finetuning.inference.chat import Answer
from llm_finetuning.runner import summary
from llm_finetuning.runner.steps import STEPS

SCORES = {
    "before": {"loss": 2.94123, "stop_rate": 0.0, "samples": [{"prompt": "a"}]},
    "after": {"loss": 0.08124, "stop_rate": 1.0, "exact_match": 0.95},
}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LONG = [{"prompt": "One", "response": "1"}, {"prompt": "And then?", "response": "2", "history": TURNS}]


class Echo:
    """A chat that answers with the number of messages it saw and the last of them."""

    def generate(self, messages, sampling):
        return Answer(f"{len(messages)}: {messages[-1]['content']}", 3, "end", 5, 0.1, 0.2)


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """printed(held-out pairs) → the lines that a run with these ends with."""

    def show(held_out: list[dict]) -> list[str]:
        pairs.write_jsonl(held_out, tmp_path / "data" / "finetuning_data_val.jsonl")
        (tmp_path / "scoreboard.json").write_text(json.dumps(SCORES))
        monkeypatch.setattr(summary.Chat, "load", lambda folder: Echo())
        summary.show(tmp_path)
        return capsys.readouterr().out.splitlines()

    return show


def test_the_table_has_a_row_for_each_measure_and_a_column_for_each_model(printed):
    assert [line.split() for line in printed(LONG)[1:5]] == [
        ["before", "after"],
        ["loss", "2.941", "0.0812"],
        ["stop_rate", "0", "1"],
        ["exact_match", "–", "0.95"],
    ]


def test_the_talk_follows_a_held_out_conversation_and_uses_the_answers_given(printed):
    assert printed(LONG)[6:10] == ["user: Hi", "assistant: 1: Hi", "user: And then?", "assistant: 3: And then?"]


def test_without_a_long_conversation_the_first_prompts_are_asked(printed):
    lines = printed([{"prompt": str(number), "response": "x"} for number in range(5)])
    assert [line for line in lines if line.startswith("user: ")] == ["user: 0", "user: 1", "user: 2"]


def test_what_it_ends_with_can_be_clicked(printed, tmp_path):
    (tmp_path / "notebooks").mkdir()
    for step in STEPS:
        (tmp_path / "notebooks" / f"{step.notebook.stem}.html").touch()
    links = [line for line in printed(LONG) if "file://" in line]
    assert len(links) == len(STEPS) + 1
    assert links[2] == f"{tmp_path.as_uri()}/notebooks/Phi-2%20QLoRA%20Finetuning.html"
    assert not any(re.search(r"file://\S* ", link) for link in links)
