"""A small preference run: a finetuned adapter of the tiny base, and pairs of which one response is preferred."""

import dataclasses
from pathlib import Path

import pytest
import torch
from training_fixtures import SMALL, Run, prepare, small_pairs, small_settings, write_lines

from llm_finetuning import models, settings
from llm_finetuning.training import qlora

CHANGED = {"max_seq_length": 96, "micro_batch_tokens": 192, "dtype": "float32", "learning_rate": 1e-3}
CHANGED |= {"pairs_per_step": 4, "num_train_epochs": 1.0, "eval_steps": 0, "lr_scheduler_type": "constant"}

SIDES = ("chosen", "rejected")
BETA = 0.5


def preference_settings(folder: Path, base: Path | str, **changed):
    """Preference settings that keep everything in `folder`, where the finetuned adapter lies."""
    names = {field.name for field in dataclasses.fields(settings.PreferenceTuning)}
    names -= {*settings.PreferenceTuning.without_line}
    values = {name: value for name, value in SMALL.items() if name in names} | CHANGED
    places = {"drive_folder": str(folder), "work_folder": str(folder), "model_name": str(base)}
    return settings.PreferenceTuning(**values | places | changed)


def small_preferences(count: int = 14, first: int = 0) -> list[dict]:
    """Questions with a good and a bad response of different lengths; every third has a turn before it."""
    records = []
    for number, pair in enumerate(small_pairs(first + count)[first:], first):
        worse = "No " + "no " * (number % 4) + f"{number}."
        records.append({"prompt": pair["prompt"], "history": pair.get("history", []), "chosen": pair["response"],
                        "rejected": worse})  # fmt: skip
    return records


def finetuned_folder(folder: Path, base: Path) -> Path:
    """A folder as the finetuning leaves it: data, and an adapter whose weights are not where they began."""
    from llm_finetuning.training.resumable import save_adapter

    small = prepare(small_settings(folder, base, lora_dropout=0.0, dtype="float32"))
    generator = torch.Generator().manual_seed(3)
    for parameter in small.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.03, generator=generator)
    save_adapter(small.trainer)
    folders = small.settings.folders
    write_lines(folders.train_preferences, small_preferences())
    write_lines(folders.val_preferences, small_preferences(6, 30))
    write_lines(folders.val_file, small_pairs(46)[40:])
    return folder


@pytest.fixture(scope="session")
def finetuned(tiny_base, tmp_path_factory) -> Path:
    """A finished small finetuning, to copy or to read."""
    return finetuned_folder(tmp_path_factory.mktemp("finetuned"), tiny_base)


def prepare_preference(chosen, inputs=None) -> Run:
    """The cells of the preference tuning notebook up to the trainer."""
    from llm_finetuning.training import preference_start
    from llm_finetuning.training.planning import plan_run
    from llm_finetuning.training.preference import PreferenceTrainer
    from llm_finetuning.training.preference_data import read_inputs

    chosen = preference_start.from_adapter(chosen)
    inputs = inputs or read_inputs(chosen)
    preference_start.check_template(chosen, inputs.template)
    plan = plan_run(chosen, inputs)
    return Run(PreferenceTrainer(preference_start.load_base_with_adapter(chosen, plan), chosen, plan, inputs))


def plain_model(base: Path, adapter: Path) -> torch.nn.Module:
    """The 4-bit base with the adapter in float32, as transformers and PEFT load them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    four_bit = models.four_bit(torch.float32, "nf4", True, None)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=four_bit,
                                                  attn_implementation="eager")  # fmt: skip
    return PeftModel.from_pretrained(qlora.prepare_cpu_kernels(loaded), adapter)


def beside(finetuned: Path, folder: Path, base: Path, **changed):
    """Settings of a run in `folder` on the data and the adapter of a finished finetuning."""
    (folder / "data").symlink_to(finetuned / "data")
    return preference_settings(folder, base, adapter_folder=str(finetuned / "adapter"), **changed)


def plain_logps(model: torch.nn.Module, example: dict) -> torch.Tensor:
    """Log-probabilities of the tokens of a response, by one forward pass without a batch or padding."""
    ids = torch.tensor([example["input_ids"]])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    asked = sum(label == -100 for label in example["labels"])
    return logits.log_softmax(-1)[range(len(logits)), ids[0, 1:]][asked - 1 :]


def plain_loss(name: str, ours: list, reference: list, smoothing: float, alpha: float) -> torch.Tensor:
    """The loss of one pair by its paper. ours, reference: log-probabilities of the tokens, (chosen, rejected)."""
    shared = min(len(ours[0]), len(ours[1]))
    weights = [torch.where(torch.arange(len(side)) < shared, 1.0, alpha) for side in ours]
    ratios = [((a - b) * w).sum() for a, b, w in zip(ours, reference, weights, strict=True)]
    log_sigmoid = torch.nn.functional.logsigmoid
    delta = ratios[0] - ratios[1]
    mean_delta = ratios[0] / len(ours[0]) - ratios[1] / len(ours[1])
    if name == "robust":  # arXiv 2403.00409, equation 11
        found = (1 - smoothing) * -log_sigmoid(BETA * delta) + smoothing * log_sigmoid(-BETA * delta)
        return found / (1 - 2 * smoothing)
    if name == "ipo":  # arXiv 2310.12036, equation 17
        return (mean_delta - 1 / (2 * BETA)) ** 2
    return -log_sigmoid(BETA * (mean_delta if name == "sigmoid_norm" else delta))  # arXiv 2305.18290, equation 7
