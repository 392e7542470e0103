"""A model that loads in the background while the page is already there."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_finetuning.inference.chat import Chat


@dataclass
class Loading:
    """`done` is set when the model is there, or when `error` says why it is not."""

    message: str = "The model is loading …"
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)
    _chat: Chat | None = None

    def chat(self) -> Chat:
        """The loaded chat; raises ValueError with the reason where loading failed."""
        if self._chat is None:
            raise ValueError(self.error or self.message)
        return self._chat

    def run(self, load: Callable[[], Chat]) -> None:
        """Loads. What goes wrong is kept for the visitors and raised for who started it."""
        try:
            self._chat = load()
        except Exception as error:
            self.error = f"The model could not be loaded: {error}"
            raise
        finally:
            self.done.set()


def in_background(load: Callable[[], Chat], message: str = "The model is loading …") -> Loading:
    loading = Loading(message)
    threading.Thread(target=loading.run, args=(load,), daemon=True).start()
    return loading


def loaded(chat: Chat) -> Loading:
    """A chat that is there already."""
    loading = Loading()
    loading.run(lambda: chat)
    return loading
