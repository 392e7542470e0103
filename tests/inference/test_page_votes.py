"""Blind votes on the page: what a visitor sees before and after the vote, and what is kept of it."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from inference_fixtures import NUMBERS
from terminal_runs import wait_for

pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
pytest.importorskip("playwright", reason="browser tests need playwright: pip install playwright")
from page_fixtures import Listening, Visitor
from playwright.sync_api import expect

from llm_finetuning.evaluation import votes
from llm_finetuning.inference.page.voting import Vote
from llm_finetuning.inference.votes import CHOICES, BallotBox

NAMES = ["tuned-7f3a", "plain-c41d"]
OTHER = "zero, and nothing after it"
PICKS = {"A": "A is better", "B": "B is better"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def others(chat):
    return [Listening(chat), Listening(chat, says=OTHER)]


@pytest.fixture(scope="module")
def address(serve, others, file):
    vote = Vote(NAMES, BallotBox(file), lambda: votes.so_far(file, NAMES[::-1]))
    return serve(others[0], against=others[1], vote=vote)


@pytest.fixture
def visitor(serve, address):
    return lambda: Visitor(address, serve.opened[-1])


def answers_of(view: str) -> dict[str, str]:
    """{"A": text, "B": text} of the two answers in a view."""
    shown = re.findall(r'data-testid="answer-([AB])">(.*?)</div>', view, re.S)
    return {letter: re.sub("<.*?>", "", text).strip() for letter, text in shown}


def cast(visitor: Visitor, choice: str, view: str = "") -> tuple[list, str]:
    """(conversation, status line) after a vote on what is in view."""
    ballot = re.search(r'data-action="select" data-index="0" data-text="([^"]+)"', view or visitor.view)[1]
    _, conversation, visitor.view, status = visitor.press("cast", [], index=list(CHOICES).index(choice), text=ballot)
    return conversation, status


def test_nothing_that_is_sent_before_the_vote_tells_whose_answer_is_whose(visitor):
    """Both orders come up, whatever the model's place, and only the vote's own answer names the models."""
    first = set()
    for number in range(40):  # both orders are missing once in 2**39
        one = visitor()
        talk, status = one.ask(f"Count {number}." if first == {NUMBERS, OTHER} else "Count.")
        assert status == "Which answer is better?" and [message["role"] for message in talk] == ["user"]
        assert not [line for line in one.heard if any(name in line for name in NAMES)]
        first.add(answers_of(one.view)["A"])
        if first == {NUMBERS, OTHER}:
            break
    assert first == {NUMBERS, OTHER}
    assert all((NUMBERS in line) == (OTHER in line) for line in one.heard), "no answer comes before the other"


def test_votes_of_one_session_count_once_a_question(visitor, file):
    one, before = visitor(), len(votes.read(file))
    one.ask("Count.")
    talk, status = cast(one, "left")
    assert "Your vote is counted." in status and talk[-1]["content"] == votes.read(file)[-1]["answers"][0]
    for again in ("Count.", " COUNT"):
        one.ask(again)
        assert "Your first vote on this question is counted." in cast(one, "right")[1]
    assert len(votes.read(file)) == before + 1
    one.ask("Count.", talk)  # with what was said before it is another question
    cast(one, "both bad")
    other = visitor()
    other.ask("Count.")
    cast(other, "tie")
    assert [vote["choice"] for vote in votes.read(file)[before:]] == ["left", "both bad", "tie"]
    assert [len(vote["history"]) for vote in votes.read(file)[before:]] == [0, 2, 0]
    assert set(votes.read(file)[-1]) == {"prompt", "history", "models", "answers", "choice"}
    left = re.escape(f"{NAMES[0]} preferred to {NAMES[1]}: ")
    assert re.search(left + r"0\.\d{3} \(0\.\d{3} to 0\.\d{3}, n = \d+\)", cast_again(visitor))


def cast_again(visitor) -> str:
    one = visitor()
    one.ask("Which colour does mira like?")
    return cast(one, "tie")[1]


def test_a_vote_needs_an_open_ballot_of_its_own_session(visitor, file):
    one, other, before = visitor(), visitor(), len(votes.read(file))
    one.ask("Count.")
    view = one.view
    for pressed in ({"index": 0, "text": "guessed"}, {"index": 9, "text": "x"}, {"index": "0", "text": 5}, {}):
        assert one.press("cast", [], **pressed)[3].startswith("⚠️ ")
    other.view = view
    assert "closed" in cast(other, "left")[1]
    cast(one, "left")
    assert "closed" in cast(one, "left", view)[1]
    one.ask("Count.")
    view = one.view
    one.ask("Which colour does bram like?")
    assert "closed" in cast(one, "left", view)[1], "a new question takes the ballot back"
    assert len(votes.read(file)) == before + 1


def test_a_full_disk_keeps_the_ballot_open(visitor, file, monkeypatch):
    from llm_finetuning.inference import votes as box

    one, before = visitor(), len(votes.read(file))
    one.ask("Which colour does petra like?")
    view = one.view
    with monkeypatch.context() as patch:
        patch.setattr(box.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "No space left" in cast(one, "left")[1]
    assert cast(one, "left", view)[0]
    assert len(votes.read(file)) >= before + 1


def test_alike_answers_and_a_model_that_fails_ask_for_no_vote(serve, chat, tmp_path, monkeypatch):
    same, broken = Listening(chat), Listening(chat, says="x")
    monkeypatch.setattr(broken.engine, "session", lambda sequences: 1 / 0)
    for other, said in ((same, "Both models give this answer."), (broken, "The answer failed")):
        vote = Vote(NAMES, BallotBox(tmp_path / "votes.jsonl"), str)
        one = Visitor(serve(Listening(chat), against=other, vote=vote), serve.opened[-1])
        talk, status = one.ask("Count.")
        assert said in status and 'data-action="select"' not in one.view
        assert [message["content"] for message in talk] == ["Count."] + [NUMBERS] * (other is same)
    assert not (tmp_path / "votes.jsonl").exists()


def test_a_page_of_one_model_takes_no_votes(serve, chat):
    serve(Listening(chat))
    assert "cast" not in {function.name for function in serve.opened[-1].fns.values()}


def test_stop_ends_both_answers_and_opens_no_ballot(serve, chat, tmp_path):
    slow = [Listening(chat, delay=0.1), Listening(chat, delay=0.1, says=OTHER)]
    vote = Vote(NAMES, BallotBox(tmp_path / "votes.jsonl"), str)
    one = Visitor(serve(slow[0], against=slow[1], vote=vote), serve.opened[-1])
    with ThreadPoolExecutor(1) as pool:
        with slow[0].engine.held(4), slow[1].engine.held(4):
            asked = pool.submit(one.ask, "Count.")
            wait_for(lambda: slow[0].engine.steps + slow[1].engine.steps > 2)
            stopper = Visitor(str(one.http.base_url).removesuffix("gradio_api/"), serve.opened[-1])
            stopper.session = one.session
            stopper.press("stop", [])
        assert asked.result() == ([{"role": "user", "content": "Count."}], "Stopped.")
    assert answers_of(one.view) == {} and slow[0].engine.steps + slow[1].engine.steps < 20


@pytest.mark.browser
def test_answers_have_no_names_until_the_vote_and_the_better_one_goes_on(new_window, address, file, others):
    window = new_window()
    sent = []
    window.on("response", lambda r: sent.append(r.url) if "://127.0.0.1" in r.url else None)
    window.goto(address)
    window.locator("#line textarea").fill("  Count.\n")
    window.keyboard.press("Enter")
    expect(window.locator("#status")).to_contain_text("Which answer is better?")
    shown = {letter: window.locator(f"[data-testid=answer-{letter}]").inner_text().strip() for letter in "AB"}
    assert set(shown.values()) == {NUMBERS, OTHER}
    stored = window.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")
    for name in NAMES:
        assert name not in window.content() + stored
    better = next(letter for letter, text in shown.items() if text == OTHER)
    window.get_by_role("button", name=PICKS[better]).click()
    expect(window.locator("#conversation [data-testid=bot]")).to_have_text(OTHER)
    first, second = NAMES if better == "B" else NAMES[::-1]
    expect(window.locator("#status")).to_contain_text(f"A was {first}, B was {second}.")
    expect(window.locator("#status")).to_contain_text("preferred to")
    assert votes.read(file)[-1] == {
        "prompt": "  Count.\n",
        "history": [],
        "models": [first, second],
        "answers": [NUMBERS, OTHER] if better == "B" else [OTHER, NUMBERS],
        "choice": "right" if better == "B" else "left",
    }
    window.locator("#line textarea").fill("Really?")
    window.keyboard.press("Enter")
    expect(window.locator("#status")).to_contain_text("Which answer is better?")
    told = [{"role": "user", "content": "  Count.\n"}, {"role": "assistant", "content": OTHER}]
    for other in others:
        assert other.asked[-1] == [*told, {"role": "user", "content": "Really?"}]
