"""Secrets: the file COLAB_STUB/secrets/<name>; its text may be one of the real ones' errors."""

import time

from google.colab import folder, note


class SecretNotFoundError(Exception):
    pass


class NotebookAccessError(Exception):
    pass


class TimeoutException(Exception):
    pass


def get(key: str) -> str:
    note(f"userdata.get {key}")
    path = folder() / "secrets" / key
    if not path.exists():
        raise SecretNotFoundError(f"Secret {key} does not exist.")
    text = path.read_text(encoding="utf-8")
    if text == "no access":
        raise NotebookAccessError(f"Notebook does not have access to secret {key}")
    if text == "timeout":
        raise TimeoutException(f"Requesting secret {key} timed out.")
    while text == "no browser":
        time.sleep(0.01)
    return text
