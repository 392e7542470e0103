"""How long the installation takes that `make run` begins with, in a fresh clone, and how much disk.

    python benchmarks/installation.py

Clones this checkout as it is committed and says `make .venv/ready`, as `make run` does. What pip has cached is used:
`PIP_NO_CACHE_DIR=1` downloads everything again. Needs a package registry.
"""

import subprocess
import tempfile
import time
from pathlib import Path

import measuring

PART = "installation"


def size(folder: Path) -> int:
    """Bytes on the disk, each file once."""
    stats = [path.lstat() for path in folder.rglob("*")]
    return sum({(stat.st_dev, stat.st_ino): stat.st_blocks * 512 for stat in stats}.values())


def main() -> None:
    given = measuring.options(__doc__, "small").parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        clone = Path(folder) / "llm_finetuning"
        subprocess.run(["git", "clone", "--quiet", str(measuring.ROOT), str(clone)], check=True)
        start = time.perf_counter()
        subprocess.run(["make", ".venv/ready"], cwd=clone, check=True)
        seconds = time.perf_counter() - start
        found = [
            measuring.figure("time", "s", [seconds]),
            measuring.figure("disk", "GB", [size(clone / ".venv") / 1e9]),
        ]
    print(f"written to {measuring.record(PART, given.size, found, given.results)}")


if __name__ == "__main__":
    main()
