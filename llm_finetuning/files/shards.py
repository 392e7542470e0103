"""Safetensors in one file, or in shards with their index: read by name, and written with one shard in memory."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm_finetuning.files.atomic import write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 2 * 10**9
"""Largest file of a merged model."""


class Weights:
    """The tensors of a local model folder, read one at a time; a file is mapped only while one is read from it.

    single: the file that holds them where no index says which. Raises FileNotFoundError for a folder that lacks a file.
    """

    def __init__(self, folder: str | Path, single: str = SINGLE):
        self.folder = folder = Path(folder)
        if (folder / INDEX).is_file():
            self.files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (folder / single).is_file():
            self.files = dict.fromkeys(_names(folder / single), single)
        else:
            raise FileNotFoundError(f"{folder} holds no weights as safetensors: neither {single} nor {INDEX}")
        if missing := sorted({name for name in self.files.values() if not (folder / name).is_file()}):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: fetch the folder again")

    def check_files(self) -> None:
        """Raises ValueError for a file that is cut off or damaged at its beginning; no tensor is read."""
        for name in sorted(set(self.files.values())):
            _names(self.folder / name)

    def names(self) -> list[str]:
        return sorted(self.files)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_slice(name).get_shape()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) in the order of the files, which is the quickest to read."""
        return ((name, self.read(name)) for name in self.files)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error


def write_shards(
    folder: Path, shapes: dict[str, Iterable[int]], dtype: torch.dtype, tensor: Callable[[str], torch.Tensor], size: int
) -> None:
    """Writes tensors of `dtype` to `folder` in shards of at most `size` bytes, with the index that transformers reads.

    shapes: of all tensors by name; tensor: makes the one of a name. Memory holds one shard at a time.
    """
    meta = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(meta, max_shard_size=size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)
