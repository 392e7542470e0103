"""A model that is loaded in the background, so that the page opens at once."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_finetuning.inference.chat import Chat

SAMPLE = "This is the tiny sample model: it knows a few dozen facts of an invented world, and nothing else."


@dataclass
class Loading:
    """The state of loading a model; `done` is set when it is there, or when `error` says why it is not."""

    message: str = "The model is loading …"
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)
    _chat: Chat | None = None

    def chat(self) -> Chat:
        """Returns the loaded chat; raises ValueError with the reason where loading failed."""
        if self._chat is None:
            raise ValueError(self.error or self.message)
        return self._chat

    def about(self) -> str:
        """Says what the visitor should know of the model; "" if nothing, or as long as it is not there."""
        return SAMPLE if self._chat is not None and self._chat.is_sample else ""

    def run(self, load: Callable[[], Chat]) -> None:
        """Loads the model. An error is kept for the visitors, and raised for whoever started the page."""
        try:
            self._chat = load()
        except Exception as error:
            self.error = f"The model could not be loaded: {error}"
            raise
        finally:
            self.done.set()


def in_background(load: Callable[[], Chat], message: str) -> Loading:
    """Starts loading in a thread of its own; the page shows `message` meanwhile."""
    loading = Loading(message)
    threading.Thread(target=loading.run, args=(load,), daemon=True).start()
    return loading
