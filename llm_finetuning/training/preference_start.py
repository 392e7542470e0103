"""Where preference tuning starts: the adapter that the finetuning trained, on the base that it was trained on."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file

from llm_finetuning import models
from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import read_json
from llm_finetuning.prompts import Template
from llm_finetuning.settings import PreferenceTuning
from llm_finetuning.settings.folders import Folders
from llm_finetuning.training import checkpoints, qlora

if TYPE_CHECKING:
    from peft import PeftModel

    from llm_finetuning.training.planning import Plan

WEIGHTS = "adapter_model.safetensors"
NOT_PLAIN = ("use_dora", "layers_to_transform", "target_parameters")
"""Entries of an adapter's configuration that cannot be trained further here.

Of an adapter of experts (`target_parameters`) TRL makes no copy for the reference, which would be another model.
"""
QUANTISATION = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_CURE = "set model_name to its base, or adapter_folder to another adapter"


def from_adapter(settings: PreferenceTuning) -> PreferenceTuning:
    """The settings with what the finetuned adapter decides: its folder, ranks, modules and quantisation.

    Raises FileNotFoundError where there is no adapter, ValueError for one that is damaged or no plain LoRA, or that
    belongs to another base.
    """
    folder = adapter_folder(settings)
    config = _lora_config(folder / "adapter_config.json")
    if (folder / checksums.NAME).is_file():
        checksums.verify_checksums(folder)
    _check_weights(folder / WEIGHTS, config["r"])
    trained, run = read_json(folder / "settings.json"), read_json(folder / checkpoints.RUN_FILE)
    targets = config["target_modules"]
    decided = {name: trained[name] for name in QUANTISATION if name in trained} | {
        "lora_r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "use_4bit": run.get("use_4bit", trained.get("use_4bit", "yes")),
        "lora_target_modules": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        "lora_dropout": 0.0,  # both models of a comparison are the same but for what is learned
    }
    _check_base(settings, folder, trained.get("model_name") or config.get("base_model_name_or_path"), run)
    return dataclasses.replace(settings, adapter_folder=str(folder), **decided)


def _lora_config(file: Path) -> dict:
    """The configuration of a plain LoRA adapter. Raises ValueError for one that is something else."""
    try:
        config = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): save the adapter again") from None
    special = [name for name in NOT_PLAIN if config.get(name)] + qlora.beyond_lora(config)
    if config.get("peft_type") != "LORA" or special:
        found = ", ".join(special) or f"peft_type {config.get('peft_type')}"
        raise ValueError(f"{file} has {found}: plain LoRA is what can be trained further here")
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if not config.get(name)]:
        raise ValueError(f"{file} lacks {', '.join(missing)}: save the adapter again")
    return config


def _check_weights(file: Path, rank: int) -> None:
    """Raises ValueError unless the tensors of an adapter can be read, have its rank and are finite."""
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}: save the adapter again, as safetensors")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy or save the adapter again") from None
    for name, tensor in tensors.items():
        found = tensor.shape[name.endswith("lora_B.weight")] if ".lora_" in name else rank
        if found != rank:
            raise ValueError(f"{name} in {file} has rank {found}, and adapter_config.json says r = {rank}: {_CURE}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {file} holds values that are not finite: set adapter_folder to another one")


def adapter_folder(settings: PreferenceTuning) -> Path:
    """The folder of the adapter to start from. Raises FileNotFoundError with what cures it."""
    finetuned = Folders(settings.folders.drive, settings.folders.work)
    named = Path(settings.adapter_folder)
    places = [named] if settings.adapter_folder else [finetuned.adapter, finetuned.published_adapter]
    for place in places:
        if (place / "adapter_config.json").is_file():
            return place
    raise FileNotFoundError(
        f"{places[-1]} holds no adapter (adapter_config.json): run the finetuning notebook first, with the same"
        " drive_folder, or set adapter_folder to the adapter to start from"
    )


def _check_base(settings: PreferenceTuning, folder: Path, trained_on: str | None, run: dict) -> None:
    """Raises ValueError unless the adapter was trained on `model_name`; a folder is told by its weights."""
    if not trained_on or trained_on == settings.model_name:
        return
    here = Path(settings.model_name)
    if not (here.is_dir() and run.get("base") and models.fingerprint(here) == run["base"]):
        raise ValueError(
            f"{folder} is an adapter of {trained_on}, and model_name = {settings.model_name!r}: set model_name to the"
            " base that it was trained on, or adapter_folder to another adapter"
        )


def check_template(settings: PreferenceTuning, template: Template) -> None:
    """Raises ValueError unless the adapter was trained with this tokenizer and chat template."""
    folder = Path(settings.adapter_folder)
    if not (folder / "tokenizer_config.json").is_file():
        return
    before, now = models.read_tokenizer(str(folder)), template.tokenizer
    if before.get_vocab() != now.get_vocab():
        raise ValueError(f"{folder} was trained with another tokenizer than that of {settings.model_name}: {_CURE}")
    if before.chat_template != now.chat_template:
        system = read_json(folder / "settings.json").get("system_message", settings.system_message)
        differs = f" (system_message = {system!r})" if system != settings.system_message else ""
        raise ValueError(
            f"{folder} was trained with another chat template or system message{differs}: set system_message and"
            " chat_template as in the finetuning notebook, or adapter_folder to another adapter"
        )


def load_base_with_adapter(settings: PreferenceTuning, plan: "Plan") -> "PeftModel":
    """Loads the base and puts the finetuned adapter on it, to be trained further.

    Raises ValueError for an adapter of another base, before the base is loaded.
    """
    run = read_json(Path(settings.adapter_folder) / checkpoints.RUN_FILE)
    if run.get("base") and run["base"] != models.fingerprint(plan.model_path):
        raise ValueError(
            f"{settings.adapter_folder} was trained on other weights than those of {settings.model_name} in"
            f" {plan.model_path}: {_CURE}"
        )
    model = qlora.add_adapters(qlora.load_base(settings, plan), settings)
    qlora.set_adapter(model, Path(settings.adapter_folder))
    return model
