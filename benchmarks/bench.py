"""Every benchmark, one after another, on this machine; then its tables.

    python benchmarks/bench.py                            the small sizes: about forty minutes on two cores
    python benchmarks/bench.py --part merge --size true   one part; "true" = at Phi-2's true size
    python benchmarks/bench.py --compare A.json B.json    the ratios that differ between two results files

Each part is a program of its own, or two, and puts its figures into benchmarks/results/<machine>.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import measuring

PARTS = {
    "data": ("data_preparation.py", "data_notebooks.py"),
    "training": ("training_against_original.py",),
    "packing": ("training.py",),
    "merge": ("merge.py",),
    "inference": ("inference.py",),
    "first-minutes": ("first_minutes.py",),
    "installation": ("installation.py",),
    "gpu": ("gpu.py",),
}
TRUE_SIZE = ("merge", "inference", "first-minutes")
ASKED_FOR = ("installation",)
"""Parts that are measured when they are named alone: a registry is asked."""
APART = 0.15
"""Two measurements of one ratio that are further apart than this differ by more than their noise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), help="one part alone")
    parser.add_argument("--size", choices=list(measuring.SIZES), default="small")
    parser.add_argument("--results", type=Path, default=measuring.RESULTS, help="folder of the results file")
    parser.add_argument("--work", type=Path, default=measuring.WORK, help="folder for models and data")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two results files of a machine")
    given = parser.parse_args()
    if given.compare:
        print("\n".join(differences(*(json.loads(path.read_text()) for path in given.compare))) or "no ratio differs")
        return
    for part in [given.part] if given.part else parts_for(given.size):
        begun = time.perf_counter()
        print(f"== {part}", flush=True)
        run(part, given)
        print(f"   {time.perf_counter() - begun:.0f} s", flush=True)
    import tables

    name = measuring.machine()["name"]
    for report in measuring.read(given.results):
        if report["machine"]["name"] == name:
            print(f"\n{tables.of_machine(report)}")


def differences(old: dict, new: dict) -> list[str]:
    """A line for each ratio that differs by more than APART between two results. Raises ValueError for two machines."""
    names = [report["machine"]["name"] for report in (old, new)]
    if names[0] != names[1]:
        raise ValueError(f"measured on {names[0]} and on {names[1]}: ratios of two machines say nothing of a change")
    before, after = ({f["name"]: f["median"] for f in report["figures"] if f["unit"] == "x"} for report in (old, new))
    pairs = [(name, before[name], after[name]) for name in after if name in before]
    return [f"{name}: {a}x, now {b}x" for name, a, b in pairs if max(a, b) > (1 + APART) * min(a, b)]


def parts_for(size: str) -> list[str]:
    """The parts that have this size and need no word; the variants of the training ask for a GPU."""
    import torch

    if size == "true":
        return list(TRUE_SIZE)
    left_out = ASKED_FOR if torch.cuda.is_available() else (*ASKED_FOR, "gpu")
    return [part for part in PARTS if part not in left_out]


def run(part: str, given: argparse.Namespace) -> None:
    """Raises SystemExit when the part failed: what was measured before it stays in the file."""
    size = "true" if part == "gpu" and given.size == "small" else given.size
    options = ["--size", size, "--results", str(given.results), "--work", str(given.work)]
    options += ["--minutes", "60"] if part == "gpu" else []
    for script in PARTS[part]:
        code = subprocess.run([sys.executable, str(measuring.HERE / script), *options]).returncode
        if code:
            raise SystemExit(f"{part} failed with {code}; run it alone with --part {part}")


if __name__ == "__main__":
    main()
