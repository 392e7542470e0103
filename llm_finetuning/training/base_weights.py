"""Whether a base's checkpoint is whole and sound, and the merge finds its tensors again, before it is loaded."""

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from llm_finetuning import models
from llm_finetuning.files.shards import Weights
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import experts, on_meta, qlora

WRONG = {
    "missing_keys": "transformers would start {} with random numbers, for the checkpoint does not hold it",
    "unexpected_keys": "the checkpoint holds {}, which the model has not",
    "mismatched_keys": "{} is {} in the checkpoint and {} by config.json",
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
    check_numbers(given, weights)
    check_generation(given, folder)


def check_numbers(given: str, weights: Weights) -> None:
    """Raises ValueError for weights that are not finite. Masks, which old checkpoints hold beside them, may be."""
    if name := _not_finite(weights.folder, models.weight_files(weights.folder)):
        raise ValueError(f"{given}: {name} holds numbers that are not finite: fetch it again, or take another base")


@functools.cache
def _not_finite(folder: Path, _files: tuple) -> str | None:
    """The first tensor of a folder that holds NaN or infinity: gigabytes, read once as long as `_files` stay."""
    names = (name for name, tensor in Weights(folder) if not (_is_mask(name) or torch.isfinite(tensor).all()))
    return next(names, None)


def _is_mask(name: str) -> bool:
    return "mask" in name.rpartition(".")[-1]


def check_generation(given: str, folder: Path) -> None:
    """Raises ValueError for a generation_config.json that transformers cannot take; it passes over one that is cut off.

    It reads that file whenever it loads the model.
    """
    try:
        transformers.GenerationConfig.from_pretrained(folder)
    except OSError:
        return
    except Exception as error:  # of whatever kind its checks raise
        raise ValueError(
            f"{given}: its generation_config.json cannot be read ({type(error).__name__}: {error}): correct"
            " or delete it"
        ) from error


def not_found(
    settings: Finetuning, config: PretrainedConfig, stored: dict[str, list[int]]
) -> tuple[list[str], list[str]]:
    """(weights that are quantised or adapted, those of them that the merge would not find in the checkpoint)."""
    model = on_meta.build_on_meta(config, torch.bfloat16)
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
            trust_remote_code=False,
        )
    found = [words.format(*_first(info[kind])) for kind, words in WRONG.items() if info.get(kind)]
    return "; ".join(found) or None


def _first(found: Iterable[str | tuple]) -> list:
    """A tensor's name, and its shapes where they are told: in the checkpoint, in the model."""
    name, *shapes = min((entry,) if isinstance(entry, str) else entry for entry in found)
    return [name, *map(list, shapes)]
