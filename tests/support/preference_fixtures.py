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
