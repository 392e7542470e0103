"""Run by test_generation_kills: a generation that is killed at random moments, and then ends.

usage: generation_kills.py FOLDER KILLS; prints one JSON object: what was sent with and without kills
Processes fork from this one, which holds the server; each makes the data set in FOLDER/killed and dies by SIGKILL.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from generation_world import run, settings_for
from scripted_generator import Script, Server

IN_FLIGHT = 4


class Steady(Script):
    """Writes the same text for the same request, whatever was asked before."""

    def prompts(self, topic, number):
        return sorted(set(super().prompts(topic, 1000)))[:number]


def main(folder: Path, kills: int) -> None:
    whole = Steady()
    with Server(whole) as server:
        finish(server, folder / "whole")
    script, moments, died = Steady(), random.Random(kills), 0
    script.seconds = 0.02
    with Server(script) as server:
        for _ in range(kills):
            died += killed(server, folder / "killed", moments.uniform(0, 0.6 / kills))
        script.seconds = 0.0
        finish(server, folder / "killed")
    print(json.dumps({"died": died, "sent": len(script.requests), "needed": len(whole.requests)}))


def start(server: Server, folder: Path) -> int:
    """Forks a process that makes the data set; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            run(settings_for(server, folder, pairs_wanted=60, max_parallel=IN_FLIGHT, second_answer=True))
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    return child


def finish(server: Server, folder: Path) -> None:
    _, status = os.waitpid(start(server, folder), 0)
    assert status == 0


def killed(server: Server, folder: Path, seconds: float) -> bool:
    """Whether the process died by the signal, `seconds` after it began to ask; False if it came to its end before."""
    before, child = len(server.script.requests), start(server, folder)
    while len(server.script.requests) == before and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    time.sleep(seconds)
    try:
        os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    except (ProcessLookupError, ChildProcessError):
        return False


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
