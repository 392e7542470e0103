"""Notebooks 1 and 2 on as many messages as OASST1 has, now and as they were before each text was counted once.

    python benchmarks/data_notebooks.py

Both sides do what the notebooks' cells do, with Phi-2's tokenizer, on the same messages: real trees, repeated with
the words of each text in another order. The earlier package comes from git's history. Each turn is a process of its
own.
"""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import measuring

PART = "data preparation, notebooks 1 and 2"
MESSAGES = {"small": 84_000, "tiny": 300}
ROUNDS = {"small": 3, "tiny": 1}
GROWTH = {"small": (10_000, 20_000, 40_000, 60_000, 80_000), "tiny": (100, 200, 300)}
REAL = Path(os.environ.get("LLM_FINETUNING_REAL_DATA") or measuring.ROOT.parent / "shared" / "data")
"""The folder of real trees and of Phi-2's tokenizer; without it the sample's stand in for both."""
CHANGE = "each text counted once"
"""The subject of the commit whose parent is the earlier side."""
EARLIER, NOW = "before each text was counted once", "now"
CORES = {"one core": 1, "all cores": 0}


def earlier_package(folder: Path) -> Path | None:
    """Returns a folder with the package as it was before CHANGE; None where git's history does not hold that."""
    git = ["git", "-C", str(measuring.ROOT)]
    log = subprocess.run([*git, "log", "-1", "--format=%H", f"--grep={CHANGE}"], capture_output=True, text=True)
    archive = subprocess.run([*git, "archive", f"{log.stdout.strip()}^", "llm_finetuning"], capture_output=True)
    if not log.stdout.strip() or archive.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def write_trees(path: Path, count: int) -> int:
    """Writes trees of at least `count` messages; returns the number of messages."""
    trees, written, copy = base_trees(), 0, 0
    with path.open("w", encoding="utf-8") as stream:
        while written < count:
            for tree in trees:
                messages, changed = altered(tree, copy)
                stream.write(json.dumps(changed, ensure_ascii=False) + "\n")
                written += messages
                if written >= count:
                    break
            copy += 1
    return written


def base_trees() -> list[dict]:
    path = REAL / "oa_en_100.trees.jsonl"
    if not path.is_file():
        from llm_finetuning.sample.trees import build

        return build("train")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def altered(tree: dict, copy: int) -> tuple[int, dict]:
    """Returns (number of messages, the tree under ids of its own and with the words of its texts in another order)."""
    tree, chance = json.loads(json.dumps(tree)), random.Random(f"{copy} {tree['message_tree_id']}")
    tree["message_tree_id"] += f" {copy}"
    messages = [tree["prompt"]]
    for message in messages:
        for name in ("message_id", "parent_id"):
            if message.get(name):
                message[name] += f" {copy}"
        words = message["text"].split(" ")
        chance.shuffle(words)
        message["text"] = " ".join(words)
        messages += message.get("replies") or []
    return len(messages), tree


def prepare_side(given) -> Callable[..., dict]:
    """Returns the job of a process: both notebooks' cells, or the first one's, on a file of trees."""
    side, package = json.loads(given.side)
    sys.path.insert(0, package)
    from llm_finetuning import models, plotting, prompts
    from llm_finetuning.data import prepare, reports
    from llm_finetuning.settings import DataPrep

    assert Path(prepare.__file__).is_relative_to(package), f"{side} is not of {package}"
    folder = REAL / "phi-2-tokenizer"
    own = {"tokenizer_folder": str(folder)} if folder.is_dir() else {"model_name": "sample"}

    models.tokenizer(own.get("model_name", "microsoft/phi-2"), own.get("tokenizer_folder", ""))
    plotting.new_figure(), reports.versions()  # what is imported on first use is imported before

    def one(settings: DataPrep, split: str) -> "prepare.Prepared":
        template = prompts.template_for(models.tokenizer(settings.model_name, settings.tokenizer_folder))
        prepared = prepare.prepare(settings, prepare.read(settings, split), template)
        prepare.write(prepared)
        prepare.save_figures(prepared)
        if split == "validation":
            prepare.check_leaks(prepared, template)
        return prepared

    def job(source: str, splits: list[str]) -> dict:
        settings = DataPrep(drive_folder=str(given.work / "prepared"), source=source, **own)
        found: list = []
        seconds = measuring.seconds_of(lambda: found.extend(one(settings, split) for split in splits))
        pairs = [len(prepared.pairs) for prepared in found]
        return {"s": seconds, "GB": measuring.peak_resident() / 1e9, "pairs": pairs}

    return job


def turn(given, side: str, package: Path, cores: int, source: Path, splits: list[str]) -> dict:
    """One run of a side in a process of its own; cores: 0 = all there are."""
    names = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, names[:cores] if cores else names)
    try:
        with measuring.Side(Path(__file__).name, json.dumps([side, str(package)]), ["--work", str(given.work)]) as one:
            return one.turn(source=str(source), splits=splits)
    finally:
        os.sched_setaffinity(0, names)


def comparison(given, source: Path, messages: int) -> list[dict]:
    """Measures both sides in turn, on one core and on all."""
    earlier = earlier_package(given.work / "earlier")
    if earlier is None:
        print("The earlier package is not in git's history: only how notebook 1 grows is measured.")
        return []
    packages, both = {EARLIER: earlier, NOW: measuring.ROOT}, ["train", "validation"]
    figures = []
    for label, cores in CORES.items():
        turns = {
            side: (lambda side=side, path=path, cores=cores: turn(given, side, path, cores, source, both))
            for side, path in packages.items()
        }
        found = measuring.in_turn(turns, ROUNDS[given.size])
        for unit, what in (("s", "time"), ("GB", "peak memory")):
            sides = [(side, [one[unit] for one in runs]) for side, runs in found.items()]
            figures += measuring.compare(f"{messages:,} messages, {label}, {what}", unit, *sides)
    return figures


def how_it_grows(given, source: Path) -> list[dict]:
    """Measures notebook 1's time by the number of messages, on all cores."""
    times = {}
    for count in GROWTH[given.size]:
        messages = write_trees(source, count)
        times[messages] = [turn(given, NOW, measuring.ROOT, 0, source, ["train"])["s"]]
    return measuring.growth("time of notebook 1", "messages", "s", times)


def main() -> None:
    given = measuring.options(__doc__, "small", "tiny").parse_args()
    if given.side:
        measuring.serve(lambda: prepare_side(given))
        return
    given.work = given.work / "data_notebooks"
    given.work.mkdir(parents=True, exist_ok=True)
    source = given.work / "trees.jsonl"
    figures = comparison(given, source, write_trees(source, MESSAGES[given.size]))
    figures += how_it_grows(given, source)
    print(f"written to {measuring.record(PART, given.size, figures, given.results)}")


if __name__ == "__main__":
    main()
