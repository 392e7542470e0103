"""A data set from a task, written by a scripted server that does every harm a server can do."""

import os

import pytest
from scripted_generator import Script, Server
from test_prepare import template  # noqa: F401 (a fixture)

from llm_finetuning.data import pairs
from llm_finetuning.data.generation import generate
from llm_finetuning.settings import Generation

KEY = "sk-very-secret-1234567890"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def settings_for(server: Server, folder, **changed) -> Generation:
    values = {
        "drive_folder": str(folder),
        "task": "Answer travellers' questions about the Lantern Isles in one sentence.",
        "endpoint": f"{server.address}/v1",
        "generator_model": "scripted",
        "pairs_wanted": 30,
        "difficulties": ["easy"],
        "forms": ["question"],
        "review_taxonomy": False,
        "near_duplicates": 0.0,
        "timeout_seconds": 1.0,
        "max_seq_length": 400,
    }
    return Generation(**values | changed)


def run(settings: Generation, template, engine=None):
    """All steps of the notebook; returns (task, drafts, splits)."""
    task = generate.start(settings, engine)
    made = generate.start_drafts(task, template)
    generate.estimate(task, made)
    generate.generate(task, made)
    splits = generate.prepared_splits(task, made, template)
    generate.write(task, made, splits, template)
    return task, made, splits


def files_with(folder, text: str) -> list[str]:
    """Names of the files below `folder` in whose bytes a text stands."""
    return [name for name, content in every_file(folder).items() if text.encode() in content]


def every_file(folder) -> dict[str, bytes]:
    paths = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return {path: open(path, "rb").read() for path in paths}


HARM = {
    "prompts": ("text around", "list", "python", "thoughts", 500, "cut", "garbage", "empty"),
    "answer": (
        "refusal",
        "as an AI",
        "markup",
        "German",
        "cut",
        "empty",
        "echo",
        500,
        429,
        "429 without Retry-After",
        "timeout",
        "hang up",
        "page",
        "no choices",
        "filtered",
        "thoughts",
    ),
}


def harmful(purpose, number, seen={}):  # noqa: B006 (counts over the calls of one test)
    """Every third answer of each purpose is harmed, each time in another way; a retry meets the next."""
    seen[purpose] = seen.get(purpose, 0) + 1
    kinds = HARM.get(purpose, ())
    return kinds[(seen[purpose] // 3) % len(kinds)] if kinds and seen[purpose] % 3 == 0 else None


def test_the_wanted_pairs_come_through_all_faults_and_a_second_run_asks_nothing(tmp_path, template):  # noqa: F811
    with Server(Script(lambda purpose, number: harmful(purpose, number))) as server:
        settings = settings_for(server, tmp_path, pairs_wanted=60, max_parallel=4)
        task, made, splits = run(settings, template)
        asked = len(server.script.requests)
        written = every_file(tmp_path / "data")
        again, _, _ = run(settings, template)
        assert len(server.script.requests) == asked > 0
        assert every_file(tmp_path / "data") == written
    assert len(made.kept) == 60
    train, val = (pairs.read_jsonl(path) for path in (settings.folders.train_file, settings.folders.val_file))
    assert len(train) + len(val) == 60
    assert not set(train["message_tree_id"]) & set(val["message_tree_id"])
    dropped = {row["step"]: row["dropped"] for s in splits.values() for row in s.funnel.to_dict("records")}
    for step in ("no refusal", 'no "as an AI"', "whole markup", "in the language asked for", "response not cut off"):
        assert step in dropped
    for prepared in splits.values():
        kept = prepared.funnel["kept"].tolist()
        assert prepared.funnel["dropped"].tolist() == [0, *(a - b for a, b in zip(kept, kept[1:], strict=False))]
        assert kept[-1] == len(prepared.pairs)
    assert files_with(tmp_path, KEY) == []
    assert files_with(tmp_path, "[key]") != []  # the server did echo it
