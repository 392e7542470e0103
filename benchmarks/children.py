"""Programs that nobody vouches for, run to their end or to that of the time, with everything that they start."""

import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

KEPT = 64
"""Blocks of output that are kept, of at most BLOCK bytes each: its end says why a program failed."""
BLOCK = 1024
LINES = 3


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code, None where it was stopped, and the last that it printed."""

    code: int | None
    output: str

    @property
    def reason(self) -> str:
        """The last lines of the output, on one line and without control characters."""
        return self.about("")

    def about(self, pattern: str) -> str:
        """The last lines that a pattern is found in, of all lines if it is in none; as `reason` has them."""
        lines = [clean for line in self.output.splitlines() if (clean := re.sub(r"[^ -~]+", " ", line).strip())]
        said = [line for line in lines if re.search(pattern, line)] or lines
        return " | ".join(line[:200] for line in said[-LINES:]) or "it printed nothing"


def run(command: list[str], ends: float, cwd: Path | None = None, env: dict | None = None) -> Ended:
    """Runs a command until it ends, or until `ends` by time.perf_counter; what it started ends with it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=cwd,
        env=env,
    )
    blocks: deque[bytes] = deque(maxlen=KEPT)
    reader = threading.Thread(target=_keep, args=(process.stdout, blocks), daemon=True)
    reader.start()
    code = _wait(process, ends)
    reader.join(1)  # one that left the session may hold the pipe open
    return Ended(code, b"".join(blocks).decode(errors="replace"))


def shown(command: list[str], ends: float) -> int | None:
    """Runs a command as `run` does, with its output where ours goes; its exit code, None where it was stopped."""
    return _wait(subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0), ends)


def _wait(process: subprocess.Popen, ends: float) -> int | None:
    """The exit code of a process, None where the time was up; what it started and left in its group ends with it."""
    try:
        return process.wait(max(0.0, ends - time.perf_counter()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _keep(pipe: object, blocks: deque[bytes]) -> None:
    """Reads all output, however much it is, and keeps its end."""
    with pipe:
        while block := os.read(pipe.fileno(), BLOCK):
            blocks.append(block)
