"""Do the requirements resolve on Colab with its torch and numpy as they are, and what would pip install?

Run by `make test-colab`. Asks the registry for metadata only: nothing is installed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TORCH = "2.11.0"
"""Colab's own build, which constraints-colab.txt replaces by a newer one for the tests."""


def main() -> int:
    """Prints one line for each Python version of Colab's images; returns the exit code."""
    on_colab = versions(ROOT / "constraints-colab.txt") | {"torch": TORCH}
    required = [Requirement(line) for line in lines(ROOT / "requirements.txt")]
    stay = {r.name: on_colab[r.name] for r in required if r.specifier.contains(on_colab.get(r.name, "0"))}
    fixed = {name: on_colab[name] for name in ("torch", "numpy")}
    everything = resolve("3.13", stay)
    torch_and_numpy = resolve("3.12", fixed)
    new = {name: version for name, version in everything.items() if stay.get(name) != version}
    print(f"Python 3.13: resolves with all of Colab's versions kept: {', '.join(stay)}")
    print("  installed there:", ", ".join(f"{r.name} {new[r.name]}" for r in required if r.name in new))
    print(f"Python 3.12: resolves with Colab's torch and numpy: {len(torch_and_numpy)} packages")
    return 0


def lines(path: Path) -> list[str]:
    stripped = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in stripped if line]


def versions(path: Path) -> dict[str, str]:
    return dict(line.split("==") for line in lines(path))


def resolve(python: str, fixed: dict[str, str]) -> dict[str, str]:
    """What pip would install for this Python: name → version. Raises CalledProcessError when nothing fits."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in fixed.items()))
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
            + ["--only-binary=:all:", "--python-version", python, "--target", folder]
            + ["--constraint", str(constraints), "--report", str(report)]
            + ["--requirement", str(ROOT / "requirements.txt")],
            check=True,
        )
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in items}


if __name__ == "__main__":
    sys.exit(main())
