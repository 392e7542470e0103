"""The search for the learning rate: short trainings from the same start, compared by their held-out loss.

The run that follows is the one in which the best rate was typed in: the adapters get their initial weights back, and
a new trainer sets the random numbers.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from operator import methodcaller
from pathlib import Path

import torch

from llm_finetuning import hardware
from llm_finetuning.evaluation import intervals
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.files import drive
from llm_finetuning.files.atomic import read_json, write_json
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import qlora
from llm_finetuning.training.planning import RATE_FACTORS
from llm_finetuning.training.resumable import ResumableTrainer, train

Build = Callable[..., ResumableTrainer]
"""Makes a trainer of (model, settings, plan, inputs), as the class of one does."""
Measure = Callable[[ResumableTrainer], Sample]
"""The figure by which trainings are compared, lower is better: the loss of each held-out unit, and its weight."""
OWN: Measure = methodcaller("held_out_losses")
"""The figure that the kind of trainer has."""


class Losses:
    """What each training of a search came to, by name: kept in a file as soon as it is measured.

    None stands for a loss that is not finite. A file of other trainings (`identity`) counts as none.
    """

    def __init__(self, path: Path, identity: dict):
        self.path, self.identity = path, json.loads(json.dumps(identity))
        found = _read(path)
        self.same = found.get("trainings") == self.identity
        self.found: dict[str, dict | None] = found["losses"] if self.same else {}

    def get(self, name: str) -> Sample | None:
        """Raises KeyError for a training that was not measured."""
        found = self.found[name]
        return None if found is None else Sample(**found)

    def put(self, name: str, sample: Sample | None) -> None:
        finite = sample is not None and math.isfinite(sample.value)
        self.found[name] = asdict(sample) if finite else None
        self.save()

    def save(self) -> None:
        write_json(self.path, {"trainings": self.identity, "losses": self.found}, indent=None)


def _read(path: Path) -> dict:
    """The file's record; {} where there is none, or somebody else's."""
    try:
        found = read_json(path)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("losses"), dict) else {}


@dataclass(frozen=True)
class RateSearch:
    """The held-out losses of a search, by learning rate."""

    given: float
    """The rate around which the others lie."""
    losses: dict[float, Sample | None]
    """None where the loss was not finite."""
    steps: int
    """Optimizer steps of each training."""
    unit: str = ResumableTrainer.loss_unit

    @property
    def finite(self) -> dict[float, Sample]:
        return {rate: sample for rate, sample in self.losses.items() if sample is not None}

    @property
    def best(self) -> float:
        """The rate of the lowest held-out loss. Raises FloatingPointError where none was finite."""
        if not self.finite:
            raise FloatingPointError(
                f"the loss was finite at none of the learning rates {', '.join(map(str, self.losses))}: set a lower"
                " learning_rate, or on a GPU without bfloat16 take one that has it"
            )
        return min(self.finite, key=lambda rate: self.finite[rate].value)

    def __str__(self) -> str:
        """What the search decided, and how sure it is."""
        best, others = self.best, sorted(self.losses)
        said = [f"goes on with learning_rate = {best}"]
        if best != self.given and self.losses[self.given] is not None:
            found = intervals.difference(self.losses[self.given], self.losses[best])
            said.append(f"its loss less that of {self.given}: {intervals.against_zero(found)}")
        if best in (others[0], others[-1]):
            said.append(f"it is the {'lowest' if best == others[0] else 'highest'} that was tried: search around it")
        return "; ".join(said)


def shown(sample: Sample | None) -> str:
    """A loss with its interval and its number, or "not finite"."""
    return "not finite" if sample is None else intervals.shown(sample.figure())


def find(trainer: ResumableTrainer, build: Build, measure: Measure = OWN) -> tuple[ResumableTrainer, RateSearch | None]:
    """Searches for the learning rate if the settings ask for it; returns a trainer with the best one, and the search.

    trainer: as built, nothing trained. Its settings and those in settings.json are then those of a run with this rate
    typed in. What was measured stays in `folders.rate_search`, and an interrupted training of the search goes on from
    its checkpoint. Raises FloatingPointError where the loss is finite at no rate.
    """
    settings = trainer.settings
    if not settings.find_learning_rate:
        return trainer, None
    start = qlora.on_cpu(qlora.gather_adapter(trainer.model))
    try:
        search = _search(trainer, build, measure, start)
    finally:
        qlora.set_trained(trainer.model, start)
    chosen = replace(settings, learning_rate=search.best, find_learning_rate=False)
    chosen.save(chosen.folders.settings)
    return _again(trainer, build, chosen), search


def _search(trainer: ResumableTrainer, build: Build, measure: Measure, start: dict[str, torch.Tensor]) -> RateSearch:
    """Trains at each rate that was not measured yet."""
    settings, steps = trainer.settings, trainer.plan.search_steps
    rates = [settings.learning_rate * factor for factor in RATE_FACTORS]
    work = settings.folders.work / settings.folders.rate_search.stem
    losses = Losses(settings.folders.rate_search, trainer.identity | {"search_rates": rates, "search_steps": steps})
    if not (losses.same and settings.resume):
        losses.found = {}
        drive.remove(work, ignore_errors=True)
        losses.save()
    for rate in rates:
        folder = work / str(rate)
        if str(rate) not in losses.found:
            short = short_training(settings, folder, learning_rate=rate, max_steps=steps)
            qlora.set_trained(trainer.model, start)
            losses.put(str(rate), measured(_again(trainer, build, short, steps=steps), measure))
            drive.remove(folder, ignore_errors=True)
        print(f"learning_rate = {rate}: held-out loss {shown(losses.get(str(rate)))} after {steps} steps")
    found = {rate: losses.get(str(rate)) for rate in rates}
    return RateSearch(settings.learning_rate, found, steps, trainer.loss_unit)


def short_training(settings: Finetuning, folder: Path, **changed: object) -> Finetuning:
    """The settings of a training whose held-out loss alone is wanted: everything in `folder`, one checkpoint kept."""
    own = {"drive_folder": str(folder), "work_folder": str(folder), "quick_trial": False, "find_learning_rate": False}
    watched = {"eval_steps": 0, "early_stopping_patience": 0, "report_to": "none", "save_total_limit": 1}
    return replace(settings, **(own | watched | {"resume": True, "publish_to": "folder"} | changed))


def measured(trainer: ResumableTrainer, measure: Measure = OWN) -> Sample | None:
    """Trains to the end, from the newest checkpoint if there is one, and measures; None for a loss that is not finite.

    Raises what `resumable.train` raises otherwise.
    """
    try:
        train(trainer)
        return measure(trainer)
    except FloatingPointError as error:
        print(error)
        return None


def _again(trainer: ResumableTrainer, build: Build, settings: Finetuning, **planned: int) -> ResumableTrainer:
    """A new trainer of the same model and inputs; the memory of the one before is free again."""
    hardware.free_memory()
    return build(trainer.model, settings, replace(trainer.plan, settings=settings, **planned), trainer.run_inputs)
