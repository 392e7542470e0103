"""Chat templates are rendered in a process of their own: whatever one does, the process that asked goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hostile_templates import FOREVER, doubling
from inference_fixtures import ask, make_tokenizer

from llm_finetuning import models, prompts, template_process
from llm_finetuning.template_process import RenderingError

SOUND = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def text(template: str = SOUND, question: str = "hi") -> str:
    return template_process.render(template, [(ask(question), True)], {"eos_token": "</s>"})[0]


def test_a_sound_template_is_rendered_after_one_that_was_stopped():
    with pytest.raises(RenderingError, match="more than 1 s on"):
        text(FOREVER)
    assert text() == "user: hi</s>"


@pytest.mark.parametrize("question", ['"\\ \n\t\x00', "\ud800 half", "日本語 😀", "{{ 1 }}", np.str_("a"), "x" * 10**6])
def test_messages_arrive_as_they_are(question):
    assert text(question=question) == f"user: {question}</s>"


def test_the_process_is_begun_while_a_tokenizer_is_read(published):
    template_process.close()
    models.read_tokenizer(str(published))
    begun = template_process._renderer.process
    assert begun.poll() is None and not template_process._renderer.is_ready
    template_process.start()
    assert text() == "user: hi</s>" and template_process._renderer.process is begun


def test_no_room_renders_a_chat_template_in_its_own_process():
    package = Path(template_process.__file__).parent
    sources = {path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    calls = ("apply_chat_template(", "render_jinja_template(")
    callers = [name for name, source in sources.items() if any(call in source for call in calls)]
    assert callers == ["template_process.py"]


@pytest.mark.parametrize("characters", [2**20, 1, 40])
def test_several_conversations_come_back_in_their_order(characters, monkeypatch):
    monkeypatch.setattr(template_process, "BATCH_CHARACTERS", characters)
    asked = [(ask(str(i)), False) for i in range(200)]
    assert template_process.render("{{ messages[0].content }}", asked, {}) == [str(i) for i in range(200)]


def test_one_conversation_of_many_that_never_ends_is_stopped():
    template = SOUND + "{% if messages[0].content == '150' %}" + FOREVER + "{% endif %}"
    with pytest.raises(RenderingError, match="more than 1 s on one"):
        template_process.render(template, [(ask(str(i)), False) for i in range(300)], {"eos_token": ""})
    assert text() == "user: hi</s>"


def test_a_large_data_set_is_not_taken_for_a_template_that_takes_memory(monkeypatch):
    """One request of all of it would take more memory than a template may."""
    monkeypatch.setattr(template_process, "MEMORY_BYTES", 2**28)
    asked = [(ask(f"{i} " + 'слово "да"\n' * 300), False) for i in range(15_000)]
    texts = template_process.render("{{ messages[0].content }}", asked, {})
    assert [text.partition(" ")[0] for text in texts] == [str(i) for i in range(15_000)]


def test_a_template_of_the_parameter_is_stopped_too(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(doubling("'a'", "n.x + n.x"))
    with pytest.raises(ValueError, match=r"chat_template .*own\.jinja (was stopped|refuses .*MemoryError)"):
        prompts.template_for(make_tokenizer(), "", str(file))


def test_a_template_that_waits_for_a_word_is_stopped_when_it_comes():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = prompts.PHI2_FORMAT + "{% if 'zebra' in messages[0].content %}" + FOREVER + "{% endif %}"
    template = prompts.template_for(tokenizer)
    assert prompts.render(ask("Hello"), template)
    with pytest.raises(ValueError, match="was stopped"):
        prompts.render(ask("A zebra?"), template)


def test_threads_wait_for_one_that_is_stopped():
    """As the page's visitors do: the wrong one fails alone."""
    results = {}

    def visit(name: int, template: str) -> None:
        try:
            results[name] = text(template, str(name))
        except RenderingError as error:
            results[name] = str(error)

    threads = [threading.Thread(target=visit, args=(i, FOREVER if i == 1 else SOUND)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "was stopped" in results.pop(1)
    assert results == {i: f"user: {i}</s>" for i in (0, 2, 3, 4, 5)}


def test_an_interrupt_leaves_no_answer_for_the_next_question():
    """Ctrl-C or a stopped cell while a template is rendered."""
    main = threading.main_thread().ident
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            text("{% for a in range(99999) %}{% for b in range(300) %}{% endfor %}{% endfor %}old")
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert text() == "user: hi</s>"


def test_a_killed_process_is_replaced():
    text()
    template_process._renderer.process.kill()
    template_process._renderer.process.wait()
    assert text() == "user: hi</s>"


def test_a_process_that_dies_while_it_renders_is_said():
    text()
    process = template_process._renderer.process
    threading.Timer(0.5, process.kill).start()
    with pytest.raises(RenderingError, match="ended by itself|more than 1 s on"):
        text(FOREVER)
    assert text() == "user: hi</s>"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_asks_its_own():
    text()
    ours = template_process._renderer.process.pid
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps([text(question="child"), template_process._renderer.process.pid]).encode())
        template_process.close()
        os._exit(0)
    answer, theirs = json.loads(os.read(read, 1000))
    os.wait()
    assert answer == "user: child</s>" and theirs != ours
    assert text() == "user: hi</s>" and template_process._renderer.process.pid == ours


def test_the_process_ends_with_the_one_that_asked():
    code = (
        "from llm_finetuning import template_process as t\n"
        "t.render('{{ 1 }}', [([], True)], {})\n"
        "print(t._renderer.process.pid, flush=True)\n"
        "input()"
    )
    root = Path(template_process.__file__).parents[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    asking = subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, **pipes)
    renderer = psutil.Process(int(asking.stdout.readline()))
    asking.kill()
    asking.wait()
    assert not psutil.wait_procs([renderer], timeout=60)[1]
