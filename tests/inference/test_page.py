"""The chat page in a real browser: what a visitor types, sees and stops."""

import time
from pathlib import Path

import pytest
from inference_fixtures import COLOURS, EXTRA, NUMBERS, PLACES
from test_chat import counting

gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
pytest.importorskip("playwright", reason="browser tests need playwright: pip install playwright")
from playwright.sync_api import expect, sync_playwright  # noqa: E402

from llm_finetuning.inference import page  # noqa: E402
from llm_finetuning.inference.generation import SamplingParameters  # noqa: E402
from llm_finetuning.inference.page import loading  # noqa: E402

CHROMIUM = [Path("/usr/bin/chromium"), Path("/usr/bin/chromium-browser"), Path("/usr/bin/google-chrome")]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    path = next((path for path in CHROMIUM if path.exists()), None)
    if path is None:
        pytest.skip("no Chromium here (apt-get install chromium): the page is not tested in a browser")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(path), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def slow(chat):
    """The chat at a speed at which a visitor sees the words come and can stop them."""
    return counting(chat, delay=0.15)


@pytest.fixture(scope="module")
def address(slow):
    blocks = page.build(
        loading.in_background(lambda: slow, ""), "Tiny Phi", ["Count."], SamplingParameters(max_new_tokens=80)
    )
    yield page.launch(blocks, wait=False)
    blocks.close()


@pytest.fixture(params=[400, 1280])
def visitor(request, browser, address):
    """A page in a window of that width; anything it asks from elsewhere, and any error in it, fails the test."""
    window = browser.new_page(viewport={"width": request.param, "height": 800})
    foreign, errors = [], []
    window.on("request", lambda r: foreign.append(r.url) if "://127.0.0.1" not in r.url else None)
    window.on("pageerror", lambda error: errors.append(str(error)))
    window.goto(address)
    expect(window.locator("#line textarea")).to_be_visible(timeout=30_000)
    yield window
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == []
    assert errors == []
    window.close()


def say(window, text: str) -> None:
    window.locator("#line textarea").fill(text)
    window.keyboard.press("Enter")


def answer(window, number: int = -1):
    return window.locator("#conversation [data-testid=bot]").nth(number)


def wait_until_idle(window) -> None:
    expect(window.locator("#status")).to_contain_text("tokens/s", timeout=30_000)
    expect(window.locator("[data-testid=submit-button]")).to_be_visible()


def test_an_answer_streams_in_and_a_follow_up_uses_the_history(visitor):
    say(visitor, "Count.")
    seen = set()
    while "sixteen" not in (text := answer(visitor).inner_text(timeout=20_000)):
        seen.add(text.strip())
        time.sleep(0.1)
    assert len([part for part in seen if part and NUMBERS.startswith(part)]) > 3
    wait_until_idle(visitor)
    assert answer(visitor).inner_text().strip() == NUMBERS
    for name in ("bram", "petra"):
        visitor.reload()
        say(visitor, f"Which colour does {name} like?")
        expect(answer(visitor)).to_have_text(f"{name} likes {COLOURS[name]}.", timeout=20_000)
        wait_until_idle(visitor)
        say(visitor, "And where is the house?")
        expect(answer(visitor)).to_have_text(f"In {PLACES[name]}.", timeout=20_000)
        wait_until_idle(visitor)


def test_stop_ends_the_answer_and_the_work(visitor, slow):
    say(visitor, "Count.")
    expect(answer(visitor)).to_contain_text("two", timeout=20_000)
    visitor.locator("[data-testid=stop-button], .stop-button").first.click()
    expect(visitor.locator("[data-testid=submit-button]")).to_be_visible()
    time.sleep(0.5)
    said, steps = answer(visitor).inner_text(), slow.engine.steps
    time.sleep(1)
    assert slow.engine.steps == steps
    assert answer(visitor).inner_text() == said and "sixteen" not in said
    say(visitor, "Which colour does mira like?")
    expect(visitor.locator("#status")).to_contain_text("tokens/s", timeout=20_000)
    assert visitor.locator("#conversation [data-testid=bot]").count() == 2


def test_html_is_shown_as_text(visitor):
    say(visitor, "<b>bold</b>?")
    expect(answer(visitor)).to_have_text(EXTRA["<b>bold</b>?"], timeout=20_000)
    wait_until_idle(visitor)
    assert visitor.locator("#conversation [data-testid=user]").inner_text().strip() == "<b>bold</b>?"
    assert visitor.evaluate("window.hacked") is None
    assert visitor.locator("#conversation b").count() == 0


def test_retry_answers_again_and_edit_asks_anew(visitor):
    say(visitor, "Which colour does mira like?")
    expect(answer(visitor)).to_have_text("mira likes red.", timeout=20_000)
    wait_until_idle(visitor)
    visitor.get_by_label("Retry").click()
    expect(visitor.locator("#status")).not_to_contain_text("tokens/s")
    wait_until_idle(visitor)
    expect(answer(visitor)).to_have_text("mira likes red.")
    assert visitor.locator("#conversation [data-testid=bot]").count() == 1
    visitor.get_by_label("Edit").click()
    visitor.locator("#conversation textarea").fill("Which colour does bram like?")
    visitor.get_by_label("Submit").first.click()
    expect(answer(visitor)).to_have_text("bram likes blue.", timeout=20_000)
    wait_until_idle(visitor)
    assert visitor.locator("#conversation [data-testid=user]").count() == 1


def test_an_example_is_asked_by_a_click(visitor):
    visitor.locator("#conversation .example").click()
    expect(answer(visitor)).to_contain_text("one two", timeout=20_000)
    wait_until_idle(visitor)


def slide(visitor, name: str, value: str) -> None:
    """Types a slider's value; Gradio drops what is typed while the opened settings are still being drawn."""
    for _ in range(20):
        visitor.get_by_label(f"number input for {name}").fill(value)
        visitor.keyboard.press("Tab")
        if visitor.get_by_label(f"range slider for {name}").input_value() == value:
            return
        visitor.wait_for_timeout(250)
    raise AssertionError(f"{name} did not take {value}")


def test_the_longest_answer_can_be_set(visitor):
    visitor.get_by_text("Settings").click()
    slide(visitor, "Longest answer, in tokens", "3")
    say(visitor, "Count.")
    expect(visitor.locator("#status")).to_contain_text("3 tokens in", timeout=20_000)
    assert answer(visitor).inner_text() == "one two thre"


def test_what_is_empty_or_too_long_is_not_sent(visitor):
    say(visitor, "   ")
    expect(visitor.get_by_text("Type a question first.")).to_be_visible()
    assert visitor.locator("#conversation [data-testid=user]").count() == 0
    visitor.locator("#line textarea").fill("x" * 5_000)
    assert len(visitor.locator("#line textarea").input_value()) <= page.MAX_CHARACTERS


def test_nothing_hangs_over_the_edge(visitor):
    say(visitor, "Which colour does mira like?")
    wait_until_idle(visitor)
    width = visitor.viewport_size["width"]
    assert visitor.evaluate("document.documentElement.scrollWidth") <= width
    for place in ("#title", "#conversation", "#line"):
        box = visitor.locator(place).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_the_page_is_there_while_the_model_loads(browser, chat):
    waiting = loading.Loading("Loading tiny …")
    blocks = page.build(waiting, "Tiny Phi", [], SamplingParameters(max_new_tokens=80))
    window = browser.new_page()
    window.goto(page.launch(blocks, wait=False))
    expect(window.locator("#status")).to_contain_text("Loading tiny", timeout=20_000)
    say(window, "Count.")
    expect(window.locator("#status")).to_contain_text("still loading", timeout=20_000)
    waiting.run(lambda: chat)
    expect(answer(window)).to_have_text(NUMBERS, timeout=20_000)
    window.close()
    blocks.close()


def test_a_model_that_cannot_be_loaded_is_said(browser, tmp_path):
    from llm_finetuning.inference.chat import Chat

    failed = loading.Loading()
    with pytest.raises(FileNotFoundError):
        failed.run(lambda: Chat.load(tmp_path / "nowhere"))
    blocks = page.build(failed, "Tiny Phi", [], SamplingParameters())
    window = browser.new_page()
    window.goto(page.launch(blocks, wait=False))
    expect(window.locator("#status")).to_contain_text("nowhere is not there", timeout=20_000)
    window.close()
    blocks.close()
