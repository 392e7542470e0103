"""Many visitors at once on the page, over HTTP as its own browser code does it; and who has to wait."""

import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from inference_fixtures import COLOURS, NUMBERS, PLACES, ask, counting
from terminal_runs import wait_for

pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
import httpx
from page_fixtures import ROOM, Listening, Visitor

from llm_finetuning.inference import page
from llm_finetuning.inference.page import loading
from llm_finetuning.inference.page import visitors as queue
from llm_finetuning.inference.page.visitors import Question, Visitors

VISITORS = 50


@pytest.fixture(scope="module")
def address(serve, chat):
    return serve(chat)


@pytest.fixture
def visitor(serve, address):
    return lambda forwarded_for="": Visitor(address, serve.opened[-1], forwarded_for)


def test_fifty_visitors_at_once_each_get_their_own_answer(visitor):
    everyone = [visitor() for _ in range(VISITORS)]
    names = [list(COLOURS)[number % len(COLOURS)] for number in range(VISITORS)]
    before = None
    for _ in range(2):
        with ThreadPoolExecutor(VISITORS) as pool:
            asked = [f"Which colour does {name} like?" for name in names]
            talks = list(pool.map(lambda v, text: v.ask(text)[0], everyone, asked))
        assert [talk[-1]["content"] for talk in talks] == [f"{name} likes {COLOURS[name]}." for name in names]
        before = before or psutil.Process().memory_info().rss
    assert psutil.Process().memory_info().rss - before < 50e6


def test_a_conversation_over_http_goes_on(visitor):
    one = visitor()
    talk, status = one.ask("Which colour does bram like?")
    assert "tokens/s" in status
    assert one.ask("And where is the house?", talk)[0][-1]["content"] == f"In {PLACES['bram']}."


def test_requests_that_never_listen_take_no_place(visitor):
    flood = visitor()
    for number in range(2 * page.MAX_WAITING):
        flood.session = f"nobody {number}"
        flood.post("Count.")
    assert visitor().ask("Count.")[0][-1]["content"] == NUMBERS


@pytest.mark.parametrize(
    ("text", "problem"),
    [("x" * (page.MAX_CHARACTERS + 1), "characters are too many"), (" ", "Type a question"), ("\ud800", "half a char")],
)
def test_what_the_page_does_not_take_is_refused_by_the_server_too(visitor, text, problem):
    one = visitor()
    assert problem in one.ask(text)[1]
    assert one.ask("Count.")[0][-1]["content"] == NUMBERS


@pytest.mark.parametrize(
    "talk",
    [[{"role": "user"}], [{"role": "root", "content": "x"}], [{"role": "assistant", "content": "x"}], ["x"], [5]],
)
def test_a_conversation_that_is_none_is_refused_in_one_sentence(visitor, talk):
    assert visitor().ask("Count.", talk)[1].startswith("⚠️ ")


def test_every_page_carries_the_headers(address):
    headers = httpx.get(address).headers
    assert "default-src 'self'" in headers["content-security-policy"] and headers["x-dns-prefetch-control"] == "off"


def test_an_address_is_the_proxys_word_for_it(visitor, serve):
    visitors = serve.opened[-1].page.visitors
    seen, join = [], visitors.join
    visitors.join = lambda question: seen.append(question.address) or join(question)
    for forwarded in ("", "203.0.113.7", "10.0.0.1, 203.0.113.8"):
        visitor(forwarded).ask("Count.")
    visitors.join = join
    assert seen == ["127.0.0.1", "203.0.113.7", "203.0.113.8"]


class Waiting:
    """Visitors of a model that is not there yet, so that every question waits."""

    def __init__(self, **limits):
        self.visitors = Visitors(loading.Loading(), **limits)

    def join(self, session: str, address: str = "", listens: bool = True, text: str = "Count.") -> Question:
        if listens:
            self.visitors.listeners[session] += 1
        return self.visitors.join(Question(session, address or session, ask(text), ROOM))


def test_one_question_a_session_and_so_many_an_address_and_in_all():
    line = Waiting(limit=3, per_address=2)
    line.join("ann", "school")
    with pytest.raises(ValueError, match="still being answered"):
        line.join("ann", "school")
    line.join("bob", "school")
    with pytest.raises(ValueError, match="from your network"):
        line.join("cid", "school")
    line.join("cid", "home")
    with pytest.raises(ValueError, match="Too many visitors"):
        line.join("dora", "elsewhere")
    line.visitors.stop("bob")
    line.join("dora", "elsewhere")


def test_addresses_take_turns_and_each_is_told_its_place():
    line = Waiting(limit=9, per_address=9)
    school = [line.join(f"pupil {number}", "school") for number in range(3)]
    home = line.join("ann", "home")
    places = [line.visitors.place(question) for question in (school[0], home, school[1], school[2])]
    assert places == [f"⏳ Number {number} in the queue." for number in (1, 2, 3, 4)]
    line.visitors.seconds = 20
    assert line.visitors.place(home) == "⏳ Number 2 in the queue, about 40 s to wait."


def test_whoever_does_not_listen_is_dropped(monkeypatch, chat):
    monkeypatch.setattr(queue, "PATIENCE", 0.2)
    line = Waiting(limit=5, per_address=5)
    lost, heard = line.join("lost", listens=False), line.join("heard")
    time.sleep(0.3)
    line.visitors.loading.run(lambda: chat)
    assert lost.done.wait(60) and "connection was lost" in lost.status
    assert heard.done.wait(60) and heard.text == NUMBERS


def test_an_answer_ends_when_its_visitor_goes(monkeypatch, chat):
    monkeypatch.setattr(queue, "PATIENCE", 0.2)
    slow, line = Listening(chat, delay=0.1), Waiting(limit=5, per_address=5)
    line.visitors.loading.run(lambda: slow)
    with slow.engine.held(4):
        question = line.join("ann")
        wait_for(lambda: question.text)
        line.visitors.listeners.clear()
        time.sleep(0.3)
    assert question.done.wait(60) and question.text != NUMBERS
    assert line.join("bob").done.wait(60)


def test_answers_side_by_side_are_those_alone_and_each_stops_by_itself(chat):
    slow, line = Listening(chat, delay=0.05), Waiting(limit=9, per_address=9, side_by_side=4)
    batches, session = [], slow.engine.session
    slow.engine.session = lambda sequences: batches.append(len(sequences)) or session(sequences)
    names = list(COLOURS)[:3]
    colours = [line.join(name, text=f"Which colour does {name} like?") for name in names]
    counts, alone = line.join("counts"), line.join("alone")
    with slow.engine.held(4):
        line.visitors.loading.run(lambda: slow)
        wait_for(lambda: counts.text.startswith("one"))
        line.visitors.stop("counts")
    assert all(question.done.wait(60) for question in (*colours, counts, alone))
    assert [question.text for question in colours] == [f"{name} likes {COLOURS[name]}." for name in names]
    assert counts.text != NUMBERS and NUMBERS.startswith(counts.text) and counts.status.endswith("tokens, stopped")
    assert alone.text == NUMBERS and batches == [4, 1]


def test_a_model_that_fails_says_so_and_goes_on(chat, monkeypatch):
    broken, line = counting(chat), Waiting(limit=5, per_address=5)
    line.visitors.loading.run(lambda: broken)
    with monkeypatch.context() as patch:
        patch.setattr(broken.engine, "session", lambda sequences: 1 / 0)
        question = line.join("ann")
        assert question.done.wait(60) and "The answer failed" in question.status
    assert (again := line.join("ann")).done.wait(60) and again.text == NUMBERS
    wait_for(lambda: not line.visitors.questions)
