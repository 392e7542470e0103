"""What one call on a GPU measures at Phi-2's true size: first that it is right, then how fast the notebook trains.

    python benchmarks/gpu.py                            every part, random weights, no network
    python benchmarks/gpu.py --list                     what each part writes, and the time that is predicted for it
    python benchmarks/gpu.py --part variants            one part, or several
    python benchmarks/gpu.py --minutes 60               where there is more time than a call of ten minutes has
    python benchmarks/gpu.py --part peers --install     other programs beside the notebook's training
    python benchmarks/gpu.py --size tiny                the same code on a CPU, to see that it works

Each figure is written as soon as it is there. What is wrong ends the part that found it, is said, and the exit code is
1; what there was no time for is named. Each part runs in a process of its own and for so long at most: a kernel that
takes the device down, or never ends, costs its own part alone. docs/gpu.md says how they fit into ten minutes.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import children
import gpu_checks
import gpu_list
import gpu_variants
import measuring
import peers
import shapes

PROGRAMS = {"merge": "merge.py", "inference": "inference.py"}
"""Parts that are programs of their own: the merge against PEFT's, and answers in 16 and in 4 bits."""
PARTS = {
    "attention": gpu_checks.attention_kernel,
    "packing": gpu_checks.packed_against_alone,
    "variants": gpu_variants.measure,
    "notebook": gpu_checks.notebook,
    "merge": lambda given: program("merge", given),
    "inference": lambda given: program("inference", given),
    "peers": peers.measure,
}
WITHOUT_BASE = ("attention", *PROGRAMS)
"""Parts that need no base, or make it themselves; the first of the others makes it for all."""
CEILING = {
    "attention": 120,
    "packing": 240,
    "variants": 1500,
    "notebook": 420,
    "merge": 420,
    "inference": 420,
    "peers": 1500,
}
"""Seconds that a part may take however much time there is, about twice what it should: what hangs costs no more."""
GRACE = 15
"""Seconds after its time in which a part may end by itself."""


def main() -> None:
    given = options().parse_args()
    if given.list:
        print(gpu_list.table(given.size, given.list, given.seconds))
        return
    if given.until:
        given.ends = time.perf_counter() + given.until - time.time()
        wrong = here(given.part[0], given)
    else:
        measuring.earlier(given.results)  # a file that nothing could be added to is found before hours are spent
        given.ends = time.perf_counter() + 60 * given.minutes
        wrong = [said for part in given.part or PARTS for said in apart(part, given)]
    if wrong:
        raise SystemExit("\n".join(wrong))


def options() -> argparse.ArgumentParser:
    parser = measuring.options(__doc__, "true", "tiny")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="these parts alone")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole call, once its libraries are loaded")
    parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)  # of a part's process: by time.time
    parser.add_argument("--seconds", type=float, default=15, help="measured per variant and per peer")
    parser.add_argument("--only", default="", help="part of a variant's or a peer's name")
    parser.add_argument("--install", action="store_true", help="make the peers' environments from the package index")
    parser.add_argument("--wheels", type=Path, help="make them from this folder of wheels, without a network")
    gpus = [sheet.name for sheet in gpu_list.SHEETS]
    parser.add_argument("--list", nargs="?", const="H100", choices=gpus, help="what would be written on such a GPU")
    return parser


def here(part: str, given: argparse.Namespace) -> list[str]:
    """One part in this process; what was wrong in it, as sentences."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        given.folder = Path(folder)
        try:
            if part not in WITHOUT_BASE:
                given.base = shapes.base(given.work.resolve(), given.size)
            return list(PARTS[part](given) or [])
        except Exception as error:  # said as a sentence, as all else that is wrong
            return [f"{part}: {type(error).__name__}: {error}"]


def apart(part: str, given: argparse.Namespace) -> list[str]:
    """One part in a process of its own, which says itself what was wrong."""
    begun = time.perf_counter()
    left = given.ends - begun
    if left <= 0:
        return [f"{part}: not begun, the time is up"]
    print(f"== {part}", flush=True)
    seconds = min(left, CEILING[part])
    command = [sys.executable, __file__, "--part", part, "--until", str(time.time() + seconds)]
    command += [*common(given), "--seconds", str(given.seconds), "--only", given.only, *["--install"] * given.install]
    command += ["--wheels", str(given.wheels)] if given.wheels else []
    code = children.shown(command, begun + seconds + GRACE)
    print(f"   {time.perf_counter() - begun:.0f} s", flush=True)
    if code is None:
        return [f"{part}: stopped, " + ("the time is up" if seconds == left else f"it took more than {seconds:.0f} s")]
    return [f"{part}: ended with {code}"] if code else []


def program(part: str, given: argparse.Namespace) -> list[str]:
    code = children.shown([sys.executable, str(measuring.HERE / PROGRAMS[part]), *common(given)], given.ends)
    if code is None:
        return [f"{part}: stopped, the time is up"]
    return [f"{part}: ended with {code}"] if code else []


def common(given: argparse.Namespace) -> list[str]:
    """The options that every program here has."""
    return ["--size", given.size, "--results", str(given.results), "--work", str(given.work)]


if __name__ == "__main__":
    main()
