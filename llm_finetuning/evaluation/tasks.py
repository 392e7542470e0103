"""Tasks of EleutherAI's lm-evaluation-harness, run in this process on a model that is in memory."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from llm_finetuning.evaluation.intervals import Sample, Z
from llm_finetuning.prompts import Template

REQUIREMENT = "lm-eval>=0.4.13"
BATCH_SIZE = 8
MAIN = ("acc_norm", "acc", "exact_match", "f1", "bleu", "word_perplexity", "perplexity")
"""Of a task's metrics the first of these is its figure."""


def install() -> None:
    """Installs the harness where it is missing: some 35 packages, which nothing else here needs."""
    if importlib.util.find_spec("lm_eval") is None:
        print(f"installing {REQUIREMENT} for the tasks")
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", REQUIREMENT], check=True)
        importlib.invalidate_caches()


def check(names: list[str], folder: str = "") -> None:
    """Makes each task, before a model is loaded. Raises ValueError for one that is none, or cannot be made.

    folder: with task files (YAML) of one's own; "" = the harness's alone. Raises FileNotFoundError for one that is not
    there.
    """
    if folder and not Path(folder).is_dir():
        raise FileNotFoundError(f"task_folder {folder} is no folder: give one that holds task files (YAML), or ''")
    manager = _manager(names, folder)
    if groups := sorted(set(names) & {*manager.all_groups, *manager.all_tags}):
        raise ValueError(f"tasks: {', '.join(groups)} is a group: name its tasks (`lm-eval ls subtasks`)")
    if unknown := [name for name in names if name not in manager.all_subtasks]:
        broken = "".join(f"; {reason}" for reason in _unread(folder))
        raise ValueError(
            f"tasks: {', '.join(unknown)} is no task of lm-evaluation-harness (`lm-eval ls tasks`){broken}"
        )
    for name in names:
        _make(manager, name)


def _unread(folder: str) -> Iterator[str]:
    """Why task files of a folder are passed over by the harness, which says nothing."""
    for path in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            if not isinstance(entries := yaml.load(path.read_text(encoding="utf-8"), _AnyTag), dict):
                yield f"{path} holds {type(entries).__name__}, not `task: NAME` and its entries"
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            yield f"{path} is not YAML: {' '.join(str(error).split())}"


class _AnyTag(yaml.SafeLoader):
    """Reads tags such as the harness's `!function` as nothing."""


_AnyTag.add_constructor(None, lambda loader, node: None)


def _make(manager: Any, name: str) -> None:
    """Makes a task, which fetches its questions. Raises ValueError where it cannot be made, or has none."""
    try:
        (task,) = manager.load([name])["tasks"].values()
        count = len(task.eval_docs)
    except Exception as error:  # of whatever the task's file names
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"tasks: {name} cannot be made ({type(error).__name__}: {reason})") from error
    if not count:
        raise ValueError(f"tasks: {name} has no questions")


def figures(
    model: torch.nn.Module, template: Template, names: list[str], limit: int, folder: str = ""
) -> dict[str, dict]:
    """{task: {"value", "low", "high", "n", "metric"}} with the interval from the harness's standard error.

    limit: questions of each task; 0 = all.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters stay in its layers
    wrapped = HFLM(pretrained=inner, tokenizer=template.tokenizer, batch_size=BATCH_SIZE)
    found = simple_evaluate(
        wrapped,
        tasks=names,
        limit=limit or None,
        task_manager=_manager(names, folder),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return {name: _figure(found["results"][name], found["n-samples"][name]["effective"]) for name in names}


def _manager(names: list[str], folder: str) -> Any:
    """The harness's index of tasks; without its own thousands, which take long to read, where the folder has all."""
    from lm_eval.tasks import TaskManager

    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=folder or None)


def _figure(result: dict, n: int) -> dict:
    """A task's main metric; keys of a result are `metric,filter`."""
    keys = [key for key in result if "," in key and "_stderr" not in key]
    key = next((key for main in MAIN for key in keys if key.partition(",")[0] == main), keys[0])
    metric, _, chosen = key.partition(",")
    value, error = float(result[key]), result.get(f"{metric}_stderr,{chosen}")
    if metric in ("acc", "acc_norm", "exact_match"):
        interval = Sample([1.0] * round(value * n) + [0.0] * (n - round(value * n))).interval()
    else:
        known = isinstance(error, float)
        interval = {"low": value - Z * error, "high": value + Z * error} if known else {"low": None, "high": None}
    return {"value": value, **interval, "n": n, "metric": metric}
