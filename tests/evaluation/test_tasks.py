"""Tasks of lm-evaluation-harness on a model in memory, from local task files, without a network."""

import json

import pytest
from inference_fixtures import pairs as known

from llm_finetuning import prompts
from llm_finetuning.evaluation import comparison, likelihood, report, tasks
from llm_finetuning.settings import Evaluation

pytestmark = pytest.mark.more
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make test-more does it")

TASK = """\
task: known_answers
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    """A task of 20 questions with two choices, as people write them for the harness."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [pair["response"] for pair in known()]
    questions = [
        {"question": f"Instruct: {pair['prompt']}\nOutput:", "choices": [pair["response"], texts[(i + 3) % len(texts)]],
         "right": 0}
        for i, pair in enumerate([*known(), *known(), *known(), *known()][:20])
    ]  # fmt: skip
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    (folder / "known_answers.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    return folder, questions


def test_a_local_task_is_measured_with_its_interval(world, task_folder):
    model, template = world
    folder, _ = task_folder
    tasks.check(["known_answers"], str(folder))
    found = tasks.figures(model, template, ["known_answers"], 0, str(folder))["known_answers"]
    assert found["metric"] == "acc" and found["n"] == 20
    assert found["low"] < found["value"] <= found["high"] and found["value"] > 0.8


def test_likelihoods_are_those_of_the_harness(world, task_folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, template = world
    asked = [(q["question"], " " + q["choices"][0]) for q in task_folder[1]]
    requests = [Instance("loglikelihood", {}, each, i) for i, each in enumerate(asked)]
    theirs = HFLM(pretrained=model, tokenizer=template.tokenizer, batch_size=4).loglikelihood(requests)
    examples = []
    for context, continuation in asked:
        before, whole = (template.tokenizer(text).input_ids for text in (context, context + continuation))
        labels = [prompts.IGNORE_INDEX] * len(before) + whole[len(before) :]
        examples.append({"input_ids": whole, "labels": labels})
    ours = likelihood.losses(model, examples, template)
    assert [-value for value in ours.values] == pytest.approx([value for value, _ in theirs], abs=1e-3)


def test_a_task_stands_in_the_evaluation(published, tiny_base, task_folder, tmp_path):
    folder, _ = task_folder
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(pair) + "\n" for pair in known()[:6])
    (tmp_path / "data" / "finetuning_data_val.jsonl").write_text(lines, encoding="utf-8")
    settings = Evaluation(
        drive_folder=str(tmp_path), models=[str(published), str(tiny_base)], eval_answers=0, follow_rules=False,
        generic_text="", tasks="known_answers", task_limit=10, task_folder=str(folder), max_seq_length=200,
    )  # fmt: skip
    record = report.write(comparison.compare(settings), settings.folders.evaluation)
    assert record["finetuned_phi2"]["known_answers"]["n"] == 10
    with pytest.raises(ValueError, match="arc_hesy is no task"):
        tasks.check(["arc_hesy"])
