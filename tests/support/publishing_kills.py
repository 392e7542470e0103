"""Run by test_replace_faults: kill a publishing process at every step that it makes, and at random times.

usage: publishing_kills.py FOLDER steps|fresh|between|random; prints one JSON object: kills, and what went wrong
A process forks from this one, publishes version 2 over version 1, and dies by SIGKILL. Then the final name
must hold a complete version, or nothing while the last good one lies aside; publishing once more must end well.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from publishing_world import finished, version_at
from tqdm import tqdm

from llm_finetuning.files import checksums, copying
from llm_finetuning.release import lock, replace

EVENTS = ("open", "os.", "shutil.")


def main(folder: Path, how: str) -> None:
    old = finished(folder / "old", 1)
    new = finished(folder / "new", 2, 5000 if how != "random" else 1_000_000)
    kept = folder / "kept"
    kept.mkdir()
    if how != "fresh":
        replace.replace_published(old, kept / "finetuned_phi2")
    if how == "between":  # as a run leaves it that was killed between its two renames
        os.rename(kept / "finetuned_phi2", kept / ".finetuned_phi2.previous")
        digits = checksums.hash_file(new / "SHA256SUMS")[:12]
        shutil.copytree(new, kept / f".finetuned_phi2.partial-{digits}")
    problems, kills = [], 0
    for moment in moments(how):
        shutil.rmtree(folder / "drive", ignore_errors=True)
        shutil.copytree(kept, folder / "drive")
        target = folder / "drive" / "finetuned_phi2"
        died = killed(new, target, how, moment)
        if not died and how != "random":
            break
        kills += died
        problems += [f"{how} {moment}: {problem}" for problem in judged(new, target, how)]
    print(json.dumps({"kills": kills, "problems": problems}))


def moments(how: str):
    if how != "random":
        return range(1, 2000)
    generator = random.Random(7)
    return [generator.uniform(0, 0.06) for _ in range(36)]


def killed(source: Path, target: Path, how: str, moment: float) -> bool:
    """Whether the publishing process died by the signal; False if it came to its end before."""
    process = os.fork()
    if process == 0:
        tqdm.set_lock(threading.RLock())  # the inherited one is shared: killed inside it, we would block our parent
        if how != "random":
            die_at_event(moment)
        replace.replace_published(source, target, sleep=lambda seconds: None)
        os._exit(0)
    if how == "random":
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def die_at_event(number: int) -> None:
    """Die before the `number`th file operation; every chunk counts twice, the second time half written."""
    count = 0

    def hook(event: str, _) -> None:
        nonlocal count
        if event.startswith(EVENTS):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def write_in_halves(file, chunk: bytes) -> None:
        hook("os.write", None)
        file.write(chunk[: len(chunk) // 2])
        file.flush()
        hook("os.write", None)
        file.write(chunk[len(chunk) // 2 :])

    copying.CHUNK = 2000
    copying.write_chunk = write_in_halves
    sys.addaudithook(hook)


def judged(source: Path, target: Path, how: str) -> list[str]:
    problems = []
    aside = target.parent / ".finetuned_phi2.previous"
    try:
        version = version_at(target)
        if version is None and how != "fresh" and version_at(aside) != 1:
            problems.append("the last good version is lost")
    except (ValueError, FileNotFoundError) as error:
        problems.append(f"damaged under the final name: {error}")
    try:
        replace.replace_published(source, target)
        if version_at(target) != 2 or os.listdir(target.parent) != ["finetuned_phi2"]:
            problems.append(f"publishing again left {os.listdir(target.parent)}")
    except (OSError, ValueError) as error:
        problems.append(f"publishing again: {error!r}")
    return problems


if __name__ == "__main__":
    lock.STEP = 0.05  # a lock that was killed while it was written is waited for
    tqdm.monitor_interval = 0  # no thread that could hold a lock while we fork
    os.fsync = lambda handle: None  # it guards against power cuts, not against kills, and takes most of the time
    main(Path(sys.argv[1]), sys.argv[2])
