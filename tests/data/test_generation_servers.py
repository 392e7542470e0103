"""Real servers and a real finetuning: a tiny Phi writes noise, but the protocol works; a script teaches its pairs."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import headless
import llama_programs
import pytest
from generation_world import letters_template, settings_for
from scripted_generator import QUESTIONS, Server
from servers import serving

from llm_finetuning import prompts
from llm_finetuning.data import pairs
from llm_finetuning.data.generation import generate
from llm_finetuning.data.generation.endpoint import GeneratorError
from llm_finetuning.files import checksums
from llm_finetuning.inference.chat import Chat

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def folder(tmp_path_factory, phi2_tokenizer_folder) -> Path:
    """A tiny random Phi with Phi-2's own tokenizer, as a merge leaves it."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, PhiConfig, PhiForCausalLM

    tokenizer, path = AutoTokenizer.from_pretrained(phi2_tokenizer_folder), tmp_path_factory.mktemp("phi")
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = PhiConfig(
        vocab_size=51200, hidden_size=160, intermediate_size=640, num_hidden_layers=2, num_attention_heads=2,
        partial_rotary_factor=0.4, max_position_embeddings=2048, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    PhiForCausalLM(config).to(torch.float16).save_pretrained(path)
    GenerationConfig(eos_token_id=end, pad_token_id=end).save_pretrained(path)
    prompts.template_for(tokenizer, "Answer in one sentence.")
    tokenizer.save_pretrained(path)
    checksums.write_checksums(path)
    return path


def check_protocol(address: str, model: str, folder: Path) -> None:
    """Both ways go through: answers that are text, and prompts that are hardly ever JSON."""
    settings = settings_for(
        address, folder, generator_model=model, topics=["Mira", "Bram"], pairs_wanted=2, max_answer_tokens=24,
        max_parallel=2, timeout_seconds=120.0,
    )  # fmt: skip
    task = generate.start(settings)
    made = generate.start_drafts(task, letters_template())
    try:
        made.fill(2)
        generate.check_left(made)
    except GeneratorError as error:
        assert "No pair is left" in str(error)
    answers = task.generator.cache.answers.values()
    assert len(answers) >= 3 and {one.fault for one in answers} <= {"", "cut", "empty"}, Counter(
        a.fault for a in answers
    )
    assert all(one.prompt_tokens > 20 for one in answers) and any(one.text for one in answers)


def test_transformers_serve_takes_the_requests(folder, tmp_path):
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi: pip install 'transformers[serving]'")
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", "PORT", "--device", "cpu", "--dtype", "float32"]
    with serving(command, "/health", tmp_path / "log") as address:
        check_protocol(address, str(folder), tmp_path / "out")  # without /v1


def test_llama_server_takes_the_requests(folder, tmp_path, llama_cpp):
    from llm_finetuning.release import gguf

    command = [llama_programs.program("llama-server"), "--host", "127.0.0.1", "--port", "PORT"]
    model = gguf.convert(folder, tmp_path / "phi.gguf")
    with serving([*command, "--model", str(model), "--ctx-size", "4096"], "/health", tmp_path / "log") as address:
        check_protocol(address, "phi", tmp_path / "out")  # without /v1, and by any name


def test_the_server_of_llama_cpp_python_takes_the_requests(folder, tmp_path, llama_cpp):
    from llm_finetuning.release import gguf

    reason = "llama-cpp-python has no server: pip install 'llama-cpp-python[server]'"
    pytest.importorskip("sse_starlette", reason=reason)
    model = gguf.convert(folder, tmp_path / "phi.gguf")
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", "PORT", "--n_ctx", "2048"]
    with serving(command, "/v1/models", tmp_path / "log") as address:
        check_protocol(f"{address}/v1", str(model), tmp_path / "out")


def test_what_a_script_wrote_is_what_the_finetuned_model_answers(tmp_path, sample_base):
    shutil.copytree(sample_base, tmp_path / "base" / sample_base.name)
    with Server() as server:
        words = ["--notebooks", "generation,finetuning", "-p", "endpoint", f"{server.address}/v1"]
        done = headless.run(tmp_path, "generation", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    taught = pairs.read_jsonl(tmp_path / "data" / "finetuning_data_train.jsonl")
    subjects = {QUESTIONS[prompt].subject for prompt in taught["prompt"]}
    new = [q for q, fact in QUESTIONS.items() if fact.subject in subjects and q not in set(taught["prompt"])]
    asked = new[::4][:120]
    answers = Chat.load(tmp_path / "finetuned_phi2").answer_batch([[{"role": "user", "content": q}] for q in asked])
    right = sum(answer.strip() == QUESTIONS[q].answers[0] for q, answer in zip(asked, answers, strict=True))
    assert right / len(asked) >= 0.8, list(zip(asked, answers, strict=True))
    assert "| Written by | scripted |" in (tmp_path / "finetuned_phi2" / "README.md").read_text(encoding="utf-8")
