"""What a run prints at its end."""

from llm_finetuning.data import pairs
from llm_finetuning.runner import summary

SCORES = {
    "before": {"loss": 2.9412, "stop_rate": 0.0, "samples": [{"prompt": "a"}]},
    "after": {"loss": 0.0812, "stop_rate": 1.0, "exact_match": 0.95},
}


class Echo:
    def answer(self, messages, options):
        return f"{len(messages)}: {messages[-1]['content']}"


def test_the_table_has_a_row_for_each_measure_and_a_column_for_each_model():
    assert summary.table(SCORES).splitlines() == [
        "             before   after",
        "loss          2.941  0.0812",
        "stop_rate         0       1",
        "exact_match       –    0.95",
    ]


def test_the_talk_follows_a_held_out_conversation_and_uses_the_answers_given(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"prompt": "One", "response": "1"}, {"prompt": "And then?", "response": "2", "history": turns}]
    asked = summary.questions(pairs.write_jsonl(rows, tmp_path / "val.jsonl"))
    assert summary.conversation(Echo(), asked) == [
        ("user", "Hi"),
        ("assistant", "1: Hi"),
        ("user", "And then?"),
        ("assistant", "3: And then?"),
    ]


def test_without_a_long_conversation_the_first_prompts_are_asked(tmp_path):
    rows = [{"prompt": str(number), "response": "x"} for number in range(5)]
    assert summary.questions(pairs.write_jsonl(rows, tmp_path / "val.jsonl")) == ["0", "1", "2"]
