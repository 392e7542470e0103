"""A published folder is read as what a stranger may have made: nothing of it is run, nothing outside it is opened.

What is wrong is said before the model is loaded, in one sentence, whatever a library would have made of it.
"""

import math
import os
import re
from collections.abc import Collection
from pathlib import Path

import transformers

from llm_finetuning import models, prompts
from llm_finetuning.files import checksums
from llm_finetuning.files.shards import Weights
from llm_finetuning.inference.generation import TokenRules


def read(folder: Path) -> tuple[prompts.Template, TokenRules]:
    """Checks a published folder and reads what its answers need besides the weights: template and token rules.

    Raises FileNotFoundError for a missing folder, ValueError for one that is damaged, of another kind, or hostile.
    """
    listed = check_folder(folder)
    config = models.configuration(str(folder))
    check_weights(folder, config, listed)
    tokenizer = load_tokenizer(folder)
    rules = token_rules(folder, tokenizer, config.get_text_config().vocab_size)
    return prompts.template_for(tokenizer), rules


def check_folder(folder: Path) -> dict[str, str]:
    """Compares every file of a published model folder with its checksum; returns {file: SHA-256}.

    Raises FileNotFoundError when the folder is missing, ValueError when it is damaged or of another kind.
    """
    if folder.is_dir() and not (folder / "config.json").is_file():
        what = "an adapter without its base" if (folder / "adapter_config.json").is_file() else "no model folder"
        raise ValueError(
            f"{folder} is {what} (config.json is missing): give the published folder, finetuned_phi2,"
            " that the finetuning notebook writes"
        )
    if folder.is_dir():
        _check_places(folder)
    return checksums.verify_checksums(folder)


def _check_places(folder: Path) -> None:
    """Raises ValueError for what leads out of a folder: links, but for those of the Hub's cache, and an adapter."""
    home = Path(os.path.realpath(folder))  # which takes a link to itself for what it is, where `resolve` raises
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    for path in folder.rglob("*"):
        if not any(Path(os.path.realpath(path)).is_relative_to(place) for place in (home, blobs)):
            raise ValueError(f"{path} is a link out of the folder: give a folder that holds its own files")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds a model and an adapter, which would load another base: remove the adapter")


def check_weights(folder: Path, config: "transformers.PreTrainedConfig", listed: dict[str, str]) -> None:
    """Raises ValueError unless the weights are files of the folder's `SHA256SUMS` and the model's that it describes."""
    if stored := getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} is quantised ({stored!r:.80}): give the published folder, which has 16 bits")
    weights = Weights(folder)
    if unlisted := sorted(set(weights.files.values()) - set(listed)):
        raise ValueError(f"{folder}: its weights are also in {unlisted[0]}, which {checksums.NAME} does not list")
    check_shapes(config, weights)


def check_shapes(config: "transformers.PreTrainedConfig", weights: Weights) -> None:
    """Raises ValueError unless a folder's tensors are those of the model that its configuration describes.

    Known from the files' headers, before anything is allocated. Tensors that transformers joins on loading have other
    names in a checkpoint; there, no more weights may be described than there are. Those of experts may be transposed.
    Where none are joined, a checkpoint with further layers is refused: it would answer without them.
    """
    import torch

    stored = weights.shapes()
    with models.reading(str(weights.folder), "config.json"), torch.device("meta"):
        described = dict(transformers.AutoModelForCausalLM.from_config(config).named_parameters())
    begun = f"{weights.folder}: config.json describes another model than its weights are of: "
    joined, used = 0, set()
    for name, tensor in described.items():
        place = models.stored_name(name, stored, config)
        joined += place is None
        used.add(place)
        shape, found = list(tensor.shape), stored.get(place, list(tensor.shape))
        if found != shape and (len(shape) < 3 or sorted(found) != sorted(shape)):
            raise ValueError(f"{begun}{name} is {shape} there and {found} here")
    count, there = sum(t.numel() for t in described.values()), sum(map(math.prod, stored.values()))
    if joined and count > 1.01 * there:
        raise ValueError(f"{begun}{count:,} weights there and {there:,} here")
    if not joined and (further := _further_layers(stored, used, config)):
        raise ValueError(f"{begun}it has no {further[0]}, which is here: set its number of layers right")


def _further_layers(stored: Collection[str], used: set[str], config: "transformers.PreTrainedConfig") -> list[str]:
    """The tensors that are named like a used one of another layer, but for those that transformers leaves out."""
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    left_out = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or []
    kinds = {re.sub(r"\d+", "", name) for name in used}
    further = [name for name in stored if name not in used and re.sub(r"\d+", "", name) in kinds]
    return [name for name in further if not any(re.search(pattern, name) for pattern in left_out)]


def load_tokenizer(folder: Path) -> "transformers.PreTrainedTokenizerBase":
    """Loads the tokenizer of a published folder. Raises ValueError where it has no chat template."""
    tokenizer = models.read_tokenizer(str(folder))
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder} has no chat template, so the prompt it was trained with is not known:"
            " publish it with the finetuning notebook"
        )
    return tokenizer


def token_rules(folder: Path, tokenizer: "transformers.PreTrainedTokenizerBase", vocab_size: int) -> TokenRules:
    """Reads the token rules from generation_config.json; ids of the vocabulary without a token are suppressed too.

    Raises ValueError for ids that the model does not have, and for rules under which no answer could begin or end.
    """
    file = folder / "generation_config.json"
    with models.reading(str(folder), file.name):
        config = transformers.GenerationConfig.from_pretrained(str(folder))
    stop = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    suppressed = [] if config.suppress_tokens is None else config.suppress_tokens
    if stop in ([None], []):
        raise ValueError(
            f"{file} names no eos_token_id, so no answer could end: publish the folder with the finetuning notebook"
        )
    _check_ids(file, "eos_token_id", stop, vocab_size)
    _check_ids(file, "suppress_tokens", suppressed, vocab_size)
    rules = TokenRules(frozenset(stop), tuple(sorted({*suppressed, *range(len(tokenizer), vocab_size)})))
    if not rules.stop_token_ids.difference(suppressed):
        raise ValueError(f"{file}: suppress_tokens holds every eos_token_id, so no answer could end")
    if len(rules.stop_token_ids.union(rules.suppressed_token_ids)) >= vocab_size:
        raise ValueError(f"{file}: suppress_tokens leaves no token that an answer could be made of")
    return rules


def _check_ids(file: Path, name: str, ids: object, vocab_size: int) -> None:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"{file}: {name} = {ids!r:.80}: token ids of this model are integers from 0 to {vocab_size - 1}"
        )
