"""Bases as people hand them in: a copy of a sound one, with something wrong."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def copy_of(base: Path, folder: Path, *changes: Callable[[Path], object]) -> Path:
    """A copy of `base` in `folder` after the changes."""
    shutil.copytree(base, folder)
    for change in changes:
        change(folder)
    return folder


def entries(name: str, **values) -> Callable[[Path], None]:
    """Other entries in a JSON file of the folder."""

    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


config = partial(entries, "config.json")


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    """Tensors under other names."""

    def change(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        save_file({rename(name): tensor for name, tensor in tensors.items()}, base / "model.safetensors")

    return change


def pickled(base: Path) -> None:
    """The weights as a pickle alone."""
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
