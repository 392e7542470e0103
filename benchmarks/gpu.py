"""What one call on a GPU measures at Phi-2's true size: first that it is right, then how fast the notebook trains.

    python benchmarks/gpu.py                        every part, random weights, no network
    python benchmarks/gpu.py --part variants        one part
    python benchmarks/gpu.py --minutes 9            begins nothing that would not end by then
    python benchmarks/gpu.py --size tiny            the same code on a CPU, to see that it works

Each figure is written as soon as it is there. What is wrong ends the part that found it, is said, and the exit code is
1; what there was no time for is named.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_checks
import gpu_variants
import measuring
import shapes

PROGRAMS = {"merge": "merge.py", "inference": "inference.py"}
"""Parts that are programs of their own: the merge against PEFT's, and answers in 16 and in 4 bits."""
PARTS = {
    "attention": gpu_checks.attention_kernel,
    "packing": gpu_checks.packed_against_alone,
    "notebook": gpu_checks.notebook,
    "variants": gpu_variants.measure,
}


def main() -> None:
    parser = measuring.options(__doc__, "true", "tiny")
    parser.add_argument("--part", choices=[*PARTS, *PROGRAMS], help="one part alone")
    parser.add_argument("--minutes", type=float, default=60, help="of the whole call")
    parser.add_argument("--seconds", type=float, default=15, help="measured per variant")
    parser.add_argument("--only", default="", help="part of a variant's name")
    given = parser.parse_args()
    given.ends = time.perf_counter() + 60 * given.minutes
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        given.folder, given.base = Path(folder), None
        for part in [given.part] if given.part else [*PARTS, *PROGRAMS]:
            begun = time.perf_counter()
            print(f"== {part}", flush=True)
            wrong += run(part, given)
            print(f"   {time.perf_counter() - begun:.0f} s", flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))


def run(part: str, given: argparse.Namespace) -> list[str]:
    """One part; what was wrong in it, as sentences."""
    if time.perf_counter() > given.ends:
        return [f"{part}: not begun, the time is up"]
    if part in PROGRAMS:
        return program(part, given)
    given.base = given.base or shapes.base(given.folder, given.size)
    try:
        return list(PARTS[part](given) or [])
    except Exception as error:  # the other parts still have something to say
        return [f"{part}: {type(error).__name__}: {error}"]


def program(part: str, given: argparse.Namespace) -> list[str]:
    command = [sys.executable, str(measuring.HERE / PROGRAMS[part]), "--size", given.size]
    command += ["--results", str(given.results), "--work", str(given.work)]
    left = given.ends - time.perf_counter()
    try:
        code = subprocess.run(command, timeout=left).returncode
    except subprocess.TimeoutExpired:
        return [f"{part}: stopped, the time is up"]
    return [f"{part}: ended with {code}"] if code else []


if __name__ == "__main__":
    main()
