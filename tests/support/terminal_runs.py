"""Runs notebooks in a process of their own, as the command does, so that signals, pipes and terminals can be tested."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_finetuning.runner import cache

DRIVER = """
import sys, types
from pathlib import Path
from llm_finetuning import __main__ as command
from llm_finetuning.runner import stopping
stopping.stop.listen()
stopping.PATIENCE = float(sys.argv[2])
from llm_finetuning.runner import notebooks, progress
from llm_finetuning.runner.steps import Step
progress.EVERY = float(sys.argv[3])
output, paths = Path(sys.argv[1]), [Path(name) for name in sys.argv[4:]]
(output / "notebooks").mkdir(parents=True, exist_ok=True)
sys.modules["llm_finetuning.runner.summary"] = types.SimpleNamespace(show=lambda output: print("the end"))
sys.exit(command._run([{"drive_folder": str(output)}] * len(paths), output, tuple(map(Step, paths))))
"""


@contextmanager
def started(output: Path, *paths: Path, patience: float = 60, every: float = 60, **streams: int) -> Iterator:
    """The run of these notebooks, as a process; ended when the test is."""
    command = [sys.executable, "-c", DRIVER, output, patience, every, *paths]
    environment = os.environ | {"PYTHONPATH": str(cache.PACKAGE.parent)}
    for size in ("COLUMNS", "LINES"):  # which would count for more than the terminal's own
        environment.pop(size, None)
    process = subprocess.Popen([str(word) for word in command], env=environment, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(holds: Callable[[], object], seconds: float = 120) -> object:
    """What `holds` returns as soon as it is true. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def terminal(columns: int) -> Iterator[tuple[int, Callable[[], str]]]:
    """A terminal of that width: the end for a process, and a function that returns all that was written to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    os.set_blocking(ours, False)
    written = bytearray()

    def read() -> str:
        try:
            while chunk := os.read(ours, 65536):
                written.extend(chunk)
        except OSError:  # nothing new, or the other end is closed
            pass
        return written.decode(errors="replace")

    yield theirs, read
    for end in (ours, theirs):
        os.close(end)
