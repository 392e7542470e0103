"""Safetensors in one file, or in shards with their index: read by name, and written with one tensor in memory."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from llm_finetuning.files.atomic import write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 2 * 10**9
"""Largest file of a merged model."""


def stored_bytes(folder: Path) -> int:
    """Returns the bytes of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Weights:
    """The tensors of a local model folder, read one at a time; a file is mapped only while one is read from it.

    single: the file that holds them where no index says which. Raises FileNotFoundError for a folder that lacks a file,
    ValueError for an index that is none, or names what is not in the folder.
    """

    def __init__(self, folder: str | Path, single: str = SINGLE):
        self.folder = folder = Path(folder)
        if (folder / single).is_file():  # first, as transformers looks
            self.files = dict.fromkeys(dict(_shapes(folder / single)), single)
        elif (folder / INDEX).is_file():
            self.files = _weight_map(folder / INDEX)
        else:
            raise FileNotFoundError(f"{folder} holds no weights as safetensors: neither {single} nor {INDEX}")
        if missing := sorted({name for name in self.files.values() if not (folder / name).is_file()}):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: fetch the folder again")

    def names(self) -> list[str]:
        return sorted(self.files)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)

    def shapes(self) -> dict[str, list[int]]:
        """The shape of each tensor by name, from the headers; each file is opened once.

        Raises ValueError for a file that is damaged at its beginning, or lacks a tensor.
        """
        shapes = {name: shape for file in set(self.files.values()) for name, shape in _shapes(self.folder / file)}
        if missing := sorted(set(self.files) - set(shapes)):
            raise ValueError(f"{self.folder}: its files hold no {missing[0]}, which {INDEX} names: fetch it again")
        return {name: shapes[name] for name in self.names()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) in the order of the files, which is the quickest to read."""
        return ((name, self.read(name)) for name in self.files)


DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
"""Types of weights, as safetensors names them; in fewer bits they need scales."""


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: file} of an index. Raises ValueError unless each file is one of the index's own folder."""
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        outside = [file for file in files.values() if not file or Path(file).name != file or "\\" in file]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights ({type(error).__name__}: {error}): fetch it again") from error
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is no file of its folder: fetch it again")
    return files


def _shapes(path: Path) -> list[tuple[str, list[int]]]:
    """(name, shape) of each tensor of a file, from its header. Raises ValueError for weights that are quantised."""
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = [(name, part.get_shape(), part.get_dtype()) for name, part in parts.items()]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    for name, _, dtype in headers:
        if name.endswith(".weight") and dtype not in DTYPES.values():
            raise ValueError(
                f"{path}: {name} is {dtype}: quantised weights mean nothing without their scales. Take the model with"
                " 16 or 32 bits"
            )
    return [(name, shape) for name, shape, _ in headers]


def write_shards(
    folder: Path, shapes: dict[str, Iterable[int]], dtype: torch.dtype, tensor: Callable[[str], torch.Tensor], size: int
) -> None:
    """Writes tensors of `dtype` to `folder` in shards of at most `size` bytes, with the index that transformers reads.

    shapes: of all tensors by name; tensor: makes the one of a name. Memory holds one tensor at a time.
    """
    meta = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(meta, max_shard_size=size)
    for file, names in plan.filename_to_tensors.items():
        _write_file(folder / file, {name: meta[name] for name in names}, tensor)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)


def _write_file(path: Path, meta: dict[str, torch.Tensor], tensor: Callable[[str], torch.Tensor]) -> None:
    """Writes one file as safetensors lays it out: the header's length, the header, and the tensors one after another.

    The library's own `save_file` takes all of them at once. Raises ValueError for a tensor that is not as in `meta`.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, part in meta.items():
        places = [end, end := end + part.nbytes]
        header[name] = {"dtype": DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": places}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, part in meta.items():
            made = tensor(name)
            if (made.shape, made.dtype) != (part.shape, part.dtype):
                raise ValueError(f"{name} is {made.dtype} of {list(made.shape)}, not as {path.name} says of it")
            file.write(made.cpu().reshape(-1).view(torch.uint8).numpy())
