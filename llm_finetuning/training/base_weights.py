"""Whether a base's checkpoint is whole, and the merge finds its tensors again: known from the headers of its files."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from llm_finetuning import models
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import experts, model_size, qlora

WRONG = {
    "missing_keys": "transformers would start {} with random numbers, for the checkpoint does not hold it",
    "unexpected_keys": "the checkpoint holds {}, which the model has not",
    "mismatched_keys": "{} has another shape in the checkpoint",
}
"""What transformers tells of loading a checkpoint, and what it means."""


def check_weights(settings: Finetuning, config: PretrainedConfig, folder: Path) -> None:
    """Raises ValueError unless transformers loads a checkpoint whole, and the merge finds all that is trained on.

    Raises FileNotFoundError for a checkpoint that is not safetensors.
    """
    given = f"model_name = {settings.model_name!r}"
    weights = models.weights_of(folder, given)
    stored = weights.shapes()
    names, missing = not_found(settings, config, stored)
    if missing:
        kinds = "linear layers" + " and experts" * settings.adapts_experts
        raise ValueError(
            f"{given}: {len(missing)} of {len(names)} weights of {kinds} are not in its checkpoint under their own name"
            f" ({missing[0]}, …): transformers renames or joins them on loading, and the adapter could not be merged."
            " Set model_name to another base"
        )
    if wrong := misread(config, stored):
        raise ValueError(
            f"{given}: config.json and weights are not of one model, or the download is not whole: {wrong}. Fetch it"
            " again, or set model_name to another base"
        )


def not_found(
    settings: Finetuning, config: PretrainedConfig, stored: dict[str, list[int]]
) -> tuple[list[str], list[str]]:
    """(weights that are quantised or adapted, those of them that the merge would not find in the checkpoint)."""
    model = model_size.build_on_meta(config, torch.bfloat16)
    modules = qlora.linear_modules(model) if settings.use_4bit == "yes" else qlora.adapted_modules(model, settings)
    names = [f"{name}.weight" for name in modules]
    missing = [name for name in names if models.stored_name(name, stored, config) is None]
    if settings.adapts_experts:
        names += experts.names(model)
        missing += experts.not_stored(model, stored)
    return names, missing


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps transformers' progress bar and its report of what is missing from the notebook."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def misread(config: PretrainedConfig, stored: dict[str, list[int]]) -> str | None:
    """What transformers would find wrong with a checkpoint of tensors of these shapes; None where it is whole.

    It loads tensors without memory behind them, so its own renaming and joining is what counts.
    """
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in stored.items()}
    with _silent():
        _, info = model_class.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=tensors,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    found = [words.format(min(map(str, info[kind]))) for kind, words in WRONG.items() if info.get(kind)]
    return "; ".join(found) or None
