"""The base model behind a name, a hub id, a local folder or one that is made on the spot, and how models are loaded.

"sample" is the tiny Phi of the embedded default; "rehearsal" is Phi-2's true configuration with random
weights, which proves that a machine can hold the real job. Code from a model repository is never run:
`trust_remote_code` stays off, transformers has Phi's own.
"""

import functools
import json
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import transformers  # lazy: torch comes with what is used of it
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import HFValidationError, validate_repo_id

from llm_finetuning import template_process
from llm_finetuning.files import checksums
from llm_finetuning.files.shards import Weights
from llm_finetuning.sample import making, phi

if TYPE_CHECKING:
    import torch

SAMPLE, REHEARSAL = "sample", "rehearsal"
NOT_REACHED = (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled)
NOT_FOUND = (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError)  # a gated one is such a one
MODEL_FILES = ("*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model")
LARGEST = {
    "layers?$": 300,
    "heads?$|experts?$|labels$|groups?$": 100_000,
    "size$|dim$|embd$|inner$": 2**22,
    "positions$|position_embeddings$|_ctx$": 2**25,
}
"""By the end of its name, the largest size in a configuration that is built: the largest known model has 126 layers."""
MOST_GROWTH = 1000
"""Letters that a tokenizer may make of one; SentencePiece's make three bytes of a blank."""
AT_LEAST_ONE = re.compile(
    "(num_hidden_layers|n_layers?|hidden_size|n_embd|d_model|num_attention_heads|n_heads?|vocab_size"
    "|max_position_embeddings|n_positions)$"
)
"""Sizes without which there is no model; others may be 0, or -1 for none."""


def tokenizer(
    model_name: str, tokenizer_folder: str = "", revision: str = "main"
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer that `model_name` is used with; the one in `tokenizer_folder`, if given.

    revision: branch, tag or commit of a hub id.
    Raises FileNotFoundError for a folder that is not there, ValueError for one without a tokenizer, and what
    `asking_the_hub` raises.
    """
    if tokenizer_folder:
        return read_tokenizer(_tokenizer_folder(tokenizer_folder))
    if model_name in (SAMPLE, REHEARSAL):
        template_process.start()
        return deepcopy(_sample_tokenizer())  # callers set chat templates on it
    return read_tokenizer(_hub_id_or_folder(model_name), revision)


def read_tokenizer(name: str, revision: str = "main") -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of a hub id or a folder. Raises ValueError for a folder whose files are not those of one."""
    if (Path(name) / "config.json").is_file():
        _check_sizes(name, revision)  # transformers reads it for a tokenizer too
    _check_growth(Path(name) / "tokenizer.json")
    template_process.start()  # its template is rendered next
    with asking_the_hub("model_name", name), reading(name, "tokenizer"):
        loaded = transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        loaded("a b")  # some that are wrong can be loaded, and not used
    if not isinstance(loaded.chat_template, str | dict | None):
        raise ValueError(f"{name}: the chat template of its tokenizer is no text, but {loaded.chat_template!r:.80}")
    return loaded


def _check_growth(file: Path) -> None:
    """Raises ValueError for a tokenizer.json that makes a text much longer, step by step: it would fill the memory."""
    if not file.is_file():
        return
    with reading(str(file.parent), "tokenizer"):
        written = json.loads(file.read_bytes())
        factor = math.prod(max(1, len(text)) for text in _inserted([written.get("normalizer"), written.get("decoder")]))
    if factor > MOST_GROWTH:
        raise ValueError(f"{file} replaces a letter by up to {factor:,}: fetch the folder again, or take another")


def _inserted(written: object) -> Iterator[str]:
    """The texts that the steps of a normalizer or decoder put in."""
    if isinstance(written, list):
        for part in written:
            yield from _inserted(part)
    elif isinstance(written, dict):
        yield from (written[key] for key in ("content", "prepend") if isinstance(written.get(key), str))
        yield from _inserted([part for part in written.values() if isinstance(part, list | dict)])


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Makes one ValueError of whatever a library raises for the files of a folder; an OSError of a hub id stays."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of tokenizers: no Exception, and not to be imported
        if not (panic or isinstance(error, Exception)) or (isinstance(error, OSError) and not Path(name).is_dir()):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: its {what} cannot be read ({type(error).__name__}: {reason}): fetch the folder again, or take"
            " another"
        ) from error


def _tokenizer_folder(folder: str) -> str:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"tokenizer_folder {folder} is no folder: give one that holds a tokenizer.json, or ''")
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ValueError(f"tokenizer_folder {folder} holds no tokenizer: no tokenizer.json, no vocab.json")
    return folder


@lru_cache
def _sample_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    return phi.train_tokenizer(phi.Recipe())


def configuration(model_name: str, revision: str = "main") -> "transformers.PreTrainedConfig":
    """The configuration of a hub id or a model folder, without its weights. Raises what `locate` raises.

    Which kernels compute is not left to the folder: attention by a name of the Hub is code that would be fetched.
    Raises ValueError for sizes that no model has (`LARGEST`): some are allocated when a configuration is read.
    """
    name = _hub_id_or_folder(model_name)
    _check_sizes(name, revision)
    with reading(name, "config.json"):
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        config._attn_implementation = config._experts_implementation = None
    return config


def _check_sizes(name: str, revision: str) -> None:
    """Raises ValueError for sizes that no model has, before transformers makes anything of the configuration."""
    with asking_the_hub("model_name", name), reading(name, "config.json"):
        entries, _ = transformers.PreTrainedConfig.get_config_dict(name, revision=revision)
        absurd = list(_absurd_sizes(entries))
    if absurd:
        raise ValueError(f"{name}: config.json has sizes that no model has: {', '.join(absurd)}")


def _absurd_sizes(entries: dict) -> Iterator[str]:
    """ "name = value" of each size above `LARGEST`, below one, or that is no number; in nested configurations too."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _absurd_sizes(value)
        elif isinstance(value, int | float):
            too_large = any(re.search(end, name) and value > most for end, most in LARGEST.items())
            if too_large or (AT_LEAST_ONE.match(name) and value < 1) or math.isnan(value):
                yield f"{name} = {value:g}"


def locate(model_name: str, folder: str | Path, tokenizer_folder: str = "", revision: str = "main") -> Path:
    """The local folder of the base `model_name`: its configuration, tokenizer and safetensors.

    "sample" and "rehearsal" are made in `folder`/<name>, atomically, unless they are there already; a hub
    id is fetched at `revision` (see `fetch`), a local model folder looked into.
    Raises FileNotFoundError for a path that is not there, ValueError for a folder that holds no model,
    OSError where the disk is too small.
    """
    if model_name == SAMPLE:
        if tokenizer_folder:
            raise ValueError("the sample's base has its own tokenizer: set tokenizer_folder = ''")
        return making.make_sample(Path(folder) / SAMPLE)
    if model_name == REHEARSAL:
        from llm_finetuning.sample.rehearsal import make_rehearsal

        return make_rehearsal(Path(folder) / REHEARSAL, tokenizer(REHEARSAL, tokenizer_folder))
    found = _hub_id_or_folder(model_name)
    return Path(found) if Path(found).is_dir() else fetch(found, revision)


def fetch(hub_id: str, revision: str = "main") -> Path:
    """The snapshot folder of a model on the Hub, downloaded unless it is in the cache; named by its commit.

    Only what a safetensors model consists of: no pickles, no code, no second copy of the weights.
    """
    with asking_the_hub("model_name", hub_id):
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(MODEL_FILES)))


@contextmanager
def asking_the_hub(parameter: str, hub_id: str) -> Iterator[None]:
    """Makes one sentence of what the Hub's libraries raise, through whatever layers, for a `hub_id` they cannot fetch.

    Raises ConnectionError where it is not on this machine and the Hub is not reached, FileNotFoundError where the Hub
    does not have it for this user.
    """
    try:
        yield
    except Exception as error:
        given, cause = f"{parameter} = {hub_id!r}", error
        while cause and not isinstance(cause, NOT_REACHED + NOT_FOUND):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, NOT_FOUND):
            raise FileNotFoundError(
                f"{given} is not on the Hub under that name or revision, or not for you: correct it, or accept its"
                " conditions there and set the token HF_TOKEN"
            ) from error
        if cause:
            raise ConnectionError(
                f"{given} is not on this machine, and the Hub cannot be reached: connect to the network (and unset"
                f" HF_HUB_OFFLINE), or set {parameter} to a folder of this machine or to 'sample'"
            ) from error
        raise


def commit_of(model_path: Path) -> str | None:
    """The commit of a base from the Hub; None for a folder that is no snapshot of it."""
    return model_path.name if model_path.parent.name == "snapshots" else None


def fingerprint(model_path: Path) -> str:
    """What tells a base's weights from others: its commit on the Hub, or one SHA-256 of its weight files."""
    return commit_of(model_path) or _hash_of(weight_files(model_path))


def weight_files(model_path: Path) -> tuple[tuple[Path, int, int], ...]:
    """(weight file, its size, time of its change) each: what was read of them holds as long as these stay the same."""
    return tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(model_path.glob("*.safetensors")))


@functools.cache
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """One SHA-256 of `weight_files`: gigabytes, read once."""
    return checksums.hash_together([file for file, _, _ in files])


def _hub_id_or_folder(model_name: str) -> str:
    path = Path(model_name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"model_name {model_name} is a folder without a config.json: give a folder that holds a model"
            )
        return str(path)
    if path.exists():
        raise ValueError(f"model_name {model_name} is a file: give the folder that holds the model")
    if path.is_absolute() or model_name.startswith((".", "~")) or not is_hub_id(model_name):
        raise FileNotFoundError(
            f"model_name {model_name} is not there: give a folder with a model, a hub id (owner/name),"
            f" {SAMPLE} or {REHEARSAL}"
        )
    return model_name


def is_hub_id(name: str) -> bool:
    """Whether a model on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def weights_of(folder: Path, given: str) -> Weights:
    """The safetensors of a model folder; no tensor is read. `given`: what named it, for errors.

    Raises FileNotFoundError for pickled weights and for a file that is missing, ValueError for one that is damaged.
    """
    try:
        weights = Weights(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{given}: {error}. Pickled weights (pytorch_model.bin) are never opened: choose another base or revision,"
            " or convert it (https://huggingface.co/spaces/safetensors/convert)"
        ) from None
    weights.shapes()
    return weights


def one_kernel_gelu(config: "transformers.PreTrainedConfig") -> "transformers.PreTrainedConfig":
    """The configuration with `gelu_new` replaced by the same function in one kernel instead of eight.

    Both are 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))) (transformers.activations).
    """
    if getattr(config, "hidden_act", None) == "gelu_new":
        config.hidden_act = "gelu_pytorch_tanh"
    return config


def four_bit(
    dtype: "torch.dtype",
    quant_type: str = "nf4",
    double_quant: bool = True,
    storage: "torch.dtype | None" = None,
) -> "transformers.BitsAndBytesConfig":
    """The 4-bit configuration (arXiv 2305.14314): NF4 with its constants quantised again, computed in `dtype`.

    storage: the dtype under whose name the packed weights are stored; None = uint8.
    """
    import torch

    from llm_finetuning import bitsandbytes_cpu

    bitsandbytes_cpu.mend()
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage or torch.uint8,
    )


def padded_attention(config: "transformers.PreTrainedConfig") -> str:
    """The attention for padded batches and generation: "sdpa", or "eager" for a model that it cannot serve.

    sdpa has no soft-capping, which earlier versions of transformers leave out in silence.
    """
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) and not capped else "eager"


def load_strict(folder: Path, dtype: "torch.dtype", device: str) -> "transformers.PreTrainedModel":
    """A model folder through plain transformers. Raises ValueError for a missing or unexpected key."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=configuration(str(folder)),
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    problems = {kind: keys for kind, keys in info.items() if keys}
    if problems:
        raise ValueError(f"{folder} does not load as its own model: {problems}")
    return model.eval()


def stored_name(name: str, stored: Collection[str], config: "transformers.PreTrainedConfig") -> str | None:
    """The name under which a checkpoint with the tensors `stored` holds the model's `name`; None where it does not.

    Checkpoints that were saved without the head leave out the prefix of the model inside, such as `model.`.
    """
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    short = name.removeprefix(f"{getattr(model_class, 'base_model_prefix', '')}.")
    return next((candidate for candidate in (name, short) if candidate in stored), None)


def count_parameters(config: "transformers.PreTrainedConfig") -> int:
    """Parameters of the model of a configuration, without making it."""
    import torch

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).num_parameters()
