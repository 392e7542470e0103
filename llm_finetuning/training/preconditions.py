"""Checks the names of other libraries before a base is fetched: a typing mistake costs seconds, not a download."""

import difflib
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from llm_finetuning.settings import AUTO, Finetuning

NEEDS_A_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules that Trainer steps with a metric, which it does not have here: evaluations are our own."""


def check_names(settings: Finetuning) -> None:
    """Raises one ValueError with every parameter that names what transformers does not know or cannot use here."""
    problems = [_scheduler(settings), _optimizer(settings), _reporting(settings)]
    if any(problems):
        raise ValueError("\n".join(filter(None, problems)))


def _scheduler(settings: Finetuning) -> str | None:
    name, known = settings.lr_scheduler_type, [kind.value for kind in SchedulerType]
    if name not in known:
        return _unknown("lr_scheduler_type", name, known)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=2)
    except (ValueError, TypeError) as error:  # it needs arguments of its own, which no parameter gives
        return f"lr_scheduler_type = {name!r} cannot be used here ({error}): set 'constant_with_warmup' or 'cosine'"
    if name in NEEDS_A_METRIC:
        return f"lr_scheduler_type = {name!r} needs a metric at each step: set 'constant_with_warmup' or 'cosine'"
    return None


def _optimizer(settings: Finetuning) -> str | None:
    name, known = settings.optim, [AUTO, *(kind.value for kind in OptimizerNames)]
    if name == AUTO:
        return None
    if name not in known:
        return _unknown("optim", name, known)
    arguments = SimpleNamespace(optim=name, optim_args=None, optim_target_modules=None, learning_rate=0.1)
    arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon, arguments.weight_decay = 0.9, 0.999, 1e-8, 0.0
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        return f"optim = {name!r} cannot be used here ({error}): set optim = 'auto'"
    return None


def _reporting(settings: Finetuning) -> str | None:
    name, known = settings.report_to, ["none", *INTEGRATION_TO_CALLBACK]
    if name not in known:
        return _unknown("report_to", name, known)
    if name != "none" and name not in get_available_reporting_integrations():
        return f"report_to = {name!r}: {name} is not installed; install it, or set report_to = 'none'"
    return None


def _unknown(parameter: str, value: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(value, known, n=3)
    cure = f"did you mean {' or '.join(map(repr, close))}?" if close else f"one of {', '.join(known)}"
    return f"{parameter} = {value!r}: {cure}"
