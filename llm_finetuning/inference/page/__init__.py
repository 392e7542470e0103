"""The chat page in Gradio, for one visitor or many: streaming, stop, retry, edit, examples, settings."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import gradio as gr

from llm_finetuning.inference import tables
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.inference.page.loading import Loading
from llm_finetuning.inference.page.markup import STYLE, as_shown, as_typed, text_of
from llm_finetuning.inference.page.visitors import Visitors

MAX_CHARACTERS = 4_000
"""Longest message and system message that the page takes."""
MAX_NEW_TOKENS = 1_024
MAX_WAITING = 100
"""Questions in the queue, all visitors together; further ones are told to come back."""
MAX_SECONDS = 300
"""Longest time for one answer, so that the next visitor gets a turn."""
REDRAW_SECONDS = 0.05
"""A fast model's pieces are gathered for this long before the page is drawn again."""


@dataclass
class Page:
    """The handlers of the page's events; most return (input line, conversation, status line)."""

    loading: Loading
    visitors: Visitors = field(default_factory=lambda: Visitors(MAX_WAITING, 2 * MAX_SECONDS))

    def enter(self, text: str, shown: list[dict], request: gr.Request) -> tuple:
        """Puts a visitor's message into the conversation and the queue."""
        problem = _problem_of(text) or self.visitors.refusal(request.session_hash)
        if problem:
            return gr.skip(), gr.skip(), f"⚠️ {problem}"
        if shown and shown[-1]["role"] == "user":  # it got no answer: stopped, or refused
            shown = shown[:-1]
        busy = gr.update(value="", submit_btn=False, stop_btn=True)  # the input line while an answer is generated
        return busy, [*shown, {"role": "user", "content": as_shown(text)}], "…"

    def example(self, shown: list[dict], request: gr.Request, event: gr.SelectData) -> tuple:
        return self.enter(event.value["text"], shown, request)

    def retry(self, shown: list[dict], request: gr.Request, event: gr.RetryData) -> tuple:
        """Asks the question of a turn again; its answer and what followed are dropped."""
        messages = _up_to_question(shown, event.index)
        return self.enter(as_typed(text_of(messages[-1])), messages[:-1], request)

    def edit(self, shown: list[dict], request: gr.Request, event: gr.EditData) -> tuple:
        """Asks the edited question instead of the old one; what followed is dropped."""
        return self.enter(as_typed(event.value), shown[: _first(event.index)], request)

    def undo(self, shown: list[dict], event: gr.UndoData) -> tuple:
        """Drops the last turn and puts its question back into the input line."""
        messages = _up_to_question(shown, event.index)
        return gr.update(value=as_typed(text_of(messages[-1]))), messages[:-1], ""

    def answer(
        self,
        shown: list[dict],
        system: str,
        length: int,
        temperature: float,
        top_p: float,
        top_k: int,
        penalty: float,
        seed: int,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Streams the answer to the last message; yields (conversation, status line)."""
        if not self.visitors.take(request.session_hash):
            yield gr.skip(), gr.skip()
            return
        sampling = SamplingParameters(length, MAX_SECONDS, temperature, top_p, top_k, penalty, seed)
        try:
            for _ in self.loading.waiting():
                yield shown, "⏳ The model is still loading; the answer comes as soon as it is there."
            yield from self._stream(self.loading.chat(), shown, system, sampling)
        except ValueError as error:
            yield shown, f"⚠️ {as_shown(str(error))}"
        finally:
            self.visitors.leave(request.session_hash)

    def _stream(self, chat: Chat, shown: list[dict], system: str, sampling: SamplingParameters) -> Iterator[tuple]:
        asked = [{"role": message["role"], "content": as_typed(text_of(message))} for message in shown]
        if system.strip():
            asked = [{"role": "system", "content": system[:MAX_CHARACTERS]}, *asked]
        stream = chat.stream(asked, sampling)
        answer, drawn = "", 0.0
        with closing(stream):
            yield gr.skip(), stream.note or "…"
            for piece in stream:
                answer += piece
                if time.monotonic() - drawn > REDRAW_SECONDS:
                    yield [*shown, _said(answer)], stream.note
                    drawn = time.monotonic()
        yield [*shown, _said(answer)], f"{tables.speed(stream.result)} {stream.note}"

    def status(self) -> Iterator[str]:
        """Yields what a visitor who opens the page sees, until the model is there."""
        for _ in self.loading.waiting():
            yield f"⏳ {self.loading.message}"
        yield "" if not self.loading.error else f"⚠️ {as_shown(self.loading.error)}"

    def leave(self, request: gr.Request) -> None:
        """Forgets a visitor who closed the page."""
        self.visitors.leave(request.session_hash)

    def stop(self, request: gr.Request) -> tuple[dict, str]:
        self.leave(request)
        return idle(), ""

    def rest(self, request: gr.Request) -> dict:
        """Returns the input line after an answer."""
        return gr.skip() if request.session_hash in self.visitors.tickets else idle()


def _problem_of(text: str) -> str:
    if not text.strip():
        return "Type a question first."
    if len(text) > MAX_CHARACTERS:
        return f"{len(text):,} characters are too many: {MAX_CHARACTERS:,} at most."
    return ""


def _said(answer: str) -> dict:
    return {"role": "assistant", "content": as_shown(answer)}


def _first(index: int | list[int]) -> int:
    return index[0] if isinstance(index, list | tuple) else index


def _up_to_question(shown: list[dict], index: int | list[int]) -> list[dict]:
    """Returns the conversation up to the user's message at or before `index`."""
    last = _first(index)
    while shown[last]["role"] != "user":
        last -= 1
    return shown[: last + 1]


def idle() -> dict:
    return gr.update(submit_btn=True, stop_btn=False)


def build(loading: Loading, title: str, examples: list[str], defaults: SamplingParameters) -> gr.Blocks:
    """Builds the page; one answer is generated at a time, and further questions wait in the queue."""
    page = Page(loading)
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as blocks:
        gr.Markdown(f"# {title}", elem_id="title")
        shown = gr.Chatbot(
            elem_id="conversation",
            show_label=False,
            height="66vh",
            placeholder="Ask something. The answer comes word by word; **Stop** ends it.",
            examples=[{"text": example} for example in examples],
            editable="user",
            buttons=["copy"],
            latex_delimiters=[],
            allow_tags=False,
            layout="bubble",
        )
        status = gr.Markdown("", elem_id="status", container=False)
        line = gr.Textbox(
            elem_id="line",
            show_label=False,
            placeholder="Type a message …",
            lines=1,
            max_lines=6,
            max_length=MAX_CHARACTERS,
            submit_btn=True,
            autofocus=True,
        )
        settings = _settings(defaults)
        _events(page, blocks, shown, status, line, settings)
    return blocks.queue(max_size=MAX_WAITING)


def _settings(defaults: SamplingParameters) -> list:
    """Makes the controls, in the order in which `Page.answer` takes them."""
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        system = gr.Textbox(
            "",
            label="System message",
            placeholder="How the model should behave; empty: as it was trained",
            max_length=MAX_CHARACTERS,
            lines=2,
        )
        length = gr.Slider(1, MAX_NEW_TOKENS, defaults.max_new_tokens, step=1, label="Longest answer, in tokens")
        with gr.Row():
            temperature = gr.Slider(
                0, 2, defaults.temperature, step=0.05, label="Temperature", info="0: always the likeliest word"
            )
            top_p = gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p", info="Share of the likeliest words")
        with gr.Row():
            top_k = gr.Slider(0, 200, defaults.top_k, step=1, label="Top-k", info="0: all words")
            penalty = gr.Slider(1, 2, defaults.repetition_penalty, step=0.05, label="Repetition penalty", info="1: off")
            seed = gr.Number(
                defaults.seed, label="Seed", info="-1: another each time", precision=0, minimum=-1, maximum=2**31
            )
    return [system, length, temperature, top_p, top_k, penalty, seed]


def _events(
    page: Page, blocks: gr.Blocks, shown: gr.Chatbot, status: gr.Markdown, line: gr.Textbox, settings: list
) -> None:
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    began = [line, shown, status]
    starts = [
        line.submit(page.enter, [line, shown], began, **quick),
        shown.example_select(page.example, [shown], began, **quick),
        shown.retry(page.retry, [shown], began, **quick),
        shown.edit(page.edit, [shown], began, **quick),
    ]
    queued = quick | {"queue": True, "concurrency_limit": 1, "concurrency_id": "answers"}
    answers = [start.success(page.answer, [shown, *settings], [shown, status], **queued) for start in starts]
    for answer in answers:
        answer.then(page.rest, None, [line], **quick)
    line.stop(page.stop, None, [line, status], cancels=answers, **quick)
    shown.undo(page.undo, [shown], began, **quick)
    shown.clear(page.stop, None, [line, status], cancels=answers, **quick)
    blocks.load(page.status, None, [status], concurrency_limit=None, show_progress="hidden", api_visibility="private")
    blocks.unload(page.leave)


def launch(blocks: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> str:
    """Serves the page and returns its address; the page loads nothing from elsewhere."""
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=not wait,
        show_error=True,
        quiet=True,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        footer_links=[],
        ssr_mode=False,
        max_threads=MAX_WAITING,
    )
    return address
