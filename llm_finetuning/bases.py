"""The base model behind a name: a hub id, a local folder, or one that is made on the spot.

"sample" is the tiny Phi of the embedded default; "rehearsal" is Phi-2's true configuration with random
weights, which proves that a machine can hold the real job. Code from a model repository is never run:
`trust_remote_code` stays off, transformers has Phi's own.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

SAMPLE, REHEARSAL = "sample", "rehearsal"
RECIPE_FILE = "recipe.json"
SHARD_BYTES = 10**9  # memory holds one shard while it is written
REHEARSAL_SEED = 20
MODEL_FILES = ("*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model")


def tokenizer(model_name: str, tokenizer_folder: str = "", revision: str = "main"):
    """The tokenizer that `model_name` is used with; the one in `tokenizer_folder`, if given.

    revision: branch, tag or commit of a hub id.
    Raises FileNotFoundError for a folder that is not there, ValueError for one without a tokenizer.
    """
    from transformers import AutoTokenizer

    if tokenizer_folder:
        return AutoTokenizer.from_pretrained(_tokenizer_folder(tokenizer_folder))
    if model_name in (SAMPLE, REHEARSAL):
        return _sample_tokenizer()
    return AutoTokenizer.from_pretrained(_hub_id_or_folder(model_name), revision=revision)


def _tokenizer_folder(folder: str) -> str:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"tokenizer_folder {folder} is no folder: give one that holds a tokenizer.json, or ''")
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ValueError(f"tokenizer_folder {folder} holds no tokenizer: no tokenizer.json, no vocab.json")
    return folder


def _sample_tokenizer():
    from transformers import PreTrainedTokenizerFast

    from llm_finetuning.sample import phi

    with tempfile.TemporaryDirectory() as folder:  # a copy of its own: callers set chat templates on it
        for name, content in _sample_tokenizer_files(phi.Recipe()).items():
            (Path(folder) / name).write_bytes(content)
        return PreTrainedTokenizerFast.from_pretrained(folder)


@lru_cache
def _sample_tokenizer_files(recipe) -> dict[str, bytes]:
    from llm_finetuning.sample import phi

    with tempfile.TemporaryDirectory() as folder:
        phi.train_tokenizer(recipe).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def locate(model_name: str, folder: str | Path, tokenizer_folder: str = "", revision: str = "main") -> Path:
    """The local folder of the base `model_name`: its configuration, tokenizer and safetensors.

    "sample" and "rehearsal" are made in `folder`/<name> unless they are there already, whole or not at all; a hub
    id is fetched at `revision` (see `fetch`), a local model folder looked into.
    Raises FileNotFoundError for a path that is not there, ValueError for a folder that holds no model,
    OSError where the disk is too small.
    """
    if model_name == SAMPLE:
        if tokenizer_folder:
            raise ValueError("the sample's base has its own tokenizer: set tokenizer_folder = ''")
        return make_sample(Path(folder) / SAMPLE)
    if model_name == REHEARSAL:
        return make_rehearsal(Path(folder) / REHEARSAL, tokenizer_folder)
    found = _hub_id_or_folder(model_name)
    return Path(found) if Path(found).is_dir() else fetch(found, revision)


def fetch(hub_id: str, revision: str = "main") -> Path:
    """The snapshot folder of a model on the Hub, downloaded unless it is in the cache; named by its commit.

    Only what a safetensors model consists of: no pickles, no code, no second copy of the weights.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(MODEL_FILES)))


def commit_of(model_path: Path) -> str | None:
    """The commit of a base from the Hub; None for a folder that is no snapshot of it."""
    return model_path.name if model_path.parent.name == "snapshots" else None


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
    if path.is_absolute() or model_name.startswith((".", "~")) or model_name.count("/") > 1:
        raise FileNotFoundError(
            f"model_name {model_name} is not there: give a folder with a model, a hub id (owner/name),"
            f" {SAMPLE} or {REHEARSAL}"
        )
    return model_name


def make_sample(target: Path, recipe=None) -> Path:
    """The tiny Phi in `target`, made there (about a minute) unless it is there by the same recipe."""
    from llm_finetuning.sample import phi

    recipe = recipe or phi.Recipe()
    mark = {"recipe": recipe.fingerprint()}
    if not _is_made(target, mark):
        _check_disk(target, 50 * 10**6)
        with _whole_or_not_at_all(target, mark) as building:
            bpe = phi.train_tokenizer(recipe)
            phi.pretrain(recipe, bpe).save_pretrained(building)
            bpe.save_pretrained(building)
    return target


def make_rehearsal(target: Path, tokenizer_folder: str = "", config=None) -> Path:
    """Phi-2's true configuration with random weights in bf16 (5.6 GB) in `target`, unless it is there.

    Written shard by shard: memory holds one shard, never the model. `config` replaces Phi-2's (in tests).
    """
    bpe = tokenizer(REHEARSAL, tokenizer_folder)
    config = config or phi2_config(bpe)
    if len(bpe) > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} has {len(bpe)} tokens, Phi-2 only {config.vocab_size} rows"
        )
    settings = config.to_json_string() + bpe.backend_tokenizer.to_str() + str(REHEARSAL_SEED)
    mark = {"recipe": hashlib.sha256(settings.encode()).hexdigest()}
    if not _is_made(target, mark):
        shapes = weight_shapes(config)
        _check_disk(target, sum(2 * _size(shape) for shape in shapes.values()) + 50 * 10**6)
        with _whole_or_not_at_all(target, mark) as building:
            config.save_pretrained(building)
            bpe.save_pretrained(building)
            _write_shards(building, shapes, config.initializer_range)
    return target


def phi2_config(bpe):
    """microsoft/phi-2's published configuration: 2,779,683,840 parameters."""
    from transformers import PhiConfig

    return PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        partial_rotary_factor=0.4,
        resid_pdrop=0.1,
        hidden_act="gelu_new",
        initializer_range=0.02,
        bos_token_id=bpe.bos_token_id,
        eos_token_id=bpe.eos_token_id,
        architectures=["PhiForCausalLM"],
        dtype="bfloat16",
    )


def weight_shapes(config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, without allocating one."""
    import torch
    from transformers import PhiForCausalLM

    with torch.device("meta"):
        model = PhiForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Parameter names in groups of at most SHARD_BYTES in bf16."""
    groups, filled = [[]], 0
    for name, shape in shapes.items():
        if filled + 2 * _size(shape) > SHARD_BYTES and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += 2 * _size(shape)
    return groups


def _write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], std: float) -> None:
    import torch
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    chance = torch.Generator().manual_seed(REHEARSAL_SEED)
    groups, index = _shards(shapes), {}
    with tqdm(total=len(shapes), desc="Making Phi-2 with random weights", unit="tensor") as bar:
        for number, names in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            shard = {}
            for name in names:
                shard[name] = _random_weight(name, shapes[name], std, chance)
                bar.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
    total = sum(2 * _size(shape) for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _random_weight(name: str, shape: tuple[int, ...], std: float, chance):
    """As transformers starts Phi: biases 0, norms 1, everything else normal with `std`. bf16."""
    import torch

    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if "layernorm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(std=std, generator=chance).to(torch.bfloat16)


def _is_made(target: Path, mark: dict) -> bool:
    file = target / RECIPE_FILE
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == mark


def _check_disk(target: Path, needed: int) -> None:
    """Raises OSError when fewer than `needed` bytes are free where `target` will lie."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(
            f"{target} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: make room or choose another folder"
        )


@contextmanager
def _whole_or_not_at_all(target: Path, mark: dict):
    """A neighbour of `target` to write into; takes the place of `target` when the block ends well."""
    building = target.with_name(f".{target.name}.part")
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
    building.mkdir()
    try:
        yield building
        (building / RECIPE_FILE).write_text(json.dumps(mark), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
