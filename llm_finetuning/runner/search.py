"""What `python -m llm_finetuning search` is asked: values of the finetuning notebook's parameters, all checked at once.

Nothing heavy is imported here, so a typing mistake is answered at once.
"""

import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from llm_finetuning import settings
from llm_finetuning.files.atomic import read_json
from llm_finetuning.runner import parameters, steps
from llm_finetuning.settings import Finetuning

REQUIREMENT = "optuna>=5,<6"
BEFORE = (steps.NAMED["training-data"], steps.NAMED["validation-data"])
"""What makes the data where the output folder has none."""
STEP = steps.NAMED["finetuning"]
SEARCHES_ITSELF = "find_learning_rate"
SHARED = "decides the data, which all trainings share: search once for each value, each with an --output of its own"


@dataclass(frozen=True)
class Request:
    """The trainings that a search compares."""

    output: Path
    data: list[dict]
    """Parameters of the notebooks in BEFORE."""
    fixed: Finetuning
    """What all trainings share; its held-out set is the one that is measured on."""
    values: dict[str, list]
    """What is tried of each parameter."""
    seeds: list[int]
    steps: int | None
    """Optimizer steps of each training; 0 = the whole run, None = as in the search for the learning rate."""

    @property
    def combinations(self) -> list[dict[str, object]]:
        return _product(self.values)

    def settings_of(self, combination: dict[str, object]) -> Finetuning:
        return settings.from_cell(Finetuning, vars(self.fixed) | combination)


def request(
    profile: str, output: Path, typed: list[tuple[str, str]], seeds: int = 3, training_steps: int | None = None
) -> Request:
    """Checks what was typed: (name, values separated by commas) for the finetuning notebook's parameters, else a value.

    Raises ValueError with all problems of names and values at once, ModuleNotFoundError without Optuna, and what
    `steps.prepare` raises.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ModuleNotFoundError(f"search needs Optuna: pip install -r requirements-search.txt, or '{REQUIREMENT}'")
    defaults, chosen = STEP.defaults(), (*BEFORE, STEP)
    lists, fixed, problems = _split(typed, defaults)
    cell = defaults | {name: value for name, value in parameters.read_profile(profile).items() if name in defaults}
    cell |= {name: parameters.parse(text, defaults[name]) for name, text in fixed if name in defaults}
    cell |= dict.fromkeys(parameters.OUTPUT_NAMES, str(output.resolve()))
    tried = [*_product(lists), *({"seed": value} for value in lists.get("seed", []))]
    for problem in (*_name_problems(profile, output, fixed), *_value_problems(cell, tried)):
        problems.setdefault(problem)
    hints = {name: f"{name} {SHARED}" for name, text in fixed if name not in defaults and "," in text}
    if not problems and not set(lists) - {"seed"}:
        nothing = "nothing to compare: give a parameter several values, such as -p learning_rate 1e-4,2e-4"
        problems |= dict.fromkeys([nothing, *hints.values()])
    if problems:
        raise ValueError("\n".join(problems))
    try:
        *data, cell = steps.prepare(profile, output, fixed, chosen)
    except ValueError as error:
        said = [hint for name, hint in hints.items() if f"{name} = " in str(error)]
        raise ValueError("\n".join([str(error), *said])) from None
    base = settings.from_cell(Finetuning, defaults | cell)
    if problems := _data_problems(base.folders.train_file, data[0], [n for n, _ in fixed if n not in defaults]):
        raise ValueError("\n".join(problems))
    drawn = lists.pop("seed", [base.seed + number for number in range(seeds)])
    return Request(output, data, base, lists, drawn, training_steps)


def _split(typed: list[tuple[str, str]], defaults: dict) -> tuple[dict[str, list], list[tuple[str, str]], dict]:
    """(values of each parameter that has several, what has one as it is typed, problems as keys)."""
    lists, fixed, problems = {}, {}, {}
    names = [name for name, _ in typed]
    problems |= {f"{n} is given twice: give its values as {n} A,B": None for n in names if names.count(n) > 1}
    for name, text in typed:
        known = name in defaults and name not in parameters.OUTPUT_NAMES
        values = _values(text, defaults[name]) if known else [text]
        if name == SEARCHES_ITSELF:
            problems[f"{name}: it is a search of its own; leave it out"] = None
        elif not values:
            problems[f"{name} = {text!r}: a value is missing; give them as 1e-4,2e-4"] = None
        elif len(values) > 1:
            lists[name] = [parameters.absolute(name, value) for value in values]
        else:
            fixed[name] = str(values[0])
    return lists, [(name, text) for name, text in fixed.items() if name not in lists], problems


def _values(text: str, default: object) -> list:
    """The values in '1e-4, 2e-4', each once; [] where one is empty. '[…]' is a YAML list, for texts with commas."""
    parsed = parameters.parse(text, None) if text.strip().startswith("[") else None
    if isinstance(parsed, list) and isinstance(default, list) and not all(isinstance(each, list) for each in parsed):
        return [parsed]
    if not isinstance(parsed, list):
        parts = [part.strip() for part in text.split(",")] if "," in text else [text]
        empty = not all(part.strip() for part in parts) and not (parts == [""] and isinstance(default, str))
        parsed = [] if empty else [parameters.parse(part, default) for part in parts]
    return [json.loads(each) for each in dict.fromkeys(map(json.dumps, parsed))]


def _product(values: dict[str, list]) -> list[dict[str, object]]:
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def _name_problems(profile: str, output: Path, fixed: list[tuple[str, str]]) -> list[str]:
    cells = [step.defaults() for step in steps.NAMED.values()]
    try:
        parameters.assign(cells, parameters.read_profile(profile), fixed, output)
    except ValueError as error:
        return str(error).splitlines()
    return []


def _data_problems(train_file: Path, values: dict, names: list[str]) -> list[str]:
    """What was typed for the data notebooks and is not what the data in the folder was made with."""
    if not train_file.exists():
        return []
    report = read_json(train_file.with_suffix(".report.json"))
    made = report.get("recipe", {}) | {"source": report.get("source", {}).get("source")}
    return [
        f"{name} = {values[name]!r}: the data in {train_file.parent} was made with {made.get(name)!r}; leave it out, or"
        " set --output to another folder"
        for name in names
        if name in values and (name in made or not report) and values[name] != made.get(name)
    ]


def _value_problems(cell: dict, combinations: list[dict[str, object]]) -> list[str]:
    """What is wrong with the settings of each combination."""
    problems = []
    for combination in combinations:
        try:
            settings.from_cell(Finetuning, cell | combination)
        except ValueError as error:
            problems += str(error).splitlines()
    return problems
