"""The chat page for tests: a server for each model, visitors without a browser, a model that says what it should."""

import json
import os
import subprocess
import sys
import uuid

import httpx
import pytest
from inference_fixtures import Counting

from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters

ROOM = SamplingParameters(max_new_tokens=80)


class Listening(Chat):
    """A chat that notes what it is asked, `delay` seconds a step; `says` = what it answers, in ten tokens."""

    def __init__(self, chat: Chat, delay: float = 0.0, says: str = ""):
        super().__init__(Counting(chat.engine, delay), chat.template, chat.rules, chat.is_sample)
        self.asked, self.streams, self.says = [], [], says

    def stream(self, messages, sampling):
        self.asked.append(messages)
        self.streams.append(super().stream(messages, sampling))
        return self.streams[-1]

    def text(self, ids):
        return self.says[: (len(self.says) // 10 + 1) * len(ids)] if self.says else super().text(ids)


@pytest.fixture
def busy_machine():
    """Keeps every core busy while a test runs."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    yield
    for process in busy:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def serve():
    """serve(chat, side_by_side) → the address of a page with this chat, until the module's tests are over.

    against: a second chat, whose answers stand beside the first's under `vote`.
    """
    pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
    from llm_finetuning.inference import page
    from llm_finetuning.inference.page import loading

    opened = []

    def start(chat: Chat | None, side_by_side: int = 0, waiting=None, against=None, vote=None) -> str:
        waiting = waiting or loading.in_background(lambda: chat, "", (lambda _: against) if against else None)
        opened.append(page.build(waiting, "Tiny Phi", ["Count."], ROOM, side_by_side, vote))
        return page.launch(opened[-1], wait=False)

    start.opened = opened
    yield start
    for blocks in opened:
        blocks.close()


class Visitor:
    """A session of the page without a browser, over HTTP as the page's own code does it."""

    def __init__(self, address: str, blocks, forwarded_for: str = ""):
        headers = {"x-forwarded-for": forwarded_for} if forwarded_for else {}
        self.http = httpx.Client(base_url=f"{address}gradio_api", timeout=120, headers=headers)
        self.events = {function.name: number for number, function in reversed(blocks.fns.items())}
        self.session = uuid.uuid4().hex

    def press(self, handler: str, data: list, **pressed) -> list:
        """Presses something on the page; returns what its handler changes."""
        body = {"data": data, "event_data": pressed, "fn_index": self.events[handler], "session_hash": self.session}
        return self.http.post("/run/predict", json=body).raise_for_status().json()["data"]

    def post(self, text: str, messages: list | None = None) -> str:
        """Sends a question without listening for its answer; returns the event's id."""
        data = [text, messages or [], "", 80, 0, 1, 0, 1, 0]
        body = {"data": data, "fn_index": self.events["ask"], "session_hash": self.session}
        sent = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
        return self.http.post("/queue/join", **sent).raise_for_status().json()["event_id"]

    def ask(self, text: str, messages: list | None = None) -> tuple[list, str]:
        """(conversation, status line) at the end of an answer; `view` is then its HTML, `heard` all that was sent."""
        event = self.post(text, messages)
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as lines:
            self.heard = []
            spoken = (self.heard.append(line) or line for line in lines.iter_lines())
            _, conversation, self.view, status = _last_output(spoken, event)
        return conversation, status


def _last_output(lines, event: str) -> list:
    """The values of an event's end; while it goes on, the server sends the first values whole, then changes."""
    whole = None
    for line in lines:
        message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
        if message.get("event_id") != event or "output" not in message:
            continue
        assert message.get("success", True), message
        data = message["output"]["data"]
        if message["msg"] == "process_generating":
            whole = data if whole is None else [_changed(w, d) for w, d in zip(whole, data, strict=True)]
        elif message["msg"] == "process_completed":
            return whole or data
    raise AssertionError("the server closed the stream before the end")


def _changed(value, changes):
    """Gradio's differences: [action, path, value] each."""
    for action, path, new in changes:
        if not path:
            value = value + new if action == "append" else new
            continue
        place = value
        for step in path[:-1]:
            place = place[step]
        if action == "append":
            place[path[-1]] += new
        elif action == "add" and isinstance(place, list):
            place.insert(path[-1], new)
        elif action == "delete":
            del place[path[-1]]
        else:
            place[path[-1]] = new
    return value
