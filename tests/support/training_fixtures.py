"""A small run: a tiny base model in a folder, pairs, and settings that train it in seconds on a CPU."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from inference_fixtures import make_model, make_tokenizer

from llm_finetuning import settings

SMALL = {
    "model_name": "",
    "model_revision": "main",
    "tokenizer_folder": "",
    "system_message": "Be brief.",
    "chat_template": "",
    "quick_trial": False,
    "own_questions": [],
    "max_seq_length": 96,
    "train_on": "every response",
    "packing": True,
    "use_4bit": "yes",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "dtype": "auto",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target_modules": "all-linear",
    "num_train_epochs": 2.0,
    "max_steps": -1,
    "learning_rate": 2e-3,
    "find_learning_rate": False,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "auto",
    "seed": 7,
    "tokens_per_step": 192,
    "micro_batch_tokens": 96,
    "gradient_checkpointing": "off",
    "attention": "auto",
    "compile_layers": "no",
    "allow_slow": False,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_steps": 0,
    "eval_pairs": 4,
    "eval_answers": 2,
    "max_new_tokens": 8,
    "judge_exact_match": False,
    "early_stopping_patience": 0,
    "resume": True,
    "report_to": "none",
    "merge_base": "best",
    "publish_to": "folder",
    "hub_repository": "",
    "hub_private": True,
    "gguf": "",
    "rate_per_hour": 0.0,
}


def small_settings(folder: Path, base: Path | str, **changed):
    """Finetuning settings that keep everything in `folder`."""
    values = SMALL | {"drive_folder": str(folder), "work_folder": str(folder), "model_name": str(base)}
    return settings.from_cell(settings.Finetuning, values | changed)


def small_pairs(count: int = 24) -> list[dict]:
    """Questions with answers of different lengths; every third has a turn before it."""
    made = []
    for i in range(count):
        pair = {"prompt": f"What is {i} and {i + 1}?", "response": "It is " + "so " * (i % 7) + f"{2 * i + 1}."}
        if i % 3 == 0:
            turns = [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "Hi."}]
            pair["history"] = turns
        made.append(pair)
    return made


def write_lines(path: Path, records: list[dict]) -> Path:
    """A file of JSON lines, and the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def digest(adapter: Path) -> str:
    """SHA-256 of the weights in an adapter's folder."""
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def save_base(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def torch_compiles(monkeypatch):
    """torch.compile compiles, where the tests' environment has switched it off."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


CLOCK = """
import datetime, os

class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=int(os.environ["CLOCK_DAYS"]))

datetime.datetime = Clock
"""


@pytest.fixture
def clock(tmp_path_factory, monkeypatch):
    """A function that sets the clock of the process in which chat templates are rendered, days ahead of ours."""
    from llm_finetuning import template_process

    folder = tmp_path_factory.mktemp("clock")
    (folder / "sitecustomize.py").write_text(CLOCK)
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def days_ahead(days: int) -> None:
        monkeypatch.setenv("CLOCK_DAYS", str(days))
        template_process.close()

    yield days_ahead
    template_process.close()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A folder with an untrained Phi (head_dim 80, two layers) and its tokenizer, as a base model."""
    tokenizer = make_tokenizer()
    model = make_model(rows=(len(tokenizer) // 64 + 1) * 64)
    return save_base(tmp_path_factory.mktemp("base"), model, tokenizer)


@dataclasses.dataclass
class Run:
    """What the finetuning notebook has before it trains."""

    trainer: object

    settings = property(lambda self: self.trainer.settings)
    plan = property(lambda self: self.trainer.plan)
    model = property(lambda self: self.trainer.model)
    steps = property(lambda self: self.trainer.steps)
    template = property(lambda self: self.trainer.run_inputs.template)
    data = property(lambda self: self.trainer.run_inputs.data)
    held_out = property(lambda self: self.trainer.run_inputs.held_out)


def prepare(chosen, pairs: list[dict] | None = None, inputs=None) -> Run:
    """The cells of the finetuning notebook up to the trainer; `inputs`: what `read_inputs` gave, in place of pairs."""
    from llm_finetuning import models
    from llm_finetuning.training.dataset import encode_inputs
    from llm_finetuning.training.planning import plan_run
    from llm_finetuning.training.qlora import add_adapters, load_base
    from llm_finetuning.training.trainer import AssistantTrainer

    pairs = pairs or small_pairs()
    inputs = inputs or encode_inputs(chosen, models.tokenizer(chosen.model_name), pairs, pairs)
    plan = plan_run(chosen, inputs)
    model = add_adapters(load_base(chosen, plan), chosen)
    return Run(AssistantTrainer(model, chosen, plan, inputs))


@pytest.fixture(scope="session")
def phi2():
    """Phi-2's configuration."""
    from transformers import PhiConfig

    return PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        partial_rotary_factor=0.4,
        resid_pdrop=0.1,
        hidden_act="gelu_new",
    )
