"""Every request and its answer as JSON lines, so that nothing is asked, and paid for, twice."""

import json
import os
import threading
from pathlib import Path

from llm_finetuning.data.generation.requests import Answer, Request
from llm_finetuning.files.drive import make_parent


class AnswerCache:
    """Answers by request, in a file to which whole lines are appended; a line that a crash cut off is dropped."""

    def __init__(self, path: Path):
        """Reads what the file holds. Raises OSError when it cannot be read, or its folder cannot be made."""
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.lock = threading.Lock()
        make_parent(path)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # or else the next line would be glued to it
            os.truncate(path, whole)
        for line in content[:whole].splitlines():
            self._read(line)

    def _read(self, line: bytes) -> None:
        """Takes the answer of a line; one that is damaged counts as never asked."""
        try:
            record = json.loads(line)
            self.answers[record["key"]] = Answer(**record["answer"])
        except (ValueError, KeyError, TypeError):
            return

    def get(self, request: Request) -> Answer | None:
        """Returns the answer that was given to this request, or None."""
        return self.answers.get(request.key)

    def add(self, request: Request, answer: Answer) -> None:
        """Appends a request with its answer: one line, in one write, on the disk before this returns."""
        record = {"key": request.key, "request": vars(request), "answer": vars(answer)}
        line = f"{json.dumps(record, ensure_ascii=False)}\n".encode("utf-8", "replace")
        with self.lock:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                while line:  # a full disk writes a part, and raises at the next
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self.answers[request.key] = answer
