"""What others make of an exported folder: llama.cpp's own programs, with known answers and with real tokenizers."""

import json
import os
import subprocess
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import headless
import llama_programs
import openai
import pytest
import real_tokenizers
import test_ollama
from gguf_world import merged
from inference_fixtures import ask, make_model, make_tokenizer, pairs, teach, write_folder
from servers import serving
from training_fixtures import save_base, small_pairs, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_finetuning import prompts
from llm_finetuning.files import checksums
from llm_finetuning.release import gguf, ollama

pytestmark = pytest.mark.more
REAL = {"llama3_1": "llama", "qwen3": "qwen3", "gemma3": "gemma3_text"}
TALKS = [prompts.question(pair) for pair in pairs()]
NEW = [
    ask(f"Which {what} does {name} like?") for what in ("house", "dog") for name in ("mira", "bram", "odrin", "petra")
]


@contextmanager
def llama_server(model: Path, log: Path, *options: str):
    """Yields the address of llama.cpp's server, started as the README says, on a port of its own."""
    command = [llama_programs.program("llama-server"), "-m", str(model), "--jinja", "--host", "127.0.0.1"]
    with serving(
        [*command, "--port", "PORT", "--threads", "1", "--parallel", "1", *options], "/health", log
    ) as address:
        yield address


def asked(address: str, talks: list[list[dict]], tokens: int) -> list:
    """The greedy completions of an OpenAI-compatible server, by OpenAI's own client."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    return [
        client.chat.completions.create(model="any", messages=talk, temperature=0, max_tokens=tokens) for talk in talks
    ]


def posted(address: str, page: str, **body: object) -> dict:
    request = urllib.request.Request(address + page, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def expected(folder: Path, talks: list[list[dict]], tokens: int) -> list[tuple[int, str]]:
    """(tokens of the prompt, greedy answer) of each conversation, by transformers alone, in float32."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for talk in talks:
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
        found.append((ids["input_ids"].shape[1], tokenizer.decode(made, skip_special_tokens=True)))
    return found


def untaught():
    """A tiny Phi and its tokenizer; llama.cpp takes its middle layers for four times as wide, as Phi-2's are."""
    tokenizer = make_tokenizer()
    return make_model(rows=(len(tokenizer) // 64 + 1) * 64, widening=4), tokenizer


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """The published folder of a tiny model that knows its answers."""
    model, tokenizer = untaught()
    teach(model, prompts.template_for(tokenizer))
    return write_folder(tmp_path_factory.mktemp("taught") / "finetuned_phi2", model, tokenizer)


@pytest.fixture(scope="module")
def exported(taught, llama_cpp) -> Path:
    """Its GGUF files."""
    return gguf.export(taught, taught.with_name("gguf"), ["f16", "Q4_K_M"]).folder


@pytest.mark.parametrize("kind, share", [("f16", 1.0), ("Q4_K_M", 0.9)])
def test_llama_server_answers_as_transformers_does(taught, exported, tmp_path, kind, share):
    talks = TALKS + NEW
    right = expected(taught, talks, 40)
    with llama_server(exported / f"model-{kind}.gguf", tmp_path / "log") as address:
        answers = asked(address, talks, 40)
    assert [answer.usage.prompt_tokens for answer in answers] == [count for count, _ in right]
    texts = [answer.choices[0].message.content for answer in answers]
    alike = [text.strip() == wanted.strip() for text, (_, wanted) in zip(texts, right, strict=True)]
    assert sum(alike) >= share * len(talks), list(zip(texts, right, strict=True))
    assert [text.strip() for text in texts[: len(TALKS)]] == [pair["response"] for pair in pairs()]
    assert {answer.choices[0].finish_reason for answer in answers[: len(TALKS)]} == {"stop"}


@pytest.mark.parametrize("pair", pairs()[:4], ids=lambda pair: pair["response"][:8])
def test_llama_cli_answers_as_it_was_taught(exported, pair):
    command = [
        llama_programs.program("llama-cli"),
        "-m",
        str(exported / "model-Q4_K_M.gguf"),
        "--jinja",
        "--threads",
        "1",
    ]
    command += ["--temp", "0", "-n", "40", "--single-turn", "--simple-io", "-p", pair["prompt"]]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pair["response"] in done.stdout.partition(pair["prompt"])[2], done.stdout


@pytest.mark.parametrize("name", test_ollama.TEMPLATES)
def test_llama_server_writes_a_conversation_as_the_chat_template_does(exported, tmp_path, name):
    tokenizer = test_ollama.tokenizer_with(test_ollama.TEMPLATES[name], "Be kind.")
    (tmp_path / "template.jinja").write_text(tokenizer.chat_template)
    talks = list(ollama._conversations(ollama.CONTENTS + ollama.BLANKS, True))
    options = ["--chat-template-file", str(tmp_path / "template.jinja")]
    with llama_server(exported / "model-Q4_K_M.gguf", tmp_path / "log", *options) as address:
        found = [posted(address, "/apply-template", messages=talk)["prompt"] for talk in talks]
    right = prompts.render_texts([(talk, True) for talk in talks], prompts.Template(tokenizer))
    bos = tokenizer.bos_token
    assert [text.removeprefix(bos) for text in found] == [text.removeprefix(bos) for text in right]


@pytest.mark.parametrize("name, family", REAL.items())
def test_real_tokenizers_read_alike(tmp_path, llama_cpp, name, family):
    folder = merged(tmp_path / "merged", family, real_tokenizers.fetched(name), "" if name == "gemma3" else "Be kind.")
    made = gguf.export(folder, tmp_path / "gguf", ["f16", "Q4_K_M"])
    f16, small = made.measured
    assert made.texts >= 30 and f16["tokens"] >= 300
    assert f16["kl"] < 1e-3 and f16["top_1"] > 0.98
    assert f16["kl"] < small["kl"] < 1 and small["bytes"] < 0.7 * f16["bytes"]
    talks = [ask(text) for text in ("Wer wohnt dort? 日本", "def f(x):\n    return x  # 1,234", "Hi", "  a  b\n\n")]
    talks += [ask("And then?", "Who is it?", "It is Mira.")]
    right = expected(folder, talks, 12)
    with llama_server(tmp_path / "gguf" / "model-f16.gguf", tmp_path / "log") as address:
        answers = asked(address, talks, 12)
    assert [answer.usage.prompt_tokens for answer in answers] == [count for count, _ in right]
    assert [answer.choices[0].message.content.strip() for answer in answers] == [text.strip() for _, text in right]


@pytest.mark.pipeline
def test_the_notebook_leaves_gguf_files_beside_the_model(tmp_path, llama_cpp):
    output = tmp_path / "out"
    for split in ("train", "val"):
        write_lines(output / "data" / f"finetuning_data_{split}.jsonl", small_pairs())
    save_base(tmp_path / "base", *untaught())
    cut = {"model_name": tmp_path / "base", "gguf": "f16,Q4_K_M", "max_steps": 2, "save_steps": 2, "eval_steps": 2}
    cut |= {"eval_pairs": 4, "eval_answers": 2, "max_new_tokens": 8, "max_seq_length": 96}
    words = [word for name, value in cut.items() for word in ("-p", name, str(value))]
    found = f"{headless.ROOT}{os.pathsep}{Path(llama_cpp.__file__).parents[1]}"  # else the notebook would install it
    done = headless.run(output, "sample", "--notebooks", "finetuning", *words, PYTHONPATH=found)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = output / "finetuned_phi2-gguf"
    names = {"Modelfile", "README.md", "SHA256SUMS", "adapter-f16.gguf", "model-Q4_K_M.gguf", "model-f16.gguf"}
    assert {path.name for path in folder.iterdir()} == names
    checksums.verify_checksums(folder)
    assert "FROM ./model-Q4_K_M.gguf" in (folder / "Modelfile").read_text()
    card = (output / "finetuned_phi2" / "README.md").read_text(encoding="utf-8")
    assert "| `model-f16.gguf` |" in card and "| `model-Q4_K_M.gguf` |" in card
    page = (output / "notebooks" / "Phi-2 QLoRA Finetuning.html").read_text(encoding="utf-8")
    assert "Q4_K_M" in page
