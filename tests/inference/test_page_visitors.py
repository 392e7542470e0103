"""Many visitors at once on the page, over HTTP as its own browser code does it; and who has to wait."""

import json
import resource
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from inference_fixtures import COLOURS, NUMBERS

pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
import httpx

from llm_finetuning.inference import page
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.inference.page import loading
from llm_finetuning.inference.page.markup import as_shown, as_typed, text_of
from llm_finetuning.inference.page.visitors import Visitors

VISITORS = 50


class Visitor:
    """A session of the page without a browser."""

    def __init__(self, address: str, events: dict[str, int], settings: list):
        self.http = httpx.Client(base_url=f"{address}gradio_api", timeout=120)
        self.events, self.settings, self.session = events, settings, uuid.uuid4().hex

    def ask(self, text: str) -> tuple[str, str]:
        """(answer, status line) for a question in a new conversation."""
        _, shown, status = self._call("enter", [text, []])
        shown, status = self._call("answer", [shown, *self.settings])
        return as_typed(text_of(shown[-1])), status

    def _call(self, name: str, data: list) -> list:
        body = {"data": data, "fn_index": self.events[name], "session_hash": self.session}
        event = self.http.post("/queue/join", json=body).raise_for_status().json()["event_id"]
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as lines:
            return _last_output(lines.iter_lines(), event)


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


@pytest.fixture
def visitors(chat):
    blocks = page.build(loading.in_background(lambda: chat, ""), "Tiny Phi", [], SamplingParameters(max_new_tokens=80))
    address = page.launch(blocks, wait=False)
    events = {}
    for number, function in blocks.fns.items():
        events.setdefault(function.name, number)
    yield lambda: Visitor(address, events, ["", 80, 0, 1, 0, 1, 0])
    blocks.close()


def test_fifty_visitors_at_once_each_get_their_own_answer(visitors):
    everyone = [visitors() for _ in range(VISITORS)]
    names = [list(COLOURS)[number % len(COLOURS)] for number in range(VISITORS)]
    before = None
    for _ in range(3):
        with ThreadPoolExecutor(VISITORS) as pool:
            asked = [f"Which colour does {name} like?" for name in names]
            answers = list(pool.map(lambda v, text: v.ask(text)[0], everyone, asked))
        assert answers == [f"{name} likes {COLOURS[name]}." for name in names]
        before = before or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 50e6


def test_a_visitor_asks_one_question_at_a_time():
    visitors = Visitors(limit=2, lost_after=60)
    assert visitors.refusal("ann") == ""
    assert "still being answered" in visitors.refusal("ann")
    assert visitors.refusal("bob") == ""
    assert "Too many visitors" in visitors.refusal("cid")
    assert visitors.take("ann") and not visitors.take("ann")
    visitors.leave("ann")
    assert visitors.refusal("cid") == "" and not visitors.take("ann")


def test_a_lost_ticket_is_forgotten():
    visitors = Visitors(limit=1, lost_after=0)
    assert visitors.refusal("ann") == "" and visitors.refusal("bob") == ""


def test_a_message_that_is_too_long_is_refused_by_the_server_too(visitors):
    visitor = visitors()
    _, _, status = visitor._call("enter", ["x" * (page.MAX_CHARACTERS + 1), []])
    assert "characters are too many" in status
    assert visitor.ask("Count.")[0] == NUMBERS


@pytest.mark.parametrize(
    "text", ["", "a < b & c", "<b>x</b> `<i>` <u>", "```html\n<p>\n``` &lt;", "&amp;lt; &", "open ``` <b>", "``<a>``"]
)
def test_what_is_shown_can_be_read_back(text):
    assert as_typed(as_shown(text)) == text
