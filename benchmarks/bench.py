"""Every benchmark, one after another, on this machine; then its tables.

    python benchmarks/bench.py                            the small sizes: twenty minutes on two cores
    python benchmarks/bench.py --part merge --size true   one part; "true" = at Phi-2's true size

Each part is a program of its own, or two, and puts its figures into benchmarks/results/<machine>.json.
"""

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), help="one part alone")
    parser.add_argument("--size", choices=list(measuring.SIZES), default="small")
    parser.add_argument("--results", type=Path, default=measuring.RESULTS, help="folder of the results file")
    parser.add_argument("--work", type=Path, default=measuring.WORK, help="folder for models and data")
    given = parser.parse_args()
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
    for script in PARTS[part]:
        code = subprocess.run([sys.executable, str(measuring.HERE / script), *options]).returncode
        if code:
            raise SystemExit(f"{part} failed with {code}; run it alone with --part {part}")


if __name__ == "__main__":
    main()
