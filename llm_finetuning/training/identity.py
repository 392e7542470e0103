"""What tells one run from another: only a run of the same identity goes on from its checkpoints."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llm_finetuning import models
from llm_finetuning.settings import Finetuning
from llm_finetuning.training.arguments import warmup_steps
from llm_finetuning.training.dataset import RunInputs

if TYPE_CHECKING:
    from llm_finetuning.training.planning import Plan

SAME_RUN = (
    "model_name",
    "system_message",
    "max_seq_length",
    "train_on",
    "packing",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "use_dora",
    "init_lora_weights",
    "lora_target_modules",
    "learning_rate",
    "loraplus_lr_ratio",
    "neftune_noise_alpha",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "tokens_per_step",
)
"""Settings that two runs must share for one to resume the checkpoints of the other."""


def identity(settings: Finetuning, plan: "Plan", inputs: RunInputs, steps: int) -> dict:
    """What two runs must share for one to resume the other's checkpoints; written to run.json in each of them."""
    names, tokenizer = list(SAME_RUN), inputs.template.tokenizer
    if settings.lr_scheduler_type not in ("constant", "constant_with_warmup"):
        names += ["num_train_epochs", "max_steps"]
    return {
        **{name: getattr(settings, name) for name in names},
        "use_4bit": plan.four_bit,
        "warmup_steps": warmup_steps(settings, steps),
        "dtype": str(plan.dtype),
        "optimizer": plan.optimizer,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "base": models.fingerprint(plan.model_path) if plan.model_path else None,
        "tokenizer": digest([json.dumps(tokenizer.get_vocab(), sort_keys=True)]),
        "chat_template": digest([tokenizer.chat_template]),
        "rows": len(inputs.data.examples),
        "rows_sha256": digest(json.dumps([row["input_ids"], row["labels"]]) for row in inputs.data.examples),
        "held_out": digest(json.dumps(example["input_ids"]) for example in inputs.held_out),
    }


def digest(texts: Iterable[str]) -> str:
    """One SHA-256 of the texts, in hexadecimal."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def known_when_planned(settings: Finetuning, plan: "Plan", inputs: RunInputs) -> dict:
    """The part of a run's identity that the plan decides: the trainer counts its steps, and a search sets its rate."""
    later = ["warmup_steps", "held_out", *["learning_rate"] * settings.find_learning_rate]
    return {name: value for name, value in identity(settings, plan, inputs, plan.steps).items() if name not in later}
