"""A folder on this machine in place of an endpoint: a tiny Phi, taught a generator's answers, writes the pairs."""

import dataclasses
import json

import headless
import pytest
from inference_fixtures import make_model, make_tokenizer, teach, write_folder
from scripted_generator import Script

from llm_finetuning import prompts
from llm_finetuning.data import pairs
from llm_finetuning.data.generation import generate
from llm_finetuning.runner import parameters
from llm_finetuning.settings import Generation

pytestmark = [pytest.mark.more, pytest.mark.slow, pytest.mark.pipeline]
CUT = {"topics": ["Mira", "Bram"], "pairs_wanted": 10, "temperature": 0.0, "max_answer_tokens": 200, "max_parallel": 4}


def recorded(settings: Generation) -> list[dict]:
    """What is asked with these settings, and a script's answers to it, as pairs."""
    script, taught = Script(), []

    def engine(conversations):
        for *history, last in conversations:
            purpose = "prompts" if "Topic:" in last["content"] else "answer"
            response = script.text(purpose, last["content"])
            taught.append({"history": history, "prompt": last["content"], "response": response})
        return [pair["response"] for pair in taught[-len(conversations) :]]

    task = generate.start(settings, engine)
    made = generate.start_drafts(task, prompts.template_for(make_tokenizer(), task.system))
    generate.estimate(task, made)
    generate.generate(task, made)
    return taught


def test_the_notebook_takes_a_published_folder_as_its_generator(tmp_path):
    names = {field.name for field in dataclasses.fields(Generation)}
    values = {name: value for name, value in parameters.read_profile("generation").items() if name in names} | CUT
    values |= {"drive_folder": str(tmp_path / "recorded"), "max_seq_length": 1024}
    taught = recorded(Generation(**values, generator_folder="folder"))
    tokenizer = make_tokenizer().train_new_from_iterator([str(pair) for pair in taught], 1500)
    model = make_model(rows=(len(tokenizer) // 64 + 1) * 64, context=1024)
    teach(model, prompts.template_for(tokenizer), taught)
    folder = write_folder(tmp_path / "generator", model, tokenizer)
    given = CUT | {"max_seq_length": 1024}
    words = [word for name, value in given.items() for word in ("-p", name, json.dumps(value))]
    words += ["-p", "generator_folder", str(folder), "-p", "model_name", str(folder)]
    done = headless.run(tmp_path / "out", "generation", "--notebooks", "generation", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [
        pairs.read_jsonl(tmp_path / "out" / "data" / f"finetuning_data_{split}.jsonl") for split in ("train", "val")
    ]
    found = {(pair.prompt, pair.response) for split in written for pair in split.itertuples()}
    asked = {(pair["prompt"], pair["response"]) for pair in taught if "Topic:" not in pair["prompt"]}
    assert len(found & asked) >= 8, (found, asked)
