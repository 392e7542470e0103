"""What the running cell of a notebook shows, on a terminal or as plain lines: heading, steps, loss and time left."""

import os
import re
import signal
import sys
import threading
import time
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text
from tqdm.std import tqdm

from llm_finetuning.runner.stopping import HANGUP, stop

EVERY = 5.0
"""Seconds between two lines where there is no terminal."""
LONGEST = 1000
"""Characters of a line that are looked at: a bar is shorter, and what is drawn much shorter."""
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
LINE_END = re.compile(r"[\r\n]")
BAR = re.compile(
    r"(?:(?P<name>.*?): +)? *\d+%\|[^|]*\| *(?P<done>\S+)/(?P<total>\S+) \[[\d:]+<(?P<left>[\d:?]+), *"
    r"(?:[\d.,?]+ ?(?P<unit>[A-Za-z]+)/s|[\d.,?]+s/ ?(?P<slow_unit>[A-Za-z]+))(?:, (?P<more>.*))?\]"
)
"""A line of tqdm's: `name:  45%|####5     | 18/40 [00:10<00:12,  1.75step/s, loss 0.412, …]`."""


def on_terminal() -> bool:
    """Whether stdout is a terminal on which lines can be drawn over."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str) -> None:
    """Prints a line that stays, wrapped at words on a terminal. Where nobody reads any more, the run is hung up."""
    try:
        if on_terminal():
            Console().print(Text(text))
        else:
            print(text, flush=True)
    except OSError:
        signal.raise_signal(HANGUP or signal.SIGTERM)


class Progress:
    """Shows one notebook while it runs: its title and time, the heading of the running cell, and what that prints."""

    def __init__(self, title: str):
        self.title, self.begun = title, time.monotonic()
        self.heading = self.name = self.detail = ""
        self._unfinished = ""
        self._over = threading.Event()
        self._live = Live(self, refresh_per_second=2, transient=True) if on_terminal() else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        else:
            threading.Thread(target=self._print_lines, name="progress", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._over.set()
        if self._live:
            self._live.stop()
        how = "" if not error else "stopped after " if stop.asked else "failed after "
        say(f"{self.title}: {how}{self.elapsed}")

    @property
    def elapsed(self) -> str:
        return tqdm.format_interval(time.monotonic() - self.begun)

    def cell(self, source: str, is_code: bool) -> None:
        """Takes note of a cell that starts: a text brings its heading, code has printed nothing yet."""
        if is_code:
            self.name = self.detail = self._unfinished = ""
        elif heading := HEADING.search(source):
            self.heading = heading[1]

    def write(self, text: str) -> None:
        """Takes what the running cell prints; its last line is shown, of a progress bar what that says."""
        *whole, self._unfinished = (line[:LONGEST] for line in LINE_END.split(self._unfinished + text))
        newest = next((line.strip() for line in [self._unfinished, *reversed(whole)] if line.strip()), "")
        if newest:
            self.name, self.detail = read_bar(newest) or ("", newest)

    def flush(self) -> None:
        """Nothing is held back."""

    def lines(self) -> list[str]:
        """What is shown now: where the run is, then what the cell does."""
        doing = ": ".join(filter(None, [self.heading, self.name]))
        return list(filter(None, [f"{self.title} {self.elapsed}", doing, stop.sentence or self.detail]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws the lines, each cut to the terminal less the two columns in which that may show ^C."""
        for number, line in enumerate(self.lines()):
            text = Text(f"{'  ' if number else ''}{line}")
            text.truncate(max(1, options.max_width - 2), overflow="ellipsis")
            yield text

    def _print_lines(self) -> None:
        while not self._over.wait(EVERY):
            say(", ".join(self.lines()))


def read_bar(line: str) -> tuple[str, str] | None:
    """Returns the name of a progress bar, and what it says in the order in which it matters.

    None for another line, two empty texts for a bar that is finished: the cell does something else by now.
    """
    found = BAR.search(line) if len(line) <= LONGEST else None  # the search of a long one takes the square of it
    if not found:
        return None
    if found["done"] == found["total"]:
        return "", ""
    unit = found["unit"] or found["slow_unit"]
    counted = f"{unit} " if found["done"].isdigit() and unit != "it" else ""
    first, *rest = (found["more"] or "").split(", ")
    said = [f"{counted}{found['done']}/{found['total']}", first, f"{found['left']} left", *rest]
    return found["name"] or "", ", ".join(filter(None, said))
