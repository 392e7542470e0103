"""Tasks of lm-evaluation-harness on a model in memory, from local task files, without a network."""

import json

import pytest
from inference_fixtures import pairs as known

from llm_finetuning import prompts
from llm_finetuning.evaluation import comparison, likelihood, report, tasks
from llm_finetuning.settings import Evaluation

pytestmark = [pytest.mark.more, pytest.mark.slow]
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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("task: known_answers\n  dataset_path: [json\n", "known_answers is no task.*own.yaml is not YAML"),
        (TASK.format(file="/nowhere/questions.jsonl"), r"known_answers cannot be made \(FileNotFoundError"),
        (TASK.format(file="{file}").replace("test_split: test", "test_split: exam"), "known_answers cannot be made"),
        (TASK.format(file="{file}").replace("multiple_choice", "many_choices"), "known_answers cannot be made"),
    ],
)
def test_a_task_file_that_is_broken_is_told_before_a_model_is_loaded(task_folder, text, problem):
    folder, _ = task_folder
    (folder / "known_answers.yaml").unlink()
    (folder / "own.yaml").write_text(text.replace("{file}", str(folder / "questions.jsonl")), encoding="utf-8")
    with pytest.raises(ValueError, match=problem):
        tasks.check(["known_answers"], str(folder))


def test_a_broken_file_beside_a_sound_task_harms_nothing(task_folder):
    folder, _ = task_folder
    for name, text in {"broken": "task: [", "list": "- task\n", "tag": "task: x\nprocess_docs: !function x.y"}.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    tasks.check(["known_answers"], str(folder))
    told = list(tasks._unread(str(folder)))
    assert len(told) == 2 and "broken.yaml is not YAML" in told[0] and "list.yaml holds list" in told[1]


def test_groups_and_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mmlu is a group: name its tasks"):
        tasks.check(["mmlu"])
    with pytest.raises(FileNotFoundError, match="task_folder .* is no folder"):
        tasks.check(["known_answers"], str(tmp_path / "nowhere"))


def test_a_limit_beyond_the_task_is_all_of_it_and_a_changed_task_is_measured_anew(published, task_folder, tmp_path):
    folder, questions = task_folder
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "finetuning_data_val.jsonl").write_text(json.dumps(known()[0]) + "\n", encoding="utf-8")
    settings = Evaluation(
        drive_folder=str(tmp_path), models=[str(published)], eval_answers=0, follow_rules=False, generic_text="",
        tasks="known_answers", task_limit=1000, task_folder=str(folder), max_seq_length=200,
    )  # fmt: skip

    def measured() -> dict:
        return report.figures(comparison.compare(settings)["finetuned_phi2"])["known_answers"]

    before = measured()
    assert before["n"] == len(questions) == 20
    wrong = [question | {"right": 1} for question in questions]
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in wrong), encoding="utf-8")
    assert measured()["value"] == pytest.approx(1 - before["value"])
