"""The notebooks of a run, in order, and what can be checked of their parameters before one of them runs.

Nothing heavy is imported here, so a typing mistake is answered at once.
"""

from dataclasses import dataclass
from pathlib import Path

from llm_finetuning import settings
from llm_finetuning.runner import parameters
from llm_finetuning.runner.parameters import ROOT

TRAIN, VAL = "data/finetuning_data_train.jsonl", "data/finetuning_data_val.jsonl"
PREFERENCES = ("data/preferences_train.jsonl", "data/preferences_val.jsonl")
MODEL, PREFERRED = "finetuned_phi2/SHA256SUMS", "preferred_phi2/SHA256SUMS"


@dataclass(frozen=True)
class Step:
    """One notebook of a run; `reads` (with wildcards) and `writes` are paths in the output folder."""

    notebook: Path
    settings_class: type | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    prefix: str = ""
    own: tuple[str, ...] = ()
    """Parameters that other notebooks have too, and that mean something else here: profiles and `-p` name them with
    the prefix."""

    def defaults(self) -> dict[str, object]:
        """Returns the notebook's parameters with their values: those of its cell, then settings not in the form."""
        cell = parameters.defaults(self.notebook)
        unset = getattr(self.settings_class, "without_line", ())
        others = [n for n in settings.NOT_IN_FORM if hasattr(self.settings_class, n) and n not in unset]
        values = cell | {name: getattr(self.settings_class, name) for name in others}
        return {self.prefix * (name in self.own) + name: value for name, value in values.items()}

    def unprefixed(self, values: dict[str, object]) -> dict[str, object]:
        """Returns parameters by the names that the notebook's cell has."""
        return {name.removeprefix(self.prefix): value for name, value in values.items()}


NAMED = {
    "generation": Step(ROOT / "Data Prep/Task Data Generation.ipynb", settings.Generation, writes=(TRAIN, VAL)),
    "training-data": Step(
        ROOT / "Data Prep/OpenAssistant Finetuning Training Data Prep.ipynb", settings.DataPrep, (), (TRAIN,)
    ),
    "validation-data": Step(
        ROOT / "Data Prep/OpenAssistant Finetuning Validation Data Prep.ipynb", settings.DataPrep, (TRAIN,), (VAL,)
    ),
    "finetuning": Step(
        ROOT / "Finetuning/Phi-2 QLoRA Finetuning.ipynb",
        settings.Finetuning,
        reads=(TRAIN, VAL),
        writes=("adapter", MODEL, "scoreboard.json"),
    ),
    "preference": Step(
        ROOT / "Finetuning/Phi-2 Preference Tuning.ipynb",
        settings.PreferenceTuning,
        reads=(*PREFERENCES, VAL, "adapter/*.safetensors"),
        writes=("preference_adapter", PREFERRED, "preference_scoreboard.json"),
        prefix="preference.",
        own=(
            *("learning_rate", "find_learning_rate", "lr_scheduler_type", "warmup_ratio", "max_grad_norm"),
            *("num_train_epochs", "max_steps", "micro_batch_tokens", "save_steps", "eval_steps"),
            *("early_stopping_patience", "hub_repository"),
        ),
    ),
    "inference": Step(ROOT / "Inference/Phi-2 Inference.ipynb", settings.Inference, reads=(VAL, MODEL)),
    "evaluation": Step(
        ROOT / "Inference/Phi-2 Evaluation.ipynb",
        settings.Evaluation,
        reads=(VAL, "data/preferences_val.jsonl", MODEL, PREFERRED),
        writes=("evaluation.json",),
    ),
}
"""The notebooks by the names that `--notebooks` takes, in the order in which they run."""
STEPS = tuple(NAMED[name] for name in ("training-data", "validation-data", "finetuning", "inference"))
"""What runs by default."""


def named(names: str) -> tuple[Step, ...]:
    """Returns the notebooks of a list such as "generation,finetuning", in the order in which they run; "" = STEPS.

    Raises ValueError for a name that none has.
    """
    wanted = settings.split_names(names)
    if unknown := [name for name in wanted if name not in NAMED]:
        raise ValueError(f"--notebooks: {', '.join(unknown)} not known; there are {', '.join(NAMED)}")
    return tuple(step for name, step in NAMED.items() if name in wanted) or STEPS


def prepare(profile: str, output: Path, typed: list[tuple[str, str]], steps: tuple[Step, ...] = STEPS) -> list[dict]:
    """Checks everything that can be known before a notebook runs, and returns the parameters of each.

    Raises ValueError with all problems of names and values at once, FileNotFoundError for a missing profile
    or notebook, OSError when nothing can be written to `output`.
    """
    cells = [step.defaults() for step in steps]
    others = [step.defaults() for step in NAMED.values() if step not in steps]
    assigned = parameters.assign(cells, parameters.read_profile(profile), typed, output, others)
    problems = [problem for step in steps for problem in _meant_for(step, cells, typed)]
    cells, assigned = ([s.unprefixed(v) for s, v in zip(steps, each, strict=True)] for each in (cells, assigned))
    for step, cell, values in zip(steps, cells, assigned, strict=True):
        try:
            if step.settings_class:
                settings.from_cell(step.settings_class, cell | values)
        except ValueError as error:
            lines = [line for line in str(error).splitlines() if line not in problems]
            if any(not line.endswith(" settings:") for line in lines):  # not the title alone
                problems += lines
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    _make_writable(output)
    return assigned


def not_used(typed: list[tuple[str, str]], steps: tuple[Step, ...]) -> list[str]:
    """Returns a sentence for each parameter that was typed and that no notebook of the run has, but another one."""
    owners = {name: label for label, step in NAMED.items() for name in step.defaults()}
    here = {name for step in steps for name in step.defaults()}
    names = [name for name in dict(typed) if name not in here]
    return [f"{name}: not used, for it is a parameter of {owners[name]} (--notebooks)" for name in names]


def _meant_for(step: Step, cells: list[dict], typed: list[tuple[str, str]]) -> list[str]:
    """Returns the errors for parameters that were typed without their prefix, and that no notebook of the run takes."""
    everywhere = {name for cell in cells for name in cell}
    return [
        f"{name}: in this notebook it is {step.prefix}{name}"
        for name, _ in typed
        if name in step.own and name not in everywhere
    ]


def _make_writable(output: Path) -> None:
    """Creates the output folder and checks that a file can be written to it. Raises OSError with the cure."""
    probe = output / "notebooks" / ".writable"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {output}: {error.strerror}. Choose another folder with --output") from None
