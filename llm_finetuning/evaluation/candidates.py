"""The models of an evaluation: folders, hub ids, or an adapter on its base, and how each is loaded."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers

from llm_finetuning import hardware, models
from llm_finetuning.files import checksums
from llm_finetuning.files.shards import Weights
from llm_finetuning.inference import published
from llm_finetuning.settings import Evaluation, Folders

ADAPTER = "adapter_model.safetensors"
LOADED = 1.3
"""Memory while a model is in use over that of its weights: activations, and the logits of a batch."""


@dataclass(frozen=True)
class Candidate:
    """A model under the name that tables, figures and evaluation.json give it."""

    name: str
    path: Path
    adapter: Path | None = None

    @property
    def config(self) -> transformers.PreTrainedConfig:
        return models.configuration(str(self.path))

    @property
    def parameters(self) -> int:
        return models.count_parameters(self.config)

    @property
    def positions(self) -> float:
        """The longest text in tokens that it has positions for."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def fingerprint(self) -> list[str]:
        """What tells its weights from others, so that an evaluation goes on only with the model that it began with."""
        adapter = [checksums.hash_together(sorted(self.adapter.glob("*.safetensors")))] if self.adapter else []
        return [models.fingerprint(self.path), *adapter]

    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """That of the adapter, where one came with it, else the model's."""
        with_adapter = self.adapter and (self.adapter / "tokenizer_config.json").is_file()
        return models.tokenizer(str(self.path), str(self.adapter) if with_adapter else "")

    def check(self) -> None:
        """Looks at the headers of its files. Raises ValueError or FileNotFoundError for what could not be loaded."""
        published.check_shapes(self.config, models.weights_of(self.path, f"models: {self.name}"))
        if self.adapter:
            _check_shapes(self.config, self.path, self.adapter)

    def load(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        """The model in evaluation mode, its adapter beside the weights. Raises ValueError where it lacks a weight."""
        model = models.load_strict(self.path, dtype, device)
        if self.adapter:
            model = peft.PeftModel.from_pretrained(model, self.adapter, torch_device=device)
        return model.eval()


def _check_shapes(config: transformers.PreTrainedConfig, base: Path, folder: Path) -> None:
    """Raises ValueError unless an adapter's tensors are those that its configuration describes on this base."""
    weights = Weights(folder, ADAPTER).shapes()
    made = peft.LoraConfig.from_peft_type(**_entries(folder))
    made.init_lora_weights, made.base_model_name_or_path = True, None  # nothing is computed, nor compared by name
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
            described = peft.get_peft_model_state_dict(peft.get_peft_model(model, made), save_embedding_layers=False)
    except ValueError as error:  # no module of its target names
        raise ValueError(f"models: {folder} is not an adapter of this base, {base}: {error}") from error
    shapes = {name: list(tensor.shape) for name, tensor in described.items()}
    names = sorted(shapes.keys() | weights.keys())
    if problems := [name for name in names if shapes.get(name) != weights.get(name)]:
        there, here = (found.get(problems[0], "missing") for found in (shapes, weights))
        raise ValueError(
            f"models: {folder} is not an adapter of this base, {base}; {len(problems)} weights, such as"
            f" {problems[0]}: {there} by base and configuration, {here} in the adapter"
        )


def named(settings: Evaluation) -> list[Candidate]:
    """The models of `settings.models`; [] = the base and what this folder holds: finetuned, preferred.

    A name is "base", "finetuned", "preferred", a folder, a hub id, or BASE + ADAPTER with a folder for the adapter.
    Raises FileNotFoundError or ValueError for one that is not there, and ValueError for two of the same name.
    """
    known = trained_here(settings.folders)
    chosen = settings.models or ["base", *(name for name, folder in known.items() if folder.is_dir())]
    found = [_candidate(text.strip(), known, settings) for text in chosen]
    names = [candidate.name for candidate in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"models has {', '.join(twice)} twice: each model needs a folder of another name")
    return found


def trained_here(folders: Folders) -> dict[str, Path]:
    """Returns the folders of the models that the notebooks publish, by the names that `models` has for them."""
    return {"finetuned": folders.published, "preferred": folders.preferred}


def _candidate(text: str, known: dict[str, Path], settings: Evaluation) -> Candidate:
    model, _, adapter = (part.strip() for part in text.partition(" + "))
    folder = Path(adapter).expanduser().resolve() if adapter else None
    if folder:
        _check_adapter(folder)
    path = _located(model, known, settings)
    name = path.resolve().name if model not in ("base", *known) and Path(model).expanduser().is_dir() else model
    return Candidate(folder.name if folder else name, path, folder)


def _located(model: str, known: dict[str, Path], settings: Evaluation) -> Path:
    """The folder of a model. Raises FileNotFoundError for one that no notebook has made yet."""
    if model == "base":
        return models.locate(settings.model_name, settings.folders.base, settings.tokenizer_folder)
    if model in known and not known[model].is_dir():
        raise FileNotFoundError(f"models: {model} is not there yet ({known[model]}): run its finetuning notebook first")
    return known.get(model) or models.locate(model, settings.folders.base)


def _entries(folder: Path) -> dict:
    """The configuration of an adapter. Raises FileNotFoundError for a folder without one."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"models: {folder} is no folder with an adapter ({file.name})")
    with models.reading(str(folder), file.name):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _check_adapter(folder: Path) -> None:
    kind = _entries(folder).get("peft_type")
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
