"""Packs the wheels of the peers' environments, for a GPU machine that reaches no package index.

    python benchmarks/pack_peers.py wheels --python 3.12 --torch 2.11.0

There `python benchmarks/gpu.py --part peers --wheels wheels` installs from them. torch, and with it what CUDA brings,
is left out: it is on that machine, and a wheel of its name alone stands in for it while pip resolves. A peer that
cannot be resolved beside that torch is named with the reason.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import peers

THERE = ("torch", "triton")
"""What the GPU machine has."""
PLATFORMS = [f"manylinux{kind}_x86_64" for kind in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--python", default="3.12", help="version on the GPU machine")
    parser.add_argument("--torch", default="2.11.0", help="version on the GPU machine")
    parser.add_argument("--only", default="", help="part of a peer's name")
    given = parser.parse_args()
    asked = {p.requirements: name for name, p in peers.PEERS.items() if p.requirements and given.only in name}
    failed = [f"{name}: {said}" for requirements, name in asked.items() if (said := pack(requirements, given))]
    size = sum(file.stat().st_size for file in given.folder.glob("*.whl"))
    print(f"{given.folder}: {size / 2**20:.0f} MiB")
    if failed:
        raise SystemExit("\n".join(failed))


def pack(requirements: tuple[str, ...], given: argparse.Namespace) -> str:
    """Downloads what these requirements ask for beside torch; returns why not, or ""."""
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", given.python]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as folder:
        held, report = Path(folder) / "held.txt", Path(folder) / "report.json"
        held.write_text(f"torch=={given.torch}+there\n", encoding="utf-8")
        stand_in(Path(folder), f"{given.torch}+there")
        resolve = ["install", "--dry-run", "--target", folder, "--report", str(report), "--constraint", str(held)]
        resolve += ["--find-links", folder]
        if said := pip([*resolve, *target, *requirements]):
            return said
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    names = [f"{item['name']}=={item['version']}" for item in found if item["name"].lower() not in THERE]
    return pip(["download", "--no-deps", "--dest", str(given.folder), *target, *names])


def stand_in(folder: Path, version: str) -> None:
    """Writes a wheel of torch that holds and requires nothing."""
    about = f"torch-{version}.dist-info"
    files = {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: pack_peers\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


def pip(words: list[str]) -> str:
    """The end of what pip printed where it failed, else ""."""
    run = subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], capture_output=True, text=True)
    return " | ".join(run.stderr.strip().splitlines()[-3:]) if run.returncode else ""


if __name__ == "__main__":
    main()
