"""Chat templates are rendered in a process of their own, which is ended when one takes too much time or memory.

A template is a program of others. jinja2's sandbox keeps it from files and attributes, not from looping or allocating
without end, and neither can be stopped in the process where it happens. Run as a script, this file is that process: it
reads requests and writes the text of each conversation, as lines of JSON.
"""

import atexit
import datetime
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import psutil

CPU_SECONDS = 1
"""Of one conversation: processor time, so that a busy machine ends nothing that is sound; usual are milliseconds."""
START_SECONDS = 120
ORPHAN_SECONDS = 3600
"""After which the process ends itself on a request: whoever would have ended it is gone."""
MEMORY_BYTES = 2**29
"""Of the whole process; usual are 60 MB."""
GROWTH = 100
"""Characters that a text may have for each one of its template and conversation; usual is about one."""
POLL_SECONDS = 0.05
TOGETHER_SECONDS = 0.01
"""Answers of so long are one line: a line for each would take longer than most of them."""
BATCH_CHARACTERS = 2**20


class RenderingError(ValueError):
    """What a template did instead of rendering; it goes on from the template's name: "refuses the conversation: …"."""


def render(
    template: str,
    conversations: list[tuple[list[dict], bool]],
    variables: dict[str, str],
    date: datetime.date | None = None,
) -> list[str]:
    """Renders conversations with a Jinja chat template, as transformers' `apply_chat_template` does.

    conversations: messages, and whether an assistant turn is to be opened behind them; variables: such as eos_token;
    date: what the template takes for today, None = the day on which it is rendered.
    Raises RenderingError for a template that is no valid Jinja, refuses a conversation, or takes too much.
    """
    answers, day = [], date and date.isoformat()
    with _lock:
        try:
            _begin()
            _renderer.wait_until_ready()
            shared = {"template": template, "variables": variables, "date": day}
            requests = ((_line_of(shared | {"conversations": one}), len(one)) for one in _batches(conversations))
            request, count = next(requests, (b"", 0))
            while count:
                _renderer.send(request)
                following = next(requests, (b"", 0))  # made while the process works
                answers += _renderer.answers(count)
                request, count = following
        except BaseException:  # an interrupt too: answers that nobody has read would be taken for those of another
            close()
            raise
    for answer in answers:
        if "problem" in answer:
            raise RenderingError(answer["problem"])
    return [answer["text"] for answer in answers]


def start() -> None:
    """Begins the process, so that it is ready when the first template is to be rendered."""
    with _lock:
        _begin()


def _begin() -> None:
    global _renderer
    if _renderer is None or not _renderer.is_alive():
        _renderer = _Renderer()


def _batches(conversations: list[tuple[list[dict], bool]]) -> Iterator[list[tuple[list[dict], bool]]]:
    """Requests of about BATCH_CHARACTERS: one of a whole data set would take its reader time and memory by itself."""
    batch, size = [], 0
    for each in conversations:
        batch.append(each)
        size += _characters(each[0])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(messages: list[dict]) -> int:
    return sum([len(str(value)) for message in messages for value in message.values()])


def _line_of(value: object) -> bytes:
    """A line of JSON; json writes what msgspec refuses, such as half of a surrogate pair."""
    try:
        return msgspec.json.encode(value) + b"\n"
    except (TypeError, UnicodeEncodeError):
        return json.dumps(value).encode() + b"\n"


def _value_of(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except msgspec.DecodeError:
        return json.loads(line)


class _Renderer:
    """The process, and a thread that reads what it writes: a pipe cannot be read with a time limit everywhere."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes)
        self.owner, self.is_ready = os.getpid(), False
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read, name="chat-templates", daemon=True)
        self.reader.start()

    def is_alive(self) -> bool:
        """Whether it can be asked; a forked process needs one of its own."""
        return self.owner == os.getpid() and self.process.poll() is None

    def wait_until_ready(self) -> None:
        if not self.is_ready:
            self.line(START_SECONDS)
            self.is_ready = True

    def send(self, request: bytes) -> None:
        """Sends a request, whose answers have to be taken before the next one: a full pipe has no time limit."""
        with suppress(BrokenPipeError):  # the missing answer tells it
            self.process.stdin.write(request)
            self.process.stdin.flush()

    def answers(self, count: int) -> list[dict]:
        """Returns the `count` answers of a request, some of which come together."""
        found: list[dict] = []
        while len(found) < count:
            found += _value_of(self.line(CPU_SECONDS))
        return found

    def close(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.reader.join()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(b"")

    def line(self, seconds: float) -> bytes:
        """The next line. Raises RenderingError when the process ends, or takes more than `seconds` or the memory."""
        begun = None
        while True:
            with suppress(queue.Empty):
                if line := self.lines.get(timeout=POLL_SECONDS):
                    return line
                raise RenderingError(f"cannot be rendered: its process ended by itself ({self.process.wait()})")
            used, memory = self._usage()
            begun = used if begun is None else begun
            if used - begun > seconds:
                raise RenderingError(f"was stopped: it computes for more than {seconds} s on one conversation")
            if memory > MEMORY_BYTES:
                raise RenderingError(f"was stopped: it takes more than {MEMORY_BYTES >> 20:,} MiB of memory")

    def _usage(self) -> tuple[float, int]:
        """(processor seconds, bytes of memory) of the process so far; zeros when it is gone."""
        try:
            process = psutil.Process(self.process.pid)
            times = process.cpu_times()
            return times.user + times.system, process.memory_info().rss
        except psutil.Error:
            return 0.0, 0


_lock = threading.Lock()
_renderer: _Renderer | None = None


@atexit.register
def close() -> None:
    """Ends the process; the next call of `render` starts another."""
    if _renderer is not None:
        _renderer.close()


class _Clock:
    """What transformers' `strftime_now`, by which a template asks for the day, takes for the class `datetime`.

    A function of our own is no way to hand in a date: transformers hands a template plain data alone.
    """

    date: str | None = None
    """In ISO 8601; None = today."""

    def now(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.date) if self.date else datetime.datetime.now()


def serve() -> None:
    """Answers the requests that come in as lines, until there are no more."""
    from transformers.utils import chat_template_utils

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    chat_template_utils.datetime = clock = _Clock()
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        request = _value_of(line)
        clock.date = request["date"]
        faulthandler.dump_traceback_later(ORPHAN_SECONDS, exit=True)
        answers, begun = [], time.perf_counter()
        for messages, opened in request["conversations"]:
            variables = request["variables"] | {"add_generation_prompt": opened, "chat_template": request["template"]}
            answers.append(_answer(chat_template_utils.render_jinja_template, messages, variables))
            if time.perf_counter() - begun > TOGETHER_SECONDS:
                _write(answers)
                answers, begun = [], time.perf_counter()
        if answers:
            _write(answers)
        faulthandler.cancel_dump_traceback_later()


def _write(answers: list[dict]) -> None:
    sys.stdout.buffer.write(_line_of(answers))
    sys.stdout.buffer.flush()


def _answer(render_jinja_template: Callable, messages: list[dict], variables: dict) -> dict:
    """{"text": …} or {"problem": …} of a conversation."""
    import jinja2

    try:
        (text,), _ = render_jinja_template(conversations=[messages], **variables)
    except jinja2.TemplateSyntaxError as error:
        return {"problem": f"is no valid Jinja: line {error.lineno}: {error.message[:500]}"}
    except Exception as error:  # a template may fail with anything
        return {"problem": f"refuses the conversation: {type(error).__name__}: {str(error)[:500]}"}
    given = len(variables["chat_template"]) + _characters(messages)
    if len(text) > GROWTH * given:
        return {"problem": f"makes a text of {len(text):,} characters of {given:,}"}
    return {"text": text}


if __name__ == "__main__":
    serve()
