"""What the benchmarks share: figures and the file they go to, sides that take turns, growth.

A figure is `name`, `unit`, `values` (every repetition), `median` and `spread` (largest value - smallest). Some say
more: `of`, the names of the two figures that a ratio divides; `growth`, `axis` and `at`, the family of points that a
figure belongs to and its place on the axis; `inputs`, what `planning.plan` needs to predict it; `versions` and
`settings`, those of another program that was measured.
"""

import argparse
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
WORK = ROOT / "outputs" / "benchmarks"
sys.path.insert(0, str(ROOT))  # the package of this checkout, installed or not

SIZES = {"small": "", "true": " at Phi-2's true size", "tiny": " (tiny)"}
"""Size → what a figure's name says of it; "tiny" serves the tests."""
OURS, SPEED = "ours", "tokens per second"
"""The side that others are set beside, and the quantity."""


def options(documentation: str, *sizes: str) -> argparse.ArgumentParser:
    """The command line of a part: --size (the first is the default), --results, --work; --side in its children."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes, default=sizes[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for models and data")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    return parser


def defaults() -> dict:
    """The finetuning notebook's parameters; read without papermill, which a rented GPU machine may lack.

    Its folders are Colab's; a benchmark that writes names its own.
    """
    cells = json.loads((ROOT / "Finetuning" / "Phi-2 QLoRA Finetuning.ipynb").read_text())["cells"]
    values: dict = {}
    exec(next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])), values)
    folders = {"drive_folder": "outputs/benchmarks/results", "work_folder": "outputs/benchmarks/work"}
    return {name: value for name, value in values.items() if not name.startswith("_")} | folders


def figure(name: str, unit: str, values: list[float], **more) -> dict:
    """One measured quantity with all its repetitions, to five digits."""
    values = [_rounded(value) for value in values]
    spread = _rounded(max(values) - min(values))
    median = _rounded(statistics.median(values))
    return {"name": name, "unit": unit, "values": values, "median": median, "spread": spread} | more


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def compare(name: str, unit: str, over: tuple[str, list[float]], under: tuple[str, list[float]]) -> list[dict]:
    """Figures of two sides (label, values), and how many times `over` is `under`, repetition by repetition."""
    sides = [figure(f"{name}, {label}", unit, values) for label, values in (over, under)]
    ratios = [a / b for a, b in zip(over[1], under[1], strict=True)]
    return [*sides, figure(f"{name}, {over[0]} over {under[0]}", "x", ratios, of=[side["name"] for side in sides])]


def growth(name: str, axis: str, unit: str, points: dict[int, list[float]]) -> list[dict]:
    """A figure for each size on the axis, and the exponent of the power law through their medians."""
    figures = [
        figure(f"{name}, {size:,} {axis}", unit, values, growth=name, axis=axis, at=size)
        for size, values in points.items()
    ]
    power = exponent({size: statistics.median(values) for size, values in points.items()})
    return [*figures, figure(f"{name}, exponent", "1", [power], growth=name, axis=axis)]


def exponent(points: dict[int, float]) -> float:
    """The slope of log(value) over log(size), by least squares: 1 = twice the size costs twice as much."""
    sizes, values = ([math.log(number) for number in numbers] for numbers in (points, points.values()))
    return statistics.linear_regression(sizes, values).slope


def seconds_of(job: Callable[[], object], at_least: float = 0.0) -> float:
    """Mean seconds of `job()`, repeated until `at_least` seconds are over."""
    start, runs = time.perf_counter(), 0
    while True:
        job()
        runs += 1
        passed = time.perf_counter() - start
        if passed >= at_least:
            return passed / runs


def in_turn(
    turns: dict[str, Callable[[], object]], rounds: int, after: Callable[[dict[str, list]], object] = lambda found: None
) -> dict[str, list]:
    """What every side gave in each round: A B A B …, so that a slow minute of the machine meets both.

    after: called with what there is after each round, as there may be no next one.
    """
    found: dict[str, list] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            found[name].append(turn())
        after(found)
    return found


@contextmanager
def sides(script: str, names: list[str], arguments: list[str], apart: bool) -> Iterator[dict[str, Callable]]:
    """{name: turn} of sides that run in processes of their own, so that each has its own peak of memory.

    Turns return what the side's job returns. apart: a process for every turn, where memory cannot hold
    two sides, or what is measured differs from one process to another.
    """

    def alone(name: str, **asked) -> dict:
        with Side(script, name, arguments) as side:
            return side.turn(**asked)

    with ExitStack() as stack:
        if apart:
            yield {name: (lambda name=name, **asked: alone(name, **asked)) for name in names}
        else:
            yield {name: stack.enter_context(Side(script, name, arguments)).turn for name in names}


class Side:
    """`python <script> --side NAME …`: it prepares, says so, then does its job once for every line it reads."""

    def __init__(self, script: str, name: str, arguments: list[str]):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        command = [sys.executable, str(HERE / script), "--side", name, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self._answer()

    def turn(self, **asked) -> dict:
        """The values of one run of the job. Raises RuntimeError with the side's own error when it died."""
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def serve(prepare: Callable[[], Callable[..., dict]]) -> None:
    """The life of a side: prepares the job, then answers each line of stdin with the values of one run."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    job = prepare()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(job(**json.loads(line))), file=answers, flush=True)


def peak_memory() -> int:
    """Highest memory of this process so far, in bytes: a GPU's as allocated, else resident, mapped files included."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()


def peak_resident() -> int:
    """Highest resident set of this process so far, in bytes, mapped files included.

    Not getrusage's: that begins with what the process had that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except FileNotFoundError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def forget_peak() -> int:
    """Makes `peak_resident` begin anew, where there is Linux; returns what it is now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_resident()


def machine() -> dict:
    """What the figures were measured on."""
    import torch

    from llm_finetuning import hardware

    gpu, cores = torch.cuda.is_available(), hardware.cores()
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else hardware.host_memory()
    return {
        "name": torch.cuda.get_device_name() if gpu else f"{hardware.cpu_name()}, {cores} cores",
        "cores": cores,
        "memory_gib": round(memory / hardware.GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def results_file(folder: Path, name: str) -> Path:
    """The file of a machine: its name in small letters and dashes."""
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return folder / f"{'-'.join(words).lower()}.json"


def record(part: str, size: str, figures: list[dict], folder: Path) -> Path:
    """Puts a part's figures into this machine's results file in place of its earlier ones of the same size.

    Names get the part in front. Raises ValueError as `earlier` does.
    """
    title, report = f"{part}{SIZES[size]}: ", earlier(folder)
    kept = [entry for entry in report["figures"] if not entry["name"].startswith(title)]
    return _put(kept + [_titled(entry, title) for entry in figures], title, report, folder)


def record_side(part: str, size: str, side: str, figures: list[dict], folder: Path) -> Path:
    """Puts a side's figures ("quantity, side") in place of its earlier ones: a call may measure some sides only.

    How many times as many tokens a second OURS has as each other side is taken anew from all that are there. Raises
    ValueError as `earlier` does.
    """
    title, report = f"{part}{SIZES[size]}: ", earlier(folder)
    kept = [e for e in report["figures"] if not (_side(e, title) == side or (_side(e, title) and "of" in e))]
    kept += [_titled(entry, title) for entry in figures]
    return _put(kept + _over_the_others(kept, title), title, report, folder)


def _side(entry: dict, title: str) -> str:
    """The side that a part's figure names; "" for one of another part."""
    return entry["name"].removeprefix(title).partition(", ")[2] if entry["name"].startswith(title) else ""


def _over_the_others(figures: list[dict], title: str) -> list[dict]:
    """The ratio of OURS to each other side of a part; none where OURS was not measured."""
    start = f"{title}{SPEED}, "
    sides = {e["name"].removeprefix(start): e["values"] for e in figures if e["name"].startswith(start)}
    mine = (OURS, sides.pop(OURS, []))
    return [_titled(compare(SPEED, "tokens/s", mine, side)[-1], title) for side in sides.items() if mine[1]]


def _put(figures: list[dict], title: str, report: dict, folder: Path) -> Path:
    """Writes the report with these figures, a part of which was measured today."""
    report["figures"] = figures
    report["measured"][title.removesuffix(": ")] = date.today().isoformat()
    return _write(results_file(folder, report["machine"]["name"]), report)


def earlier(folder: Path) -> dict:
    """This machine's report so far: machine, versions, the day on which each part was measured, figures.

    Raises ValueError for a file with other versions: one table shows one set of them.
    """
    from llm_finetuning import hardware

    here, versions = machine(), hardware.versions()
    path = results_file(folder, here["name"])
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"versions": versions, "figures": []}
    changed = [f"{n} {old['versions'].get(n)}, now {v}" for n, v in versions.items() if old["versions"].get(n) != v]
    if changed:
        raise ValueError(
            f"{path} was measured with {'; '.join(changed)}: remove it and measure every part again, or choose another"
            " folder with --results"
        )
    return {"machine": here, "versions": versions, "measured": old.get("measured", {}), "figures": old["figures"]}


def _titled(entry: dict, title: str) -> dict:
    """The figure with the part's title in front of every name in it."""
    names = {key: title + entry[key] for key in ("name", "growth") if key in entry}
    return entry | names | ({"of": [title + name for name in entry["of"]]} if "of" in entry else {})


def _write(path: Path, report: dict) -> Path:
    """JSON with a line for each figure, beside and renamed."""
    head = json.dumps({key: value for key, value in report.items() if key != "figures"}, indent=1)
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in report["figures"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{head[:-2]},\n "figures": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return partial.replace(path)


def read(folder: Path = RESULTS) -> list[dict]:
    """Every results file, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
