"""How long `make run` takes, in a fresh folder, until the first optimizer step of the training is done.

    python benchmarks/first_step.py

Runs `python -m llm_finetuning run --profile sample` as `make run` does, with an entry in metrics.jsonl after every
step, and stops it at the first one. The time holds both data notebooks, the making of the tiny base and the self-check.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import measuring
import psutil

PART = "make run"
ROUNDS = {"small": 1, "tiny": 1}
LONGEST = 1800
"""Seconds after which a run is given up."""
EVERY_STEP = ("logging_steps", "1")
QUICK = (("eval_pairs", "1"), ("eval_answers", "1"), ("eval_steps", "0"), ("max_new_tokens", "1"))
"""What makes the tiny size quick, besides a base that has read one batch."""


def seconds_to_first_step(output: Path, parameters: list[tuple[str, str]]) -> float:
    """Wall-clock seconds from the command to the first step. Raises RuntimeError when the run ends before it."""
    command = [sys.executable, "-m", "llm_finetuning", "run", "--profile", "sample", "--output", str(output)]
    command += [word for name, value in parameters for word in ("-p", name, value)]
    log = output.with_suffix(".log")
    with log.open("w") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=measuring.ROOT, stdout=stream, stderr=subprocess.STDOUT)
    try:
        while not trained(output / "metrics.jsonl"):
            if process.poll() is not None or time.perf_counter() - start > LONGEST:
                raise RuntimeError(f"no training step came, see {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        return time.perf_counter() - start
    finally:
        stop(process)


def trained(metrics: Path) -> bool:
    """Whether metrics.jsonl has an entry of a training step."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    return any("tokens_per_second" in json.loads(line) for line in lines if line.endswith("\n"))


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


def parameters(size: str, work: Path) -> list[tuple[str, str]]:
    """The run's own, and at the tiny size a base that is there already."""
    if size == "small":
        return [EVERY_STEP]
    from llm_finetuning.sample import making, phi

    base = making.make_sample(work / "base-sample", phi.Recipe(steps=1))
    return [EVERY_STEP, ("model_name", str(base)), *QUICK]


def main() -> None:
    given = measuring.options(__doc__, "small", "tiny").parse_args()
    output, times = given.work.resolve() / "first-step", []
    given.work.mkdir(parents=True, exist_ok=True)
    chosen = parameters(given.size, given.work)
    for _ in range(ROUNDS[given.size]):
        shutil.rmtree(output, ignore_errors=True)
        times.append(seconds_to_first_step(output, chosen))
    shutil.rmtree(output)
    figures = [measuring.figure("time to the first training step", "s", times)]
    print(f"written to {measuring.record(PART, given.size, figures, given.results)}")


if __name__ == "__main__":
    main()
