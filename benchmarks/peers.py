"""Other programs for QLoRA beside the notebook's training: the same base, the same rows, their own settings.

Each trains in a process of its own, in an environment of its own, by a recipe in peer_recipes/ that says where its
settings come from; here nothing of theirs is imported. What cannot run is skipped with the reason, and what crashes,
hangs or answers nonsense costs its own numbers alone.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import children
import gpu_variants
import measuring
import torch

from llm_finetuning.training.dataset import TrainingData

PART = "training beside other programs"
RECIPES = measuring.HERE / "peer_recipes"
OURS = measuring.OURS
LARGEST_RESULT = 2**14
"""Bytes of a result; usual are two thousand."""
LARGEST_NUMBER = 1e15
NUMBERS = ("seconds", "tokens", "steps", "all_tokens", "peak_gib", "loss")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "PYTHONNOUSERSITE": "1",
}
"""What keeps a peer from asking a network that may not be there."""


@dataclass(frozen=True)
class Peer:
    """A recipe, what it needs installed beside the running torch, and whether it can be imported without a GPU."""

    recipe: str
    requirements: tuple[str, ...] = ()
    gpu: bool = False
    packing: bool = False


UNSLOTH = ("unsloth==2026.10.9",)
PEERS = {
    "TRL": Peer("trl_recipe.py"),
    "TRL, packing": Peer("trl_recipe.py", packing=True),
    "Unsloth": Peer("unsloth_recipe.py", UNSLOTH, gpu=True),
    "Unsloth, packing": Peer("unsloth_recipe.py", UNSLOTH, gpu=True, packing=True),
    "LLaMA-Factory": Peer("llamafactory_recipe.py", ("llamafactory==0.9.5", "bitsandbytes")),
    "axolotl": Peer("axolotl_recipe.py", ("axolotl==0.19.0",)),
}


class SkippedError(RuntimeError):
    """A peer cannot run on this machine; the message is the reason."""


def measure(given: argparse.Namespace) -> list[str]:
    """Ours, then every peer that can run here, an equal share of the time each; what went wrong, as sentences."""
    rows = gpu_variants.rows_for(given.size, gpu_variants.ROWS[given.size])
    mean = sum(rows.lengths) / len(rows.lengths)
    wrong = []
    names = [name for name in (OURS, *PEERS) if given.only in name and can_run(name, given)]
    for left, name in zip(range(len(names), 0, -1), names, strict=True):
        try:
            result = ours(given) if name == OURS else one(name, PEERS[name], rows, share(given, left), given)
            record(name, result, mean, given)
        except SkippedError as reason:
            print(f"{name}: skipped, {reason}", flush=True)
        except Exception as error:  # a peer that fails costs its own numbers alone
            wrong.append(f"{name}: {error}")
            print(f"NOT MEASURED, {wrong[-1]}", flush=True)
    return wrong


def can_run(name: str, given: argparse.Namespace) -> bool:
    """Whether nothing that is known beforehand speaks against a side; else says what does."""
    peer, reason = PEERS.get(name, Peer("")), ""
    if peer.gpu and not torch.cuda.is_available():
        reason = "it cannot be imported where there is no GPU"
    elif peer.requirements and not (given.install or given.wheels):
        reason = "its environment is made with --install (from the package index) or --wheels FOLDER"
    if reason:
        print(f"{name}: skipped, {reason}", flush=True)
    return not reason


def share(given: argparse.Namespace, left: int) -> float:
    """When the next of `left` peers has to be done, by time.perf_counter."""
    now = time.perf_counter()
    return now + (given.ends - now) / left


def ours(given: argparse.Namespace) -> dict:
    """The notebook's training in the form of a peer's result, as far as the figures ask."""
    found = gpu_variants.one("ours", {}, given)
    tokens = found["tokens_per_second"] * found["seconds"]
    return {"tokens": tokens, "seconds": found["seconds"], "peak_gib": found["peak_gib"]}


def export(rows: list[dict], file: Path) -> Path:
    """The rows' token ids and labels as JSON lines, the form that every peer reads; nothing of a row is padding."""
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            ids = row["input_ids"]
            whole = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row["labels"]}
            lines.write(json.dumps(whole) + "\n")
    return file


def one(name: str, peer: Peer, rows: TrainingData, ends: float, given: argparse.Namespace) -> dict:
    """What a peer's process measured. Raises SkippedError, or ValueError for one that did not measure."""
    if time.perf_counter() > ends:
        raise ValueError("not begun, the time is up")
    python = environment(peer, given, ends)
    work = given.folder / re.sub(r"\W+", "-", name)
    work.mkdir(parents=True)
    file, job, result = export(rows.examples, work / "rows.jsonl"), work / "job.json", work / "result.json"
    asked = {"base": str(given.base.resolve()), "rows": str(file), "work": str(work), "result": str(result)}
    asked |= {"seconds": given.seconds, "warm_up": gpu_variants.WARM_UP[given.size], "packing": peer.packing}
    job.write_text(json.dumps(asked), encoding="utf-8")
    command = [str(python), str(RECIPES / peer.recipe), str(job)]
    paths = {} if peer.requirements else brought()
    ended = children.run(command, ends, cwd=work, env=variables() | paths | QUIET)
    if ended.code is None:
        raise ValueError(f"stopped at the end of its share of the time: {ended.reason}")
    if ended.code:
        raise ValueError(f"ended with {ended.code}: {ended.reason}")
    return read_result(result)


def variables() -> dict[str, str]:
    """The environment variables without what would stand before the packages of a peer's own environment."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def brought() -> dict[str, str]:
    """PYTHONPATH from any folder, for a peer in the running environment, which may have packages by it."""
    folders = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {"PYTHONPATH": os.pathsep.join(folders)} if folders else {}


def environment(peer: Peer, given: argparse.Namespace, ends: float) -> Path:
    """The Python of a peer: the running one where that has all it needs. Raises SkippedError with the reason."""
    if not peer.requirements:
        return Path(sys.executable)
    return installed(peer.requirements, given.work.resolve() / "peers", given.wheels, ends)


def installed(requirements: tuple[str, ...], folder: Path, wheels: Path | None, ends: float) -> Path:
    """The Python of an environment with these requirements; made once, and anew when torch or they have changed.

    It sees the packages of the running environment, so that torch is not installed again, and has others in front.
    """
    path = folder / re.sub(r"\W+", "-", requirements[0])
    python, stamp = path / "bin" / "python", path / "made-of.json"
    made_of = json.dumps([requirements, sys.version, torch.__version__, list(shared_packages())])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == made_of:
        return python
    shutil.rmtree(path, ignore_errors=True)
    call([sys.executable, "-m", "venv", "--without-pip", str(path)], ends)
    site = next(path.glob("lib/python*/site-packages"))
    (site / "running.pth").write_text("".join(f"{entry}\n" for entry in shared_packages()), encoding="utf-8")
    (path / "held.txt").write_text(f"torch=={torch.__version__}\n", encoding="utf-8")
    source = ["--no-index", "--find-links", str(wheels)] if wheels else ["--retries", "1", "--timeout", "15"]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--prefer-binary", *source]
    call([*install, "--constraint", str(path / "held.txt"), *requirements], ends)
    stamp.write_text(made_of, encoding="utf-8")
    return python


def shared_packages() -> Iterator[str]:
    """The folders of installed packages that the running Python looks into, those of PYTHONPATH too."""
    folders = (Path(entry).absolute() for entry in sys.path)
    return (str(folder) for folder in folders if any(folder.glob("*.dist-info")))


def call(command: list[str], ends: float) -> None:
    """Raises SkippedError unless the command ends well in time."""
    ended = children.run(command, ends, env=variables())
    if ended.code != 0:
        what = "the time was up while it was installed" if ended.code is None else "it does not install"
        raise SkippedError(f"{what}: {ended.about('depends on|requested|ERROR')}")


def read_result(file: Path) -> dict:
    """What a peer wrote, checked as that of a stranger. Raises ValueError for what is no measurement."""
    if not file.is_file():
        raise ValueError("it ended without a result")
    if file.stat().st_size > LARGEST_RESULT:
        raise ValueError(f"its result has {file.stat().st_size:,} bytes, more than {LARGEST_RESULT:,}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its result is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"its result is no JSON object: {ascii(found)[:80]}")
    bad = [name for name in NUMBERS if not is_positive(found.get(name))]
    losses = found.get("losses")
    if not isinstance(losses, list) or not all(is_loss(entry) for entry in losses):
        bad.append("losses")
    bad += [name for name in ("versions", "settings") if not isinstance(found.get(name), dict)]
    if bad:
        raise ValueError("its result is no measurement: " + ", ".join(f"{n} = {ascii(found.get(n))[:80]}" for n in bad))
    return found


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < LARGEST_NUMBER


def is_loss(entry: object) -> bool:
    """Whether it is [step, loss], both positive numbers."""
    return isinstance(entry, list) and len(entry) == 2 and all(map(is_positive, entry))


def record(name: str, found: dict, mean_tokens: float, given: argparse.Namespace) -> None:
    """Writes what a side measured beside what there is, and says it."""
    path = measuring.record_side(PART, given.size, name, figures_of(name, found, mean_tokens), given.results)
    speed = found["tokens"] / found["seconds"]
    print(f"{name}: {speed:,.0f} tokens/s, at most {found['peak_gib']:.1f} GiB; written to {path}", flush=True)


def figures_of(name: str, found: dict, mean_tokens: float) -> list[dict]:
    """Tokens and rows a second, memory, and the loss at the first and the last step that the peer has logged."""
    speed = found["tokens"] / found["seconds"]
    known = {key: found[key] for key in ("versions", "settings") if key in found}
    figures = [
        measuring.figure(f"tokens per second, {name}", "tokens/s", [speed], **known),
        measuring.figure(f"rows per second, {name}", "1/s", [speed / mean_tokens]),
        measuring.figure(f"peak memory, {name}", "GiB", [found["peak_gib"]]),
    ]
    losses = found.get("losses", [])
    ends = dict(losses[:1] + losses[-1:])
    figures += [measuring.figure(f"loss at step {step}, {name}", "nats", [loss]) for step, loss in ends.items()]
    return figures
