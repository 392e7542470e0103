"""The four notebooks, run headless and in order; what finished with the same inputs is not run again."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter

from llm_finetuning import settings
from llm_finetuning.files.atomic import write_text
from llm_finetuning.runner import cache, parameters

ROOT = Path(__file__).parents[2]
TRAIN, VAL = "data/finetuning_data_train.jsonl", "data/finetuning_data_val.jsonl"
MODEL = "finetuned_phi2/SHA256SUMS"
BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} cells [{elapsed}]"


@dataclass(frozen=True)
class Step:
    """One notebook of a run; `reads` (with wildcards) and `writes` are paths in the output folder."""

    notebook: Path
    settings_class: type | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


STEPS = (
    Step(ROOT / "Data Prep/OpenAssistant Finetuning Training Data Prep.ipynb", settings.DataPrep, (), (TRAIN,)),
    Step(ROOT / "Data Prep/OpenAssistant Finetuning Validation Data Prep.ipynb", settings.DataPrep, (TRAIN,), (VAL,)),
    Step(
        ROOT / "Finetuning/Phi-2 QLoRA Finetuning.ipynb",
        settings.Finetuning,
        reads=(TRAIN, VAL),
        writes=("adapter", MODEL, "scoreboard.json"),
    ),
    Step(ROOT / "Inference/Phi-2 Inference.ipynb", settings.Inference, reads=(VAL, MODEL)),
)


class NotebookFailed(RuntimeError):
    """A cell of a notebook failed, or its process died. The message ends with the cell's own error."""


def run(assigned: list[dict], output: Path, steps: tuple[Step, ...] = STEPS) -> None:
    """Runs `steps`, each with its parameters from `prepare`, into `output`. Raises NotebookFailed when a cell fails."""
    _prepare_kernels()
    for number, (step, values) in enumerate(zip(steps, assigned, strict=True), start=1):
        name, title = step.notebook.stem, f"{number}/{len(steps)} {step.notebook.stem}"
        reason = _why(step, values, output)
        if reason is None:
            print(f"{title}: finished before with the same parameters, code and input files; not run again")
            continue
        if reason:
            print(f"{title}: runs again, {reason}")
        cache.forget(name, output)
        execute(step.notebook, values, output / "notebooks", title)
        cache.remember(name, cache.inputs(step.notebook, values, output, step.reads), output)


def prepare(profile: str, output: Path, typed: list[tuple[str, str]], steps: tuple[Step, ...] = STEPS) -> list[dict]:
    """Checks everything that can be known before a notebook runs, and returns the parameters of each.

    Raises ValueError with all problems of names and values at once, FileNotFoundError for a missing profile
    or notebook, OSError when nothing can be written to `output`.
    """
    cells = [parameters.defaults(step.notebook) for step in steps]
    assigned = parameters.assign(cells, parameters.read_profile(profile), typed, output)
    problems = []
    for step, cell, values in zip(steps, cells, assigned, strict=True):
        try:
            if step.settings_class:
                settings.from_cell(step.settings_class, cell | values)
        except ValueError as error:
            problems += str(error).splitlines()
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    _make_writable(output)
    return assigned


def execute(notebook: Path, values: dict, folder: Path, title: str) -> None:
    """Runs one notebook with a progress bar over its cells, and leaves it as executed, with its HTML, in `folder`.

    Raises NotebookFailed; the copies of a failed notebook are kept too.
    """
    running = folder / f"{notebook.stem}.running.ipynb"
    try:
        papermill.execute_notebook(
            str(notebook),
            str(running),
            values,
            kernel_name="python3",
            progress_bar={"desc": title, "bar_format": BAR},
            cwd=os.getcwd(),
            extra_arguments=["--log-level=ERROR"],  # of the kernel's own log, which shares this terminal
        )
    except papermill.PapermillExecutionError as error:
        raise NotebookFailed(f"{notebook.name} failed.\n{error}".rstrip()) from None
    except DeadKernelError:
        raise NotebookFailed(_death(notebook, running)) from None
    finally:
        if running.exists():
            os.replace(running, folder / notebook.name)
            write_html(folder / notebook.name)


def write_html(notebook: Path) -> Path:
    """Writes the notebook as an HTML page beside it; everything but MathJax is in the one file."""
    html, _ = HTMLExporter(exclude_anchor_links=True).from_filename(str(notebook))
    return write_text(notebook.with_suffix(".html"), html)


def _why(step: Step, values: dict, output: Path) -> str | None:
    """Returns why a notebook has to run: None = it need not, "" = it never finished."""
    missing = [name for name in step.writes if not (output / name).exists()]
    now = cache.inputs(step.notebook, values, output, step.reads)
    kinds = cache.changed(step.notebook.stem, now, output)
    if kinds is None:
        return ""
    if missing:
        return f"{missing[0]} is gone"
    return f"changed: {', '.join(kinds)}" if kinds else None


def _make_writable(output: Path) -> None:
    """Creates the output folder and checks that a file can be written to it. Raises OSError with the cure."""
    probe = output / "notebooks" / ".writable"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {output}: {error.strerror}. Choose another folder with --output") from None


def _prepare_kernels() -> None:
    """Makes the kernels run this interpreter, whatever else is registered as python3, and find this package."""
    for name, path in (("JUPYTER_PATH", f"{sys.prefix}/share/jupyter"), ("PYTHONPATH", str(ROOT))):
        os.environ[name] = os.pathsep.join(filter(None, [path, os.environ.get(name)]))
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else the debugger's warning stands in the progress bar
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    logging.getLogger("traitlets").setLevel(logging.ERROR)


def _death(notebook: Path, running: Path) -> str:
    """Returns the error text for a kernel that died: the cell that ran last, and the cure."""
    started = [c for c in nbformat.read(running, 4).cells if c.metadata.get("papermill", {}).get("start_time")]
    return (
        f"{notebook.name} failed: its process was killed in this cell, most often for want of memory:\n"
        f"{started[-1].source}\n"
        "DeadKernelError: close other programs or lower micro_batch_tokens; the same command then goes on"
    )
