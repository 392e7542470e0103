"""Bases as people hand them in: a copy of a sound one, with something wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def copy_of(base: Path, folder: Path, *changes: Callable[[Path], object]) -> Path:
    """A copy of `base` in `folder` after the changes."""
    shutil.copytree(base, folder)
    for change in changes:
        change(folder)
    return folder


def config(**entries) -> Callable[[Path], None]:
    """Other entries in config.json."""

    def change(base: Path) -> None:
        file = base / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


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
