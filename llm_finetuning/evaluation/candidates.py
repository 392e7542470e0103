"""The models of an evaluation: folders, hub ids, or an adapter on its base, and how each is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path

import peft
import torch

from llm_finetuning import hardware, models, prompts
from llm_finetuning.files import checksums
from llm_finetuning.prompts import Template
from llm_finetuning.settings import Evaluation

LOADED = 1.3
"""Memory while a model is in use over that of its weights: activations, and the logits of a batch."""


@dataclass(frozen=True)
class Candidate:
    """A model under the name that tables, figures and evaluation.json give it."""

    name: str
    path: Path
    adapter: Path | None = None

    @property
    def parameters(self) -> int:
        return models.count_parameters(models.configuration(str(self.path)))

    def fingerprint(self) -> list[str]:
        """What tells its weights from others, so that an evaluation goes on only with the model that it began with."""
        adapter = [checksums.hash_together(sorted(self.adapter.glob("*.safetensors")))] if self.adapter else []
        return [models.fingerprint(self.path), *adapter]

    def own_template(self) -> Template | None:
        """The chat template that came with the model; None for a base without one."""
        with_adapter = self.adapter and (self.adapter / "tokenizer_config.json").is_file()
        tokenizer = models.tokenizer(str(self.path), str(self.adapter) if with_adapter else "")
        return prompts.template_for(tokenizer) if tokenizer.chat_template else None

    def load(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        """The model in evaluation mode, its adapter beside the weights.

        Raises ValueError where model or adapter lacks a weight, or has one too many: it would be another model.
        """
        model = models.load_strict(self.path, dtype, device)
        return _add_adapter(model, self.adapter, device).eval() if self.adapter else model


def _add_adapter(model: torch.nn.Module, folder: Path, device: str) -> peft.PeftModel:
    model = peft.PeftModel.from_pretrained(model, folder, torch_device=device)
    loaded = model.load_adapter(str(folder), "default", torch_device=device)  # once more, for what it returns
    missing = [name for name in loaded.missing_keys if ".default." in name]
    if problems := missing + loaded.unexpected_keys:
        raise ValueError(f"models: {folder} is not an adapter of this base; {len(problems)} weights: {problems[0]}, …")
    return model


def named(settings: Evaluation) -> list[Candidate]:
    """The models of `settings.models`; [] = the base and what this folder holds: finetuned, preferred.

    A name is "base", "finetuned", "preferred", a folder, a hub id, or BASE + ADAPTER with a folder for the adapter.
    Raises FileNotFoundError or ValueError for one that is not there, and ValueError for two of the same name.
    """
    folders = settings.folders
    known = {"finetuned": folders.published, "preferred": folders.preferred}
    chosen = settings.models or ["base", *(name for name, folder in known.items() if folder.is_dir())]
    found = [_candidate(text.strip(), known, settings) for text in chosen]
    names = [candidate.name for candidate in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"models has {', '.join(twice)} twice: each model needs a folder of another name")
    return found


def _candidate(text: str, known: dict[str, Path], settings: Evaluation) -> Candidate:
    if text == "base":
        base = models.locate(settings.model_name, settings.folders.base, settings.tokenizer_folder)
        return Candidate("base", base)
    model, _, adapter = (part.strip() for part in text.partition(" + "))
    if text in known and not known[text].is_dir():
        raise FileNotFoundError(f"models: {text} is not there yet ({known[text]}): run its finetuning notebook first")
    if adapter:
        _check_adapter(Path(adapter))
    path = known.get(model) or models.locate(model, settings.folders.base)
    if adapter:
        return Candidate(Path(adapter).name, path, Path(adapter))
    return Candidate(text if text in known else path.name if Path(model).is_dir() else model, path)


def _check_adapter(folder: Path) -> None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"models: {folder} is no folder with an adapter (adapter_config.json)")
    kind = json.loads(file.read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"models: {folder} is a {kind} adapter; LoRA is supported")


def check_memory(candidates: list[Candidate], dtype: torch.dtype, machine: hardware.Machine) -> None:
    """Raises MemoryError for models that do not fit, before the first one is loaded: one is in memory at a time."""
    needed = {c.name: c.parameters * dtype.itemsize * LOADED for c in candidates}
    too_large = [f"{name} needs {bytes_ / hardware.GIB:.1f} GiB" for name, bytes_ in needed.items()
                 if bytes_ > machine.free_memory]  # fmt: skip
    if too_large:
        free = f"{machine.free_memory / hardware.GIB:.1f} GiB are free on {machine.name}"
        raise MemoryError(f"{'; '.join(too_large)}, and {free}: leave it out of models, or take a larger machine")
