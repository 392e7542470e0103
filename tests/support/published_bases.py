"""A base as a merge leaves it."""

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer

from llm_finetuning import prompts
from llm_finetuning.release import companions


def published(base: Path, folder: Path, system: str = "", dtype: torch.dtype = torch.float32) -> Path:
    """The weights of `base` with their companions, in a new `folder`."""
    template = prompts.template_for(AutoTokenizer.from_pretrained(base), system)
    folder.mkdir()
    companions.write_companions(folder, base, template, dtype)
    for weights in base.glob("*.safetensors"):
        shutil.copy(weights, folder)
    return folder
