"""Trains each combination of a search with each seed, in this process, and says which has the lowest held-out loss.

Every training is measured on the same held-out pairs. What was measured is kept by what decided it, so that a search
that was stopped, or gets further values, trains only what is new. The Optuna study lies in search/study.journal.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import filelock
import optuna
import transformers
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from llm_finetuning import hardware
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.files import drive
from llm_finetuning.files.atomic import write_json
from llm_finetuning.prompts import IGNORE_INDEX
from llm_finetuning.runner import notebooks, search_report
from llm_finetuning.runner.search import BEFORE, Request
from llm_finetuning.runner.search_report import Row
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import planning, qlora, rate_search, trainer
from llm_finetuning.training.dataset import RunInputs, read_inputs

READ = ("model_name", "model_revision", "tokenizer_folder", "system_message", "chat_template", "max_seq_length")
READ += ("train_on", "quick_trial")
"""Settings that decide what is read."""
SURE = 0.05
"""Where a combination is worse than the best with less than this probability of being as good, it is pruned."""


@dataclass(frozen=True)
class Training:
    """One training of a search: a combination of values with a seed."""

    settings: Finetuning
    plan: planning.Plan
    inputs: RunInputs
    name: str
    """A digest of all that decides its result."""


def run(request: Request) -> None:
    """Trains what was not trained yet and prints the table. Raises ValueError where losses would not compare.

    Raises RuntimeError where another search is at work in the same folder.
    """
    folder = request.output / "search"
    folder.mkdir(parents=True, exist_ok=True)
    for library in (datasets.disable_progress_bars, transformers.utils.logging.disable_progress_bar):
        library()
    try:
        with filelock.FileLock(folder / "search.lock", timeout=0):
            _make_data(request)
            rows = _search(request, folder)
    except filelock.Timeout:
        raise RuntimeError(f"another search is at work in {folder}: wait for its end, or set --output") from None
    write_json(folder / "search.json", search_report.record(rows))
    print(f"\n{search_report.table(rows).to_string(index=False)}\n\n{search_report.verdict(rows)}")


def _make_data(request: Request) -> None:
    """Runs the data notebooks where the output folder has no pairs."""
    folders = request.fixed.folders
    if not (folders.train_file.exists() and folders.val_file.exists()):
        notebooks.run(request.data, request.output, BEFORE)


def _search(request: Request, folder: Path) -> list[Row]:
    trainings = _trainings(request)
    losses = rate_search.Losses(folder / "losses.json", {})
    _announce(request, trainings, losses)
    study, texts = _study(request, trainings, folder), _texts(request)
    space = {name: [str(value) for value in values] for name, values in request.values.items()}

    def objective(trial: optuna.Trial) -> float:
        place = texts.index({name: trial.suggest_categorical(name, choices) for name, choices in space.items()})
        row = Row(texts[place], {})
        for seed, training in zip(request.seeds, trainings[place], strict=True):
            row.losses[seed] = _loss(training, losses, folder)
            print(f"{row.named}, seed = {seed}: held-out loss {rate_search.shown(row.losses[seed])}", flush=True)
            if not row.finite:
                return float("inf")
            _report(trial, row, seed)
            if seed != request.seeds[-1] and trial.should_prune():
                raise optuna.TrialPruned
        return row.pooled(request.seeds).value

    while True:
        rows, finished = _rows(request.seeds, texts, trainings, losses), _finished(study)
        waiting = next((row.values for row in rows if row.values not in finished or not row.losses), None)
        if waiting is None:
            return rows
        study.enqueue_trial(waiting)
        study.optimize(objective, n_trials=1)


def _texts(request: Request) -> list[dict[str, str]]:
    """The combinations with their values as text, as the study keeps them."""
    return [{name: str(value) for name, value in values.items()} for values in request.combinations]


def _finished(study: optuna.Study) -> list[dict[str, str]]:
    return [trial.params for trial in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))]


def _report(trial: optuna.Trial, row: Row, seed: int) -> None:
    """Tells the pruner the loss per token of each held-out pair: it tests pair by pair against the best combination."""
    sample = row.losses[seed]
    begun = (len(row.losses) - 1) * len(sample.values)
    for number, (value, weight) in enumerate(zip(sample.values, sample.weights, strict=True)):
        trial.report(value / weight, begun + number)


def _rows(
    seeds: list[int], texts: list[dict[str, str]], trainings: list[list[Training]], losses: rate_search.Losses
) -> list[Row]:
    """Each combination with what was measured of it."""
    return [
        Row(values, {s: losses.get(t.name) for s, t in zip(seeds, row, strict=True) if t.name in losses.found})
        for values, row in zip(texts, trainings, strict=True)
    ]


def _study(request: Request, trainings: list[list[Training]], folder: Path) -> optuna.Study:
    """The study of exactly these trainings, new or as far as it came."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the pruner is new in Optuna
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
        study_name=_digest([[training.name for training in row] for row in trainings]),
        pruner=optuna.pruners.WilcoxonPruner(p_threshold=SURE),
        load_if_exists=True,
    )


def _trainings(request: Request) -> list[list[Training]]:
    """Each combination's trainings, by seed. Raises ValueError where one reads the held-out responses otherwise."""
    base = read_inputs(request.fixed)
    read: dict[str, RunInputs] = {}
    made = []
    for combination in request.combinations:
        settings = request.settings_of(combination)
        key = json.dumps([getattr(settings, name) for name in READ])
        if key not in read:
            read[key] = _inputs(settings, request.fixed, base)
        made.append(_by_seed(request, settings, read[key]))
    _check_distinct(request.combinations, [row[0].name for row in made])
    return made


def _check_distinct(combinations: list[dict[str, object]], names: list[str]) -> None:
    """Raises ValueError for two combinations that come to the same training."""
    for place, name in enumerate(names):
        if (first := names.index(name)) != place:
            same = [", ".join(f"{n} = {v}" for n, v in combinations[i].items()) for i in (first, place)]
            raise ValueError(f"{' and '.join(same)} come to the same training, step by step: leave one out")


def _inputs(settings: Finetuning, fixed: Finetuning, base: RunInputs) -> RunInputs:
    """What the settings read, with the held-out pairs that all trainings share."""
    inputs, pairs = read_inputs(settings), [example["pair"] for example in base.held_out]
    held_out = scoreboard.held_out_set(pairs, inputs.template, fixed.max_seq_length, len(pairs), fixed.seed)
    shared = scoreboard.held_out_set(pairs, base.template, fixed.max_seq_length, len(pairs), fixed.seed)
    if list(map(_in_loss, held_out)) != list(map(_in_loss, shared)):
        values = {name: getattr(settings, name) for name in READ if getattr(settings, name) != getattr(fixed, name)}
        raise ValueError(
            f"{', '.join(f'{name} = {value!r}' for name, value in values.items())}: the held-out responses are other"
            " tokens then, or fewer, and losses per token do not compare. Train each, and set them side by side in the"
            " evaluation notebook"
        )
    return replace(inputs, held_out=held_out, ranked=[])


def _in_loss(example: dict) -> list[int]:
    return [label for label in example["labels"] if label != IGNORE_INDEX]


def _by_seed(request: Request, settings: Finetuning, inputs: RunInputs) -> list[Training]:
    """The training of a combination with each seed: all have one plan, and one identity but for the seed."""
    plan = planning.plan_run(replace(settings, resume=False), inputs)
    steps = plan.search_steps if request.steps is None else request.steps
    shared = trainer.identity(settings, plan, inputs, steps)
    return [
        _training(request, replace(settings, seed=seed), plan, inputs, shared | {"seed": seed}, steps)
        for seed in request.seeds
    ]


def _training(
    request: Request, settings: Finetuning, plan: planning.Plan, inputs: RunInputs, identity: dict, steps: int
) -> Training:
    watched = {name: getattr(settings, name) for name in ("eval_steps", "early_stopping_patience")}
    changed = {"max_steps": steps} if steps else watched
    name = _digest([identity, changed])
    folder = request.output / "search" / name
    short = rate_search.short_training(settings, folder, **changed)
    return Training(short, replace(plan, settings=short, steps=steps or plan.steps), inputs, name)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _announce(request: Request, trainings: list[list[Training]], losses: rate_search.Losses) -> None:
    every = [training for row in trainings for training in row]
    new = [training for training in every if training.name not in losses.found]
    seconds = sum(training.plan.seconds for training in new)
    held_out = len(every[0].inputs.held_out)
    print(
        f"{len(trainings)} combinations × {len(request.seeds)} seeds, {every[0].plan.steps} steps each, measured on"
        f" {held_out} held-out pairs. {len(every) - len(new)} were trained before; the others take about"
        f" {hardware.readable_seconds(seconds)}, less where some are pruned",
        flush=True,
    )


def _loss(training: Training, losses: rate_search.Losses, folder: Path) -> Sample | None:
    """The held-out loss of a training, from before or trained now."""
    if training.name not in losses.found:
        model = qlora.add_adapters(qlora.load_base(training.settings, training.plan), training.settings)
        made = trainer.AssistantTrainer(model, training.settings, training.plan, training.inputs)
        losses.put(training.name, rate_search.measured(made))
        del made, model
        hardware.free_memory()
        drive.remove(folder / training.name, ignore_errors=True)
    return losses.get(training.name)
