"""A model that is loaded in the background, so that the page opens at once."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_finetuning.inference.chat import Chat

SAMPLE = "This is the tiny sample model: it knows a few dozen facts of an invented world, and nothing else."


@dataclass
class Loading:
    """The state of loading a model, or two; `done` is set when all are there, or when `error` says why not."""

    message: str = "The model is loading …"
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)
    _chats: list[Chat] = field(default_factory=list)

    def chat(self, number: int = 0) -> Chat:
        """Returns a loaded chat, the first or the second; raises ValueError with the reason where loading failed."""
        if self.error or number >= len(self._chats):
            raise ValueError(self.error or self.message)
        return self._chats[number]

    def about(self) -> str:
        """Says what the visitor should know of the model; "" if nothing, or as long as it is not there."""
        return SAMPLE if any(chat.is_sample for chat in self._chats) else ""

    def run(self, load: Callable[[], Chat], against: Callable[[Chat], Chat] | None = None) -> None:
        """Loads the model, then the one against it. An error is kept for the visitors, and raised for the caller."""
        try:
            self._chats.append(load())
            if against:
                self._chats.append(against(self._chats[0]))
        except Exception as error:
            self.error = f"The model could not be loaded: {error}"
            raise
        finally:
            self.done.set()


def in_background(load: Callable[[], Chat], message: str, against: Callable[[Chat], Chat] | None = None) -> Loading:
    """Starts loading in a thread of its own; the page shows `message` meanwhile.

    against: loads a second model beside the first, which it is given.
    """
    loading = Loading(message)
    threading.Thread(target=loading.run, args=(load, against), daemon=True).start()
    return loading
