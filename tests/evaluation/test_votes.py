"""What votes say: shares with intervals, and preference records that the data preparation reads."""

import json
import random
import subprocess
import sys

import pytest
from inference_fixtures import ask
from scipy import stats
from training_fixtures import write_lines

from llm_finetuning.data import own_data, preferences
from llm_finetuning.evaluation import votes
from llm_finetuning.inference.votes import Ballot


def vote(prompt: str, choice: str, models: str = "ab", history: tuple = ()) -> dict:
    """A vote on answers that begin with their model's name."""
    answers = [f"{model} says {prompt}" for model in models]
    return Ballot("n", ask(prompt, *history), list(models), answers).record(choice)


def shuffled(prompts: list[str], better: str) -> list[dict]:
    """Votes for the better one, wherever it stood."""
    chance, made = random.Random(0), []
    for prompt in prompts:
        models = "".join(chance.sample("ab", 2))
        made.append(vote(prompt, "left" if models[0] == better else "right", models))
    return made


@pytest.mark.parametrize(("wins", "losses"), [(30, 10), (12, 0), (9, 10)])
def test_the_share_has_wilsons_interval_wherever_the_answers_stood(wins, losses):
    cast = shuffled([f"w{n}" for n in range(wins)], "b") + shuffled([f"l{n}" for n in range(losses)], "a")
    low, high = stats.binomtest(wins, wins + losses).proportion_ci(method="wilson")
    found = votes.share(cast, "b", "a")
    assert (found["value"], found["n"]) == (wins / (wins + losses), wins + losses)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)
    mirrored = votes.share(cast, "a", "b")
    assert (1 - mirrored["high"], 1 - mirrored["low"]) == pytest.approx((low, high), abs=1e-6)
    verdict = "better" if low > 0.5 else "worse" if high < 0.5 else "no difference shown"
    assert votes.table(cast, ["a", "b"])["verdict"].tolist() == [verdict]


def test_many_votes_on_one_question_are_one_question():
    many = [vote("one", "left")] * 200
    assert votes.share(many, "a", "b") == {"value": 1.0, "low": None, "high": None, "n": 1}
    assert votes.table(many, ["b", "a"]).to_dict("records")[0]["verdict"] == "no difference shown"
    split = [*many, vote("two", "right"), vote("two", "tie"), vote("two", "both bad", "ba")]
    assert votes.share(split, "a", "b")["value"] == pytest.approx((1 + 1 / 3) / 2)
    with_history = [*many, vote("one", "right", history=("Hi.", "Hello."))]
    assert votes.share(with_history, "a", "b")["n"] == 2


def test_votes_on_other_models_do_not_mix():
    cast = [vote("q", "left", "ac"), vote("q", "left", "bc"), vote("r", "right", "ab")]
    assert votes.share(cast, "a", "b")["value"] == 0.0 and votes.share(cast, "b", "c")["value"] == 1.0
    assert votes.share(cast, "a", "d") is None
    assert votes.table(cast, ["a", "b", "c"])[["model", "against"]].values.tolist() == [
        ["b", "a"], ["c", "a"], ["c", "b"],
    ]  # fmt: skip


def test_the_export_is_read_as_an_own_source(tmp_path):
    persona = [{"role": "system", "content": "Be brief."}, *ask("third", "Hi.", "Hello.")]
    cast = [
        vote("first", "left"),
        vote("second", "right", "ba"),
        Ballot("n", persona, ["a", "b"], ["yes,\n  indented", "no"]).record("right"),
        vote("fourth", "tie"),
        vote("fifth", "both bad"),
        Ballot("n", ask("sixth"), ["a", "b"], ["alike", "alike"]).record("left"),
        Ballot("n", ask("seventh"), ["a", "b"], ["", "something"]).record("right"),
    ]
    path = votes.export(cast, tmp_path / "preferences.jsonl")
    assert preferences.read(path) == [
        {"prompt": "first", "history": [], "chosen": "a says first", "rejected": "b says first"},
        {"prompt": "second", "history": [], "chosen": "a says second", "rejected": "b says second"},
        {"prompt": "third", "history": persona[:-1], "chosen": "no", "rejected": "yes,\n  indented"},
    ]
    read = own_data.read_pairs(path)
    assert read["response"].tolist() == ["a says first", "a says second", "no"]
    assert read["history"].tolist()[2] == persona[:-1]
    flat = own_data.flatten_pairs(read)
    kept = [{name: record[name] for name in ("prompt", "history", "chosen", "rejected")} for record in flat.preferences]
    assert kept == preferences.read(path)
    raw = own_data.read_pairs(write_lines(tmp_path / "votes.jsonl", cast))
    assert own_data.flatten_pairs(raw).preferences == flat.preferences, "the file of votes is a source too"
    assert sum(raw.attrs["reasons"].values()) == len(cast) - 3
    assert votes.export(cast[3:], tmp_path / "none.jsonl") is None and not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "response": "r"}, [], 5, "x", None,
        vote("q", "left") | {"choice": "first"}, vote("q", "left") | {"choice": ["left"]},
        vote("q", "left") | {"answers": ["one"]}, vote("q", "left") | {"models": "ab"},
        vote("q", "left") | {"history": "none"}, vote("q", "left") | {"prompt": None},
        vote("q", "left") | {"answers": [{}, "x"]},
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_with_its_line(tmp_path, record):
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (vote("q", "tie"), record)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"votes\.jsonl, line 2 is no vote"):
        votes.read(path)
    assert votes.read(tmp_path / "missing.jsonl") == []


def test_the_command_writes_the_records_and_tells_the_share(tmp_path):
    path, target = tmp_path / "votes.jsonl", tmp_path / "preferences.jsonl"
    lines = [json.dumps(each) for each in (vote("first", "left"), vote("second", "tie"), vote("third", "right", "ba"))]
    path.write_text("\n".join([*lines, lines[0][:40]]), encoding="utf-8")
    command = [sys.executable, "-m", "llm_finetuning.evaluation.votes"]
    done = subprocess.run([*command, str(path), str(target)], capture_output=True, text=True)
    assert done.returncode == 0 and len(preferences.read(target)) == 2
    assert f"b preferred to a: {0.5 / 3:.3f}" in done.stdout
    missing = subprocess.run([*command, str(tmp_path / "none"), str(target)], capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.startswith(f"{tmp_path / 'none'} is not there")
    assert len(preferences.read(target)) == 2
