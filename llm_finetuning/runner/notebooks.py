"""The four notebooks, run headless and in order; what finished with the same inputs is not run again."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL

import filelock
import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import DeadKernelError

from llm_finetuning.runner import cache, pages
from llm_finetuning.runner.progress import Progress, say
from llm_finetuning.runner.steps import STEPS, Step
from llm_finetuning.runner.stopping import stop

KERNEL_ARGUMENTS = [
    "--HistoryManager.hist_file=:memory:",
    "--IPKernelApp.exec_lines=import sys; sys.modules['tqdm.notebook'] = None",  # bars as text: nobody sees widgets
]
TRAINS = "train("
"""What a cell that trains calls; see `stopping` for what that means."""
LOCK = ".run.lock"
"""Held in the output folder while a run is at work there."""


class NotebookFailed(RuntimeError):
    """A cell of a notebook failed, or its process died. The message ends with the cell's own error."""


class FolderBusy(RuntimeError):
    """Another run is at work in the output folder."""


def run(assigned: list[dict], output: Path, steps: tuple[Step, ...] = STEPS) -> None:
    """Runs `steps`, each with its parameters from `steps.prepare`, into `output`.

    Raises NotebookFailed when a cell fails, KeyboardInterrupt when the run was stopped (see `execute`), and FolderBusy.
    """
    lock = _take_lock(output)
    try:
        _run(assigned, output, steps)
    finally:
        lock.release()


def _take_lock(output: Path) -> filelock.BaseFileLock:
    """Takes the lock of the output folder; it is free again when this process ends, however it does."""
    lock = filelock.FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FolderBusy(f"Another run is at work in {output}: wait for its end, or set --output.") from None
    except OSError:  # a file system without locks
        pass
    return lock


def _run(assigned: list[dict], output: Path, steps: tuple[Step, ...]) -> None:
    _prepare_kernels()
    for number, (step, values) in enumerate(zip(steps, assigned, strict=True), start=1):
        name, title = step.notebook.stem, f"{number}/{len(steps)} {step.notebook.stem}"
        reason = _why(step, values, output)
        if reason is None:
            say(f"{title}: finished before with the same inputs, not run again")
            continue
        if reason:
            say(f"{title}: runs again, {reason}")
        cache.forget(name, output)
        execute(step.notebook, values, output / "notebooks", title)
        cache.remember(name, cache.inputs(step.notebook, values, output, step.reads), output)
        if stop.asked:
            raise KeyboardInterrupt


def execute(notebook: Path, values: dict, folder: Path, title: str) -> None:
    """Runs one notebook, shows what its cells do, and leaves it as executed, with its HTML, in `folder`.

    Raises NotebookFailed, or KeyboardInterrupt when the run was stopped, with the name of the checkpoint that was
    saved for it. The copies of such a notebook are kept too.
    """
    running = folder / f"{notebook.stem}.running.ipynb"
    try:
        with _kernel() as kernel, Progress(title) as progress:
            _execute(notebook, values, running, progress, kernel)
    except Exception as error:
        if stop.asked:
            saved = re.search(r"checkpoint-\d+", getattr(error, "evalue", ""))
            raise KeyboardInterrupt(saved[0] if saved else "") from None
        if isinstance(error, papermill.PapermillExecutionError):
            raise NotebookFailed(f"{notebook.name} failed.\n{error}".rstrip()) from None
        if isinstance(error, DeadKernelError):
            raise NotebookFailed(_death(notebook, running)) from None
        raise
    finally:
        if running.exists():
            with suppress(nbformat.reader.NotJSONError):  # cut off by a full disk, whose error is on its way
                pages.write(running, folder / notebook.name)
            running.unlink(missing_ok=True)


def _execute(notebook: Path, values: dict, running: Path, progress: Progress, kernel: AsyncKernelManager) -> None:
    """Runs the notebook's cells in `kernel` and writes what they show to `running`, cell by cell."""

    def starts(cell: nbformat.NotebookNode, cell_index: int) -> None:
        progress.cell(cell.source, cell.cell_type == "code")
        stop.cell_starts(trains=TRAINS in cell.source)

    papermill.execute_notebook(
        str(notebook),
        str(running),
        values,
        kernel_name="python3",
        progress_bar=False,
        cwd=os.getcwd(),
        km=kernel,
        on_cell_start=starts,
        stdout_file=progress,
        stderr_file=progress,
    )


@contextmanager
def _kernel() -> Iterator[AsyncKernelManager]:
    """Starts a kernel, which a signal to this process stops, and shuts it down."""
    kernel = AsyncKernelManager(kernel_name="python3")
    with stop.kernel_expected():
        silent = {"stdout": DEVNULL, "stderr": DEVNULL}  # what it logs beside the cells, on this terminal otherwise
        run_sync(kernel.start_kernel)(extra_arguments=KERNEL_ARGUMENTS, **silent)
        stop.group = kernel.provisioner.pgid
        try:
            yield kernel
        finally:
            run_sync(kernel.shutdown_kernel)(now=stop.asked)


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


def _prepare_kernels() -> None:
    """Makes the kernels run this interpreter, whatever else is registered as python3, and find this package."""
    for name, path in (("JUPYTER_PATH", f"{sys.prefix}/share/jupyter"), ("PYTHONPATH", str(cache.PACKAGE.parent))):
        os.environ[name] = os.pathsep.join(filter(None, [path, os.environ.get(name)]))
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a kernel's debugger warns of Python's own modules
    os.environ.setdefault("TQDM_NCOLS", "120")  # the width of this terminal would cut the notebooks' bars
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
