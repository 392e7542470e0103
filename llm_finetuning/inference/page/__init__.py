"""The chat page in Gradio, for one visitor or many: streaming, stop, retry, edit, examples, settings.

The conversation is kept as it was typed and generated, in the visitor's own browser; what is shown is a view of it.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from html import escape

import gradio as gr
from starlette.middleware import Middleware

from llm_finetuning.inference.chat import check_question
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.inference.page import markup
from llm_finetuning.inference.page.loading import Loading
from llm_finetuning.inference.page.server import Listeners, address_of
from llm_finetuning.inference.page.visitors import Question, Visitors
from llm_finetuning.inference.page.voting import Both, Vote
from llm_finetuning.inference.votes import Ballot

MAX_CHARACTERS = 4_000
"""Longest message and system message that the page takes."""
MAX_CONVERSATION = 200_000
"""Longest conversation in characters; what of it does not fit into the context is left out, from its beginning."""
MAX_NEW_TOKENS = 1_024
MAX_WAITING = 100
"""Questions in the queue, all visitors together; further ones are told to come back."""
MAX_PER_ADDRESS = MAX_WAITING // 2
"""Of these, questions from one client address: a school has one for all, and none may take every place."""
MAX_SECONDS = 300
"""Longest time for one answer, so that the next visitor gets a turn."""
REDRAW_SECONDS = 0.05
"""A fast model's pieces are gathered for this long before the page is drawn again."""
WAITING_SECONDS = 0.1
"""How often it is looked whether a visitor's turn has come, and at which place in the queue the visitor is."""
QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
GENERATING = {"queue": True, "concurrency_limit": None}


@dataclass
class Page:
    """The handlers of the page's events; most return (input line, conversation, its view, status line)."""

    loading: Loading
    visitors: Visitors
    examples: list[str]
    vote: Vote | None = None
    """Where two models answer, and visitors vote."""
    begun: set[str] = field(default_factory=set)
    """Sessions that have asked or cleared; a greeting that comes late must not draw over what they see."""

    async def ask(
        self,
        line: str,
        messages: list[dict],
        system: str,
        length: int,
        temperature: float,
        top_p: float,
        top_k: int,
        penalty: float,
        seed: int,
        event: gr.EventData,
        request: gr.Request,
    ) -> AsyncIterator[tuple]:
        """Streams the answer to what stands in the line, or to a question of the conversation that is asked again."""
        self.begun.add(request.session_hash)
        pressed = isinstance(event.target, gr.HTML)  # Submit, Retry or an example in the conversation
        try:
            whole = well_formed(messages)
            text, kept = (event.text, whole[: event.index]) if pressed else (line, _answered(whole))
            asked = [*kept, {"role": "user", "content": text}]
            check(asked, system)
            sampling = SamplingParameters(
                min(length, MAX_NEW_TOKENS), MAX_SECONDS, temperature, top_p, top_k, penalty, seed
            )
            told = [{"role": "system", "content": system}, *asked] if system.strip() else asked
            question = self._put(Question(request.session_hash, address_of(request), told, sampling))
        except ValueError as problem:
            yield gr.skip(), gr.skip(), gr.skip(), f"⚠️ {escape(str(problem))}"
            return
        yield _busy(line if pressed else ""), asked, self.view(asked), "…"
        async for answered, status in self._progress(question, asked):
            yield gr.skip(), gr.skip(), self.view(answered), status
        if question.forgotten:
            yield (gr.skip(),) * 4  # Gradio sends what came last once more
            return
        yield idle(), *self._ended(question, asked), escape(question.status)

    def _put(self, question: Question) -> Question | Both:
        """Puts a question into the queue; raises ValueError where it is refused."""
        return self.vote.ask(self.visitors, question) if self.vote else self.visitors.join(question)

    def _ended(self, question: Question | Both, asked: list[dict]) -> tuple[list[dict], str]:
        """Returns (conversation, its view) with what was answered; two answers are in the view alone."""
        if isinstance(question, Both):
            if ballot := self.vote.answered(question):
                return asked, self.view(asked, ballot)
            answered = asked if question.incomplete else _with_answer(asked, question.left.text)
        else:
            answered = _with_answer(asked, question.text)
        return answered, self.view(answered)

    def cast(self, event: gr.EventData, request: gr.Request) -> tuple:
        """Keeps a vote on two answers; the conversation goes on with the better one."""
        try:
            answered, status = self.vote.cast(event, request)
        except (ValueError, OSError) as problem:
            return gr.skip(), gr.skip(), gr.skip(), f"⚠️ {escape(str(problem))}"
        return gr.skip(), answered, self.view(answered), escape(status)

    async def _progress(self, question: Question | Both, asked: list[dict]) -> AsyncIterator[tuple[list[dict], str]]:
        """Yields (conversation, status line) whenever one of them is new, until the answer is over."""
        before = None
        while not question.over:
            if not self.loading.done.is_set():
                status = "⏳ The model is still loading; the answer comes as soon as it is there."
            else:
                first = question.left if isinstance(question, Both) else question
                status = escape(self.visitors.place(first) or question.status or "…")
            now = (question.text, status)
            if now != before:
                yield _with_answer(asked, question.text), status
            before = now
            await asyncio.sleep(REDRAW_SECONDS if question.stream else WAITING_SECONDS)

    def undo(self, messages: list[dict], event: gr.EventData, request: gr.Request) -> tuple:
        """Drops the last turn and puts its question back into the input line."""
        self.visitors.stop(request.session_hash, forget=True)
        messages = messages[: event.index]
        return idle() | {"value": event.text}, messages, self.view(messages), ""

    def clear(self, request: gr.Request) -> tuple:
        self.begun.add(request.session_hash)
        self.visitors.stop(request.session_hash, forget=True)
        return idle(), [], self.view([]), ""

    def stop(self, request: gr.Request) -> None:
        """Ends the answer; its own event then shows what there is of it, if the page is still open."""
        self.visitors.stop(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        """Ends the answer of a visitor who has closed the page, and forgets the session."""
        self.stop(request)
        self.begun.discard(request.session_hash)
        if self.vote:
            self.vote.box.leave(request.session_hash)

    async def greet(self, messages: list[dict], request: gr.Request) -> AsyncIterator[tuple]:
        """Yields (view, about, status line) for a visitor who opens the page, until the model is there."""
        try:
            kept = well_formed(messages)
        except ValueError:
            kept = []
        begun, ready = request.session_hash in self.begun, self.loading.done.is_set()
        status = gr.skip() if begun or ready else f"⏳ {escape(self.loading.message)}"
        yield gr.skip() if begun else self.view(kept), "", status
        while not self.loading.done.is_set():
            await asyncio.sleep(WAITING_SECONDS)
        problem = f"⚠️ {escape(self.loading.error)}" if self.loading.error else ""
        begun = ready or request.session_hash in self.begun  # then the status may be that of an answer
        yield gr.skip(), escape(self.loading.about()), problem or (gr.skip() if begun else "")

    def view(self, messages: list[dict], ballot: Ballot | None = None) -> str:
        return markup.conversation(messages, self.examples, ballot)


def well_formed(messages: object) -> list[dict]:
    """Returns the conversation that the browser has kept; raises ValueError for anything else."""
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        kinds = {type(message.get(key)) for message in messages for key in ("role", "content")}
        if kinds <= {str}:
            return messages
    raise ValueError("The conversation in this browser is broken: begin a new one.")


def check(messages: list[dict], system: str) -> None:
    """Raises ValueError for a conversation that the page does not take."""
    if not messages[-1]["content"].strip():
        raise ValueError("Type a question first.")
    check_question(messages)
    for name, text in {"message": messages[-1]["content"], "system message": system}.items():
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{len(text):,} characters are too many for a {name}: {MAX_CHARACTERS:,} at most.")
    if sum(len(message["content"]) for message in messages) > MAX_CONVERSATION:
        raise ValueError("The conversation has become too long: begin a new one.")


def _answered(messages: list[dict]) -> list[dict]:
    """Returns a conversation without a last question that got no answer: stopped at once, or refused."""
    return messages[:-1] if messages and messages[-1]["role"] == "user" else messages


def _with_answer(asked: list[dict], text: str) -> list[dict]:
    return [*asked, {"role": "assistant", "content": text}] if text else asked


def _busy(line: str) -> dict:
    """Returns the input line while an answer is generated."""
    return gr.update(value=line, submit_btn=False, stop_btn="Stop")


def idle() -> dict:
    return gr.update(submit_btn="Send", stop_btn=False)


def build(
    loading: Loading,
    title: str,
    examples: list[str],
    defaults: SamplingParameters,
    side_by_side: int = 0,
    vote: Vote | None = None,
) -> gr.Blocks:
    """Builds the page.

    side_by_side: answers that are generated in one batch; 0 = as suits the machine.
    vote: shows the answers of two models without their names, and takes votes on them.
    """
    page = Page(loading, Visitors(loading, MAX_WAITING, MAX_PER_ADDRESS, side_by_side), examples, vote)
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as blocks:
        gr.Markdown(f"# {title}", elem_id="title")
        about = gr.HTML(elem_id="about")
        messages = gr.BrowserState([], storage_key="llm_finetuning", secret="llm_finetuning")  # outlives a restart
        view = gr.HTML(page.view([]), elem_id="conversation", js_on_load=markup.SCRIPT, autoscroll=True)
        status = gr.HTML(elem_id="status")
        line = gr.Textbox(
            elem_id="line",
            label="Message",
            show_label=False,
            placeholder="Type a message …",
            lines=1,
            max_lines=6,
            submit_btn="Send",
            autofocus=True,
        )
        _events(page, blocks, about, [line, messages, view, status])
        _asking(page, [line, messages, view, status], _settings(defaults))
    blocks.page = page
    return blocks.queue(max_size=None)


def _asking(page: Page, shown: list, settings: list) -> None:
    line, messages, view, _ = shown
    gr.on(
        [line.submit, view.submit],
        page.ask,
        [line, messages, *settings],
        shown,
        trigger_mode="multiple",
        **QUICK | GENERATING,
    )


def _events(page: Page, blocks: gr.Blocks, about: gr.HTML, shown: list) -> None:
    """Makes the buttons below the line, and ties events to what is shown: line, conversation, its view, status."""
    line, messages, view, status = shown
    with gr.Row():
        clear, export = (gr.Button(name, size="sm", min_width=100) for name in ("New conversation", "Export"))
    line.stop(page.stop, **QUICK)
    view.undo(page.undo, [messages], shown, **QUICK)
    if page.vote:
        view.select(page.cast, None, shown, **QUICK)
    clear.click(page.clear, None, shown, **QUICK)
    export.click(None, [messages], None, js=markup.EXPORT)
    blocks.unload(page.leave)
    blocks.load(page.greet, [messages], [view, about, status], **QUICK | GENERATING)


def _settings(defaults: SamplingParameters) -> list:
    """Makes the controls, in the order in which `Page.ask` takes them."""
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        system = gr.Textbox(
            "",
            label="System message",
            placeholder="How the model should behave; empty: as it was trained",
            lines=2,
        )
        length = gr.Slider(1, MAX_NEW_TOKENS, defaults.max_new_tokens, step=1, label="Longest answer, in tokens")
        with gr.Row():
            temperature = gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature", info="0: greedy")
            top_p = gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p", info="Share of the likeliest words")
        with gr.Row():
            top_k = gr.Slider(0, 200, defaults.top_k, step=1, label="Top-k", info="0: all words")
            penalty = gr.Slider(1, 2, defaults.repetition_penalty, step=0.05, label="Repetition penalty", info="1: off")
            seed = gr.Number(
                defaults.seed, label="Seed", info="-1: another each time", precision=0, minimum=-1, maximum=2**31
            )
    return [system, length, temperature, top_p, top_k, penalty, seed]


def launch(blocks: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> str:
    """Serves the page and returns its address; the page loads nothing from elsewhere, and its headers forbid it."""
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=not wait,
        show_error=True,
        quiet=True,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=markup.STYLE,
        footer_links=[],
        ssr_mode=False,
        max_threads=4 * MAX_WAITING,  # events at a time: those in line, as many to which nobody listens, and room
        app_kwargs={"middleware": [Middleware(Listeners, blocks.page.visitors.listeners)]},
    )
    return address
