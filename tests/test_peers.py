"""Other programs beside ours in the GPU benchmark: the same rows, environments of their own, and no harm from any."""

import argparse
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GOOD = {
    "seconds": 2.0,
    "tokens": 1000,
    "steps": 4,
    "all_tokens": 1500,
    "peak_gib": 1.5,
    "loss": 6.9,
    "losses": [[1, 7.0], [2, 6.9]],
    "settings": {"optim": "sgd"},
    "versions": {"torch": "1.0"},
}


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    return peers


@pytest.fixture
def given(tmp_path) -> argparse.Namespace:
    """What gpu.py hands to the part; there is no base, as no stub reads one."""
    return argparse.Namespace(
        size="tiny",
        only="peer",
        seconds=0.2,
        ends=time.perf_counter() + 3600,
        folder=tmp_path / "scratch",
        base=tmp_path / "base",
        results=tmp_path / "results",
        work=tmp_path / "work",
        install=False,
        wheels=None,
    )


def writes(content: str) -> str:
    """A recipe that writes this as its result."""
    return f"import json, sys; open(json.load(open(sys.argv[1]))['result'], 'w').write({content!r})"


def changed(**fields: object) -> str:
    return json.dumps(GOOD | fields)


HARM = {
    "crashes": ("raise SystemExit('no \\x1b[31m kernel image')", r"ended with 1: no  \[31m kernel image"),
    "segfaults": ("import os; os.kill(os.getpid(), 11)", "ended with -11: it printed nothing"),
    "hangs": ("import time; print('loading', flush=True); time.sleep(1000)", "stopped .* time: loading"),
    "prints-without-end": ("while True: print('x' * 1000)", "stopped .* x{200}"),
    "writes-nothing": ("print('done')", "without a result"),
    "leaves-a-folder": ("import json, os, sys; os.mkdir(json.load(open(sys.argv[1]))['result'])", "without a result"),
    "removes-all-folders": ("import os, shutil; shutil.rmtree(os.path.dirname(os.getcwd()))", "without a result"),
    "garbage": (writes("\x00tokens: 12"), "no JSON"),
    "nested": (writes("[" * 16_000), "no JSON"),
    "half": (writes(changed()[:-30]), "no JSON"),
    "a-list": (writes("[1, 2]"), r"no JSON object: \[1, 2\]"),
    "large": (writes(changed(settings={"x": "y" * 2**14})), r"16,\d\d\d bytes"),
    "nan": (writes(changed(loss=math.nan)), "loss = nan"),
    "no-time": (writes(changed(seconds=0, tokens=math.inf)), "seconds = 0, tokens = inf"),
    "beyond-numbers": (writes(changed(tokens=10**400)), "tokens = 1000"),
    "no-text": (writes(changed(versions={"torch": "\ud800"})), "surrogates not allowed"),
    "texts": (writes(changed(tokens="1000", steps=True)), "tokens = '1000', steps = True"),
    "losses": (writes(changed(losses=[[1, 2], [3, "x"]])), "losses = "),
    "half-a-character": (writes(changed(losses="\ud800")), r"losses = '.ud800'"),
    "no-versions": (writes(changed(versions=None)), "versions = None"),
    "fails-behind-it": (writes(changed()) + "; sys.exit(3)", "ended with 3"),
}


def stubs(peers, monkeypatch, folder: Path, recipes: dict[str, str]) -> None:
    """Puts these recipes in the place of the peers'."""
    folder.mkdir()
    for name, source in recipes.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(peers, "RECIPES", folder)
    monkeypatch.setattr(peers, "PEERS", {f"peer {name}": peers.Peer(f"{name}.py") for name in recipes})


def recorded(given: argparse.Namespace) -> dict[str, float]:
    (file,) = given.results.glob("*.json")
    return {entry["name"].partition(": ")[2]: entry["median"] for entry in json.loads(file.read_text())["figures"]}


def test_a_peer_that_does_harm_costs_its_own_numbers_alone(peers, given, monkeypatch, tmp_path, capsys):
    import re

    recipes = {"first": writes(changed()), **{name: source for name, (source, _) in HARM.items()}}
    stubs(peers, monkeypatch, tmp_path / "recipes", recipes | {"last": writes(changed(tokens=3000))})
    # a second each for those that never end; the others need no more than Python's start
    monkeypatch.setattr(peers, "share", lambda given, left: time.perf_counter() + (1 if left in slow else 20))
    order = [*recipes, "last"]
    slow = {len(order) - order.index(name) for name in ("hangs", "prints-without-end")}
    wrong = peers.measure(given)
    assert len(wrong) == len(HARM)
    for sentence, (name, (_, reason)) in zip(wrong, HARM.items(), strict=True):
        assert sentence.startswith(f"peer {name}: ")
        assert re.search(reason, sentence), sentence
        assert "\n" not in sentence and len(sentence) < 1000
    speeds = {name: speed for name, speed in recorded(given).items() if name.startswith("tokens per second")}
    assert speeds == {"tokens per second, peer first": 500.0, "tokens per second, peer last": 1500.0}


def test_what_a_program_started_ends_with_it(peers, tmp_path):
    import children

    held = tmp_path / "held.py"  # one that has left the session holds the pipe, the other is in it and sleeps on
    held.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "other = subprocess.Popen(['sleep', '5'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n",
        encoding="utf-8",
    )
    begun = time.perf_counter()
    ended = children.run([sys.executable, str(held)], begun + 100)
    assert ended.code == 0
    stat = Path(f"/proc/{ended.output.strip()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_only_the_end_of_an_endless_output_is_kept(peers):
    import children

    lines = "import sys\nfor n in range(2_000_000): sys.stdout.write(f'{n}\\n')"
    ended = children.run([sys.executable, "-c", lines], time.perf_counter() + 100)
    assert ended.output.endswith("\n1999999\n")
    assert len(ended.output) <= children.KEPT * children.BLOCK


def test_a_peer_reads_the_token_ids_and_labels_that_ours_trains(peers, tmp_path):
    """Read by datasets, as every recipe does, and by another reader of JSON."""
    import gpu_variants
    import pandas as pd
    from datasets import Dataset

    rows = gpu_variants.rows_for("tiny", 12).examples
    file = peers.export(rows, tmp_path / "rows.jsonl")
    found = Dataset.from_json(str(file), cache_dir=str(tmp_path))
    assert found.column_names == ["input_ids", "attention_mask", "labels"]
    assert found["input_ids"][:] == [row["input_ids"] for row in rows]
    assert found["labels"][:] == [row["labels"] for row in rows]
    assert {mark for mask in found["attention_mask"] for mark in mask} == {1}
    assert [len(mask) for mask in found["attention_mask"]] == [len(row["input_ids"]) for row in rows]
    assert pd.read_json(file, lines=True)["input_ids"].tolist() == [row["input_ids"] for row in rows]


def test_what_cannot_run_here_is_skipped_with_the_reason(peers, given, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given.only = "Unsloth"
    assert peers.measure(given) == []
    given.only = "axolotl"
    assert peers.measure(given) == []
    said = capsys.readouterr().out
    assert "Unsloth, packing: skipped, it cannot be imported where there is no GPU" in said
    assert "axolotl: skipped, its environment is made with --install (from the package index) or --wheels" in said
    assert not given.results.exists()


def test_what_is_skipped_takes_no_share_of_the_time(peers, given, monkeypatch, tmp_path):
    stubs(peers, monkeypatch, tmp_path / "recipes", {"first": writes(changed()), "last": writes(changed())})
    elsewhere = {f"peer {name}": peers.Peer("none.py", ("none==1.0",)) for name in "abc"}
    monkeypatch.setattr(peers, "PEERS", elsewhere | peers.PEERS)
    shares = []
    monkeypatch.setattr(peers, "share", lambda given, left: shares.append(left) or time.perf_counter() + 20)
    assert peers.measure(given) == []
    assert shares == [2, 1]


@pytest.mark.parametrize("folder", ["site", "{here}/site", "nowhere{sep}site{sep}"])
def test_packages_that_pythonpath_brings_are_there_for_who_runs_in_this_environment(
    peers, given, monkeypatch, tmp_path, folder
):
    """From any folder: each peer runs in one of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "brought.py").write_text("TOKENS = 3000", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", folder.format(here=tmp_path, sep=os.pathsep))
    answer = (
        "import brought, json, sys\n"
        f"json.dump({GOOD!r} | {{'tokens': brought.TOKENS}}, open(json.load(open(sys.argv[1]))['result'], 'w'))"
    )
    stubs(peers, monkeypatch, tmp_path / "recipes", {"asks": answer})
    assert peers.measure(given) == []
    assert recorded(given)["tokens per second, peer asks"] == 1500.0


def test_every_peer_that_needs_an_environment_names_one_version(peers):
    """Its settings were read for a version, and its figures are those of one."""
    for name, peer in peers.PEERS.items():
        assert (BENCHMARKS / "peer_recipes" / peer.recipe).is_file(), name
        assert not peer.requirements or "==" in peer.requirements[0], name


def wheel(folder: Path, name: str, requires: str = "", source: str = "") -> None:
    """A wheel with one module, as the package index would hand it out."""
    about = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + (
        f"Requires-Dist: {requires}\n" * bool(requires)
    )
    files = {f"{name}.py": source, f"{about}/METADATA": metadata}
    files[f"{about}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{about}/RECORD"))
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def test_an_environment_has_its_own_packages_and_the_torch_that_is_there(peers, given, monkeypatch, tmp_path, capsys):
    import torch
    import transformers

    given.wheels = tmp_path / "wheels"
    brought = tmp_path / "site"
    wheel(tmp_path, "brought")
    zipfile.ZipFile(tmp_path / "brought-1.0-py3-none-any.whl").extractall(brought)
    monkeypatch.setenv("PYTHONPATH", str(brought))
    monkeypatch.syspath_prepend(brought)
    wheel(given.wheels, "stubpeer", "torch")
    wheel(given.wheels, "transformers", source="HERE = True")  # another version than that of the running environment
    wheel(given.wheels, "wantsother", "torch==1.0")
    answer = (
        "import brought, importlib.util, json, sys, stubpeer, transformers\n"
        "assert transformers.HERE\n"
        "torch = importlib.util.find_spec('torch').origin\n"
        f"found = {GOOD!r} | {{'versions': {{'torch': torch, 'prefix': sys.prefix}}}}\n"
        "json.dump(found, open(json.load(open(sys.argv[1]))['result'], 'w'))"
    )
    recipes = dict.fromkeys(("fits", "wants-another-torch", "is-not-there"), answer)
    stubs(peers, monkeypatch, tmp_path / "recipes", recipes)
    needs = [("stubpeer==1.0", "transformers==1.0"), ("wantsother==1.0",), ("missing==1.0",)]
    made = {name: peers.Peer(f"{name}.py", need) for name, need in zip(recipes, needs, strict=True)}
    monkeypatch.setattr(peers, "PEERS", made)
    given.only = ""
    monkeypatch.setattr(peers, "ours", lambda given: {"tokens": 2000, "seconds": 2.0, "peak_gib": 1.0})
    assert peers.measure(given) == []
    said = capsys.readouterr().out
    assert (
        "wants-another-torch: skipped, it does not install: " in said and "wantsother 1.0 depends on torch==1.0" in said
    )
    assert "is-not-there: skipped, it does not install: " in said and "missing==1.0" in said
    (file,) = given.results.glob("*.json")
    (speed,) = [e for e in json.loads(file.read_text())["figures"] if e["name"].endswith("tokens per second, fits")]
    assert speed["versions"]["torch"] == torch.__file__
    assert speed["versions"]["prefix"] == str(given.work / "peers" / "stubpeer-1-0")
    assert recorded(given)["tokens per second, ours over fits"] == 2.0
    assert transformers.__version__ != "1.0"
    python = given.work / "peers" / "stubpeer-1-0" / "bin" / "python"
    before = os.stat(python, follow_symlinks=False).st_mtime_ns
    assert peers.installed(needs[0], given.work / "peers", given.wheels, given.ends) == python
    assert os.stat(python, follow_symlinks=False).st_mtime_ns == before, "made once"


def test_wheels_are_packed_for_another_machine_without_torch(peers, monkeypatch, tmp_path):
    import pack_peers

    wheel(tmp_path / "index", "stubpeer", "torch>=2.10")
    wheel(tmp_path / "index", "old", "torch<2")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    given = argparse.Namespace(folder=tmp_path / "wheels", python="3.12", torch="2.11.0")
    assert pack_peers.pack(("stubpeer==1.0",), given) == ""
    assert [file.name for file in given.folder.iterdir()] == ["stubpeer-1.0-py3-none-any.whl"]
    assert "ResolutionImpossible" in pack_peers.pack(("old==1.0",), given)


def test_a_variant_of_ours_differs_in_one_thing(peers):
    """Without packing as many tokens make an optimizer step as with it; the original's had one row."""
    import gpu_list
    import gpu_variants
    import training_runs

    sheet = next(sheet for sheet in gpu_list.SHEETS if sheet.name == "H100")

    def tokens_of(name: str) -> tuple[int, int]:
        changes = gpu_variants.settings_of(gpu_variants.VARIANTS[name], "true")
        chosen = training_runs.settings_for(Path("nowhere"), Path("nowhere"), changes)
        plan = gpu_list.planning.plan(chosen, gpu_list.scaling.machine_of(sheet), gpu_list.shapes.config("true"), [500])
        return plan.step_tokens, plan.micro_batch_tokens

    whole = tokens_of("ours")[0]
    assert tokens_of("ours, without packing") == (whole, 1024)
    assert tokens_of("ours, with torch's fused AdamW")[0] == whole
    assert tokens_of("the original's settings") == (1024, 1024)


def test_the_list_says_what_would_be_written_and_how_long_it_trains(peers):
    import gpu_list
    import gpu_variants

    rows = [line.split(" | ") for line in gpu_list.table("tiny", "H100", 15.0).splitlines() if line.startswith("| ")]
    names = " ".join(row[1] for row in rows)
    assert all(name in names for name in [*gpu_variants.VARIANTS, peers.OURS, *peers.PEERS])
    (seconds,) = {row[3] for row in rows if row[1].endswith(": ours") and row[0] == "| variants"}
    assert 15.0 <= float(seconds.partition(" s")[0]) < 16.0
    slow, fast = (gpu_list.step_seconds("tiny", sheet, {}) for sheet in gpu_list.SHEETS if sheet.name in ("L4", "H100"))
    assert slow / fast == pytest.approx(989 / 121), "by the data sheets"


@pytest.mark.parametrize(
    ("device", "sheet"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A10G", None),
        ("AMD EPYC", None),
    ],
)
def test_a_gpus_data_sheet_is_found_by_the_name_that_its_driver_gives(peers, device, sheet):
    import gpu_variants

    found = gpu_variants.data_sheet(device)
    assert (found and found.name.split()[0]) == sheet


@pytest.mark.more
@pytest.mark.slow
def test_trl_trains_the_rows_once_by_its_notebooks_recipe(peers, given, tmp_path):
    """For real, on a CPU: an epoch has every token of the rows, and the loss is that of random tokens."""
    import gpu_variants
    import shapes

    given.base, given.seconds = shapes.base(tmp_path, "tiny"), 1e9
    rows = gpu_variants.rows_for("tiny", 24)
    ends = time.perf_counter() + 600
    for name in ("TRL", "TRL, packing"):
        found = peers.one(name, peers.PEERS[name], rows, ends, given)
        assert found["all_tokens"] == sum(rows.lengths), name
        assert found["losses"][0][1] == pytest.approx(math.log(1024), rel=0.1), "a base with random weights"
        assert found["versions"]["trl"] and found["settings"]["r"] == 32
        assert found["settings"]["packing"] is ("packing" in name)
