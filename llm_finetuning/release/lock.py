"""A lock file beside the folder that is published, on a disk or on Drive, so that one run at a time publishes.

filelock.SoftFileLease takes over a killed owner's lock only where the file system can exchange two names atomically
(renameat2), and network mounts refuse that; this one needs no more than exclusive creation.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

import psutil

ABANDONED = 600  # seconds without a sign of life after which another machine's lock no longer counts
PATIENCE = 900  # seconds that a second run waits for the first
STEP = 5  # seconds between two looks


class Lock:
    """Holds `path` in `with Lock(path).take() as lock:` until the block ends; `lock.beat()` shows that the owner lives.

    The file names its owner: machine, process, and when that process started, so that a killed one is known
    by being gone. Where the owner cannot be looked up (another machine), ABANDONED seconds of silence decide.
    """

    held: set[str] = set()  # the locks that this process holds now
    looking = threading.Lock()  # so that threads of this process look and take in one step

    def __init__(self, path: Path, sleep: Callable[[float], None] = time.sleep):
        self.path = path
        self.sleep = sleep
        process = psutil.Process()
        owner = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}
        self.mine = json.dumps(owner | {"id": uuid.uuid4().hex})
        self.beaten = 0.0

    def take(self) -> Self:
        """Waits for the lock and takes it. Raises TimeoutError after PATIENCE seconds."""
        waited = 0
        self.held.add(self.mine)  # before the file is there for others to see
        while not self._take():
            if waited >= PATIENCE:
                raise TimeoutError(
                    f"{self._owner()} is publishing to the same folder ({self.path}). Wait for its end, "
                    "or, if it no longer runs, delete that file, and run this cell again"
                )
            if not waited:
                print(
                    f"{self._owner()} is publishing to the same folder. Waiting for its end; on another machine "
                    f"it counts as ended after {ABANDONED // 60} minutes without a sign of life."
                )
            self.sleep(STEP)
            waited += STEP
        self.beaten = time.monotonic()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.looking, contextlib.suppress(OSError):  # a lost mount: the file counts as abandoned then
            self.held.discard(self.mine)
            if self._content() == self.mine:
                self.path.unlink()

    def beat(self) -> None:
        """Renews the lock's time every half minute. Raises RuntimeError if another run has taken it over."""
        if time.monotonic() - self.beaten > 30:
            self.confirm()

    def confirm(self) -> None:
        """Raises RuntimeError unless the lock is still ours; call it before what must not happen twice."""
        if self._content() != self.mine:
            raise RuntimeError(
                f"{self._owner()} has taken over publishing ({self.path}), so this run stops. "
                "If that run has ended, run this cell again"
            )
        os.utime(self.path)
        self.beaten = time.monotonic()

    def _take(self) -> bool:
        with self.looking:
            content = self._content()
            if content is not None and self._abandoned(content) and self._content() == content:
                self.path.unlink(missing_ok=True)
            try:
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(self.mine)
                return True
            except FileExistsError:
                return False

    def _abandoned(self, content: str) -> bool:
        try:
            owner = json.loads(content)
        except ValueError:  # written in this moment, or by a process killed while writing it
            return self._silent() > STEP
        if owner["host"] != socket.gethostname():
            return self._silent() > ABANDONED
        if owner["pid"] == os.getpid():
            return content not in self.held
        return not _alive(owner["pid"], owner["started"])

    def _silent(self) -> float:
        try:
            return time.time() - self.path.stat().st_mtime
        except FileNotFoundError:  # released in this moment
            return 0.0

    def _content(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _owner(self) -> str:
        try:
            owner = json.loads(self._content() or "")
            return f"process {owner['pid']} on {owner['host']}"
        except ValueError:
            return "another run"


def _alive(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False
