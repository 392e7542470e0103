"""The search for the learning rate against a sweep of whole trainings, on the sample's tiny model.

    python benchmarks/learning_rate.py FOLDER    FOLDER: of a run of the sample, whose data/ and base/ are read

Runs of two epochs, for three seeds: the search trains a fifth of the steps, at least 20, at each of five rates; the
sweep trains to the end at the same rates. Every loss goes to benchmarks/learning_rate.json as soon as it is measured,
so that the same command goes on where it stopped; the table of docs/recipe.md is printed. Half an hour on two cores.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import measuring  # noqa: F401  (it finds the package of this checkout)

from llm_finetuning import settings
from llm_finetuning.files.atomic import read_json, write_json
from llm_finetuning.runner.parameters import read_profile
from llm_finetuning.training import planning, rate_search
from llm_finetuning.training.dataset import read_inputs
from llm_finetuning.training.qlora import add_adapters, load_base
from llm_finetuning.training.trainer import AssistantTrainer

RESULTS = Path(__file__).with_suffix(".json")
SEEDS = (1, 2, 3)
SWEEP = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)


def sample(folder: Path, seed: int) -> settings.Finetuning:
    """The sample's settings for two epochs, nothing evaluated in between."""
    names = {field.name for field in dataclasses.fields(settings.Finetuning)}
    values = {name: value for name, value in read_profile("sample").items() if name in names}
    own = {"num_train_epochs": 2.0, "eval_steps": 0, "seed": seed, "resume": False}
    return settings.Finetuning(**values | own | {"drive_folder": str(folder), "work_folder": str(folder)})


def losses(folder: Path, seed: int, record: dict) -> None:
    """Measures what `record` lacks for a seed: {"search" or "sweep": {rate: {seed: held-out loss}}}."""
    chosen = sample(folder, seed)
    inputs = read_inputs(chosen)
    plan = planning.plan_run(chosen, inputs)
    searched = [chosen.learning_rate * factor for factor in planning.RATE_FACTORS]
    record |= {"search steps": plan.search_steps}
    todo = [("search", rate, {"max_steps": plan.search_steps}) for rate in searched]
    todo += [("sweep", rate, {}) for rate in SWEEP]
    for kind, rate, changed in todo:
        found = record.setdefault(kind, {}).setdefault(str(rate), {})
        if str(seed) not in found:
            with tempfile.TemporaryDirectory() as work:
                own = rate_search.short_training(chosen, Path(work), learning_rate=rate, **changed)
                its_plan = dataclasses.replace(plan, settings=own)
                model = add_adapters(load_base(own, its_plan), own)
                trainer = AssistantTrainer(model, own, its_plan, inputs)
                measured = rate_search.measured(trainer)
            found[str(seed)] = None if measured is None else round(measured.value, 4)
            record["sweep steps"] = trainer.steps if kind == "sweep" else record.get("sweep steps")
            write_json(RESULTS, record)


def table(record: dict) -> str:
    """Held-out losses by rate, seeds across, the lowest of each column in bold, as Markdown."""
    heads = [f"search, seed {seed}" for seed in SEEDS] + [f"sweep, seed {seed}" for seed in SEEDS]
    columns = [(kind, str(seed)) for kind in ("search", "sweep") for seed in SEEDS]
    best = {column: min(_column(record, *column).values()) for column in columns}
    lines = [f"| learning rate | {' | '.join(heads)} |", f"| ---: |{' ---: |' * len(heads)}"]
    for rate in map(str, SWEEP):
        values = [_column(record, *column).get(rate) for column in columns]
        cells = [_cell(value, value == best[column]) for value, column in zip(values, columns, strict=True)]
        lines.append(f"| {rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _column(record: dict, kind: str, seed: str) -> dict[str, float]:
    return {rate: found[seed] for rate, found in record[kind].items() if found.get(seed) is not None}


def _cell(value: float | None, best: bool) -> str:
    return "" if value is None else f"**{value:.3f}**" if best else f"{value:.3f}"


def factors(record: dict) -> list[float]:
    """For each seed the search's rate over the best of the sweep."""
    chosen = [[_best(record, kind, str(seed)) for kind in ("search", "sweep")] for seed in SEEDS]
    return [searched / swept for searched, swept in chosen]


def _best(record: dict, kind: str, seed: str) -> float:
    column = _column(record, kind, seed)
    return float(min(column, key=column.get))


if __name__ == "__main__":
    results = read_json(RESULTS)
    for number in SEEDS:
        losses(Path(sys.argv[1]), number, results)
    print(f"{table(results)}\n\nthe search's rate over the sweep's best: {factors(results)}")
