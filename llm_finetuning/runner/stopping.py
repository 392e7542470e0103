"""Stops a run at Ctrl-C, SIGTERM or a closed terminal: one line, exit code 130, a checkpoint first if training runs.

The kernel of a notebook has a process group of its own, so a signal that the terminal sends reaches this process
alone, and is handed on here.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

HANGUP, KILL = getattr(signal, "SIGHUP", None), getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has neither
SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)))
EXIT_CODE = 130
PATIENCE = 10.0
"""Seconds that a cell has to end after it was interrupted; one that trains has as long as its step takes."""

ONE_REQUEST = 1.0
"""Seconds within which several signals are one: a terminal that is closed sends SIGHUP twice, by shell and system."""


class Stop:
    """Whether the run was asked to stop, and what is stopped then."""

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self.group: int | None = None
        """Process group of the running kernel."""
        self.first = KILL
        """What the kernel is sent first: SIGKILL before it runs a cell, then as `cell_starts` says."""
        self._kernel_expected = False
        self._timer: threading.Timer | None = None

    def listen(self) -> None:
        """Handles the signals from now on; not a closed terminal that the process was started to ignore (nohup)."""
        for number in SIGNALS:
            if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    @contextmanager
    def kernel_expected(self) -> Iterator[None]:
        """Inside it a kernel is started and stopped again: a signal goes to that, and never ends this process."""
        self._kernel_expected, self.first = True, KILL
        try:
            yield
        finally:
            if self._timer:
                self._timer.cancel()
            self._kernel_expected, self.group = False, None

    def cell_starts(self, trains: bool) -> None:
        """Says what a cell is stopped by: training saves a checkpoint at SIGTERM. Raises KeyboardInterrupt if asked."""
        self.first = signal.SIGTERM if trains else signal.SIGINT
        if self.asked:
            raise KeyboardInterrupt

    @property
    def sentence(self) -> str:
        """What is shown while the cell ends; "" = nobody asked."""
        if not self.asked:
            return ""
        return f"stopping{' with a checkpoint' if self.first == signal.SIGTERM else ''}; Ctrl-C again stops at once"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._kernel_expected:
            leave()
        if self.asked and time.monotonic() - self._asked_at < ONE_REQUEST:
            return
        again, self.asked, self._asked_at = self.asked, True, time.monotonic()
        self.send(KILL if again else self.first)
        if not again and self.first == signal.SIGINT:
            self._timer = threading.Timer(PATIENCE, self.send, [KILL])
            self._timer.daemon = True
            self._timer.start()

    def send(self, number: signal.Signals) -> None:
        """Sends the kernel, and what it started, a signal."""
        if self.group is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.group, number)


stop = Stop()
"""Signals belong to the whole process, and so does this."""


def leave(checkpoint: str = "") -> NoReturn:
    """Ends this process at once with one line. An exception in its place could be lost in a destructor.

    checkpoint: name of the one that was saved before, if training ran.
    """
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # over the ^C that the terminal shows
    text = f"{clear}Stopped{f' at {checkpoint}' if checkpoint else ''}; the same command goes on.\n"
    with suppress(OSError):  # the terminal may be gone
        os.write(2, text.encode())
    os._exit(EXIT_CODE)
