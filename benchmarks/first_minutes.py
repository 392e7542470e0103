"""How long `make run` takes in a fresh folder, what the time goes to, its memory, and what its model came to.

    python benchmarks/first_minutes.py [--size true]

Runs `python -m llm_finetuning run --profile sample` as `make run` does, with an entry in metrics.jsonl after every
step, which tells when the first one was done; then preference tuning on what it left. --size true: the rehearsal at
Phi-2's true size.
"""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import measuring
import psutil
import run_stages

PARTS = {"small": "make run", "true": "make rehearse", "tiny": "make run"}
PROFILES = {"small": "sample", "true": "rehearsal", "tiny": "sample"}
LONGEST = 3600
"""Seconds after which a run is given up."""
EVERY_STEP = ("logging_steps", "1")
QUICK = (("max_steps", "2"), ("eval_pairs", "2"), ("eval_answers", "1"), ("eval_steps", "0"), ("max_new_tokens", "2"))
"""What makes the tiny size quick, besides a base that has read one batch."""
SCORES = {"loss": "nats", "stop_rate": "1", "exact_match": "1", "rank_agreement": "1"}
PREFERENCE_SCORES = {"loss": "nats", "stop_rate": "1", "accuracy": "1"}
"""Figure of a scoreboard → its unit."""


def measured_run(output: Path, words: list[str]) -> dict[str, float]:
    """Runs the command in a fresh folder: seconds of the whole, to the first step and of each stage, and its memory.

    Memory is that of the run's largest process, in bytes. Raises RuntimeError when the run fails.
    """
    shutil.rmtree(output, ignore_errors=True)
    clock = output.with_suffix(".imports")
    clock.unlink(missing_ok=True)
    start = time.perf_counter()
    process = command(output, words, clock)
    try:
        first = seconds_to_first_step(process, output, start)
        wait(process, output, start)
    finally:
        stop(process)
    whole = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"whole": whole, "first": first, "peak": peak, "stages": run_stages.seconds(output, clock, whole)}


def command(output: Path, words: list[str], clock: Path) -> subprocess.Popen:
    """The run as a process; what it prints goes to a log beside its folder."""
    asked = [sys.executable, "-m", "llm_finetuning", "run", "--output", str(output), *words]
    with output.with_suffix(".log").open("w") as log:
        environment = run_stages.clocked(clock)
        return subprocess.Popen(asked, cwd=measuring.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def seconds_to_first_step(process: subprocess.Popen, output: Path, start: float) -> float:
    """Wall-clock seconds from `start` to the first step. Raises RuntimeError when the run ends before it."""
    while not trained(output / "metrics.jsonl"):
        if process.poll() is not None or time.perf_counter() - start > LONGEST:
            raise RuntimeError(f"no training step came, see {said(output)}")
        time.sleep(0.05)
    return time.perf_counter() - start


def wait(process: subprocess.Popen, output: Path, start: float) -> None:
    """Waits for the end of the run. Raises RuntimeError when it failed, or takes too long."""
    try:
        code = process.wait(start + LONGEST - time.perf_counter())
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end within {LONGEST} s, see {said(output)}") from None
    if code:
        raise RuntimeError(f"the run ended with {code}, see {said(output)}")


def said(output: Path) -> str:
    """The log's place and its end."""
    log = output.with_suffix(".log")
    return f"{log}:\n{log.read_text()[-2000:]}"


def trained(metrics: Path) -> bool:
    """Whether metrics.jsonl has an entry of a training step."""
    return bool(steps(metrics))


def steps(metrics: Path) -> list[dict]:
    """The entries of training steps."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if "tokens_per_second" in entry]


def stop(process: subprocess.Popen) -> None:
    """Ends the run and the notebook's kernel."""
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs([psutil.Process(process.pid), *below], timeout=20)
    for one in alive:
        one.kill()
    process.wait()


def parameters(size: str, work: Path) -> list[str]:
    """The run's own, and at the tiny size a base that is there already."""
    chosen = [EVERY_STEP]
    if size == "tiny":
        from llm_finetuning.sample import making, phi

        chosen += [("model_name", str(making.make_sample(work / "base-sample", phi.Recipe(steps=1)))), *QUICK]
    return ["--profile", PROFILES[size], *(word for name, value in chosen for word in ("-p", f"{name}={value}"))]


def figures(found: dict, output: Path) -> list[dict]:
    """The run's time, memory and stages, and what the scoreboard says of its model."""
    training = max(entry["memory_bytes"] for entry in steps(output / "metrics.jsonl"))
    return [
        measuring.figure("the whole run", "s", [found["whole"]]),
        measuring.figure("time to the first training step", "s", [found["first"]]),
        measuring.figure("peak memory of its largest process", "GB", [found["peak"] / 1e9]),
        measuring.figure("peak memory of the training", "GB", [training / 1e9]),
        *(measuring.figure(f"stage, {stage}", "s", [seconds]) for stage, seconds in found["stages"].items()),
        *scores(output / "scoreboard.json", "scoreboard", SCORES),
    ]


def scores(path: Path, title: str, units: dict[str, str]) -> list[dict]:
    """A figure for each column of a scoreboard's measures, and for what changed of them since its first column."""
    board, found = json.loads(path.read_text(encoding="utf-8")), []
    for column, values in board.items():
        for name in filter(values.__contains__, units):
            found.append(measuring.figure(f"{title}, {name}, {column}", units[name], [values[name]]))
        for name in filter(values.get("change", {}).__contains__, units):
            change = values["change"][name]
            more = {bound: change[bound] for bound in ("low", "high", "n")}
            found.append(
                measuring.figure(f"{title}, change of {name}, {column}", units[name], [change["value"]], **more)
            )
    return found


def preferences(output: Path, words: list[str]) -> list[dict]:
    """Preference tuning on what the run left: what it came to."""
    start = time.perf_counter()
    process = command(output, [*words, "--notebooks", "preference"], output.with_suffix(".imports"))
    try:
        wait(process, output, start)
    finally:
        stop(process)
    return [
        measuring.figure("preference tuning, time", "s", [time.perf_counter() - start]),
        *scores(output / "preference_scoreboard.json", "preference scoreboard", PREFERENCE_SCORES),
    ]


def main() -> None:
    given = measuring.options(__doc__, "small", "true", "tiny").parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    output, words = given.work.resolve() / "first-minutes", parameters(given.size, given.work)
    found = figures(measured_run(output, words), output)
    if given.size == "small":
        found += preferences(output, words)
    shutil.rmtree(output)
    print(f"written to {measuring.record(PARTS[given.size], given.size, found, given.results)}")


if __name__ == "__main__":
    main()
