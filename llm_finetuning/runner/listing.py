"""The list that `run --parameters` prints: every parameter of the notebooks, its value, and what it does."""

import shutil
import textwrap
from collections import defaultdict

from llm_finetuning.runner import parameters
from llm_finetuning.runner.steps import STEPS, Step

IN_COLAB = "For the cell that sets up Colab; not used here."
OUTPUT = "Set by --output."


def text(profile: str, steps: tuple[Step, ...] = STEPS) -> str:
    """Returns the list, with the profile's value beside a default that it replaces.

    A parameter that several notebooks explain alike stands once, with their numbers. Raises what `read_profile` raises.
    """
    assigned = parameters.read_profile(profile)
    where = defaultdict(list)  # (name, default, sentence) → numbers of the notebooks
    for number, step in enumerate(steps, start=1):
        for name, default in step.defaults().items():
            where[name, repr(default), _sentence(name, step)].append(str(number))
    titles = [f"{number}  {step.notebook.stem}" for number, step in enumerate(steps, start=1)]
    entries = [
        f"{name} = {value}{_replaced(name, assigned, profile)}  [{', '.join(numbers)}]\n{_wrapped(sentence)}"
        for (name, value, sentence), numbers in where.items()
    ]
    return "\n".join([*titles, "", *entries])


def _sentence(name: str, step: Step) -> str:
    if name in parameters.OUTPUT_NAMES:
        return OUTPUT
    field = step.settings_class.__pydantic_fields__.get(name.removeprefix(step.prefix))
    return field.description if field else IN_COLAB


def _replaced(name: str, assigned: dict, profile: str) -> str:
    return f" ({profile}: {assigned[name]!r})" if name in assigned else ""


def _wrapped(sentence: str) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    indent = {"initial_indent": "    ", "subsequent_indent": "    "}
    return textwrap.fill(" ".join(sentence.split()), width, break_on_hyphens=False, **indent)
