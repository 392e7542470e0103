"""The benchmarks: every part runs at a tiny size, the results file keeps its form, and the tables follow from it."""

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
FORM = {"name": str, "unit": str, "values": list, "median": float, "spread": float}
MORE = {"of", "growth", "axis", "at", "inputs", "versions", "settings", "low", "high", "n"}


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of benchmarks/ by name, as its programs import one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measuring

    return measuring


def tiny(part: str, script: str, folder: Path) -> list[dict]:
    """The figures of one part at its tiny size."""
    gpu = [script, "--part", "variants", "--seconds", "0.2", "--only", "without packing"]
    return run_tiny({"data": ["bench.py", "--part", "data"], "gpu": gpu}.get(part, [script]), folder)


def run_tiny(command: list[str], folder: Path) -> list[dict]:
    """The figures of a program of benchmarks/; on one thread, as two run at a time."""
    folder.mkdir()
    command = [sys.executable, *command, "--size", "tiny"]
    command += ["--results", str(folder / "results"), "--work", str(folder / "work")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=BENCHMARKS)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (file,) = (folder / "results").glob("*.json")
    report = json.loads(file.read_text(encoding="utf-8"))
    assert list(report) == ["machine", "versions", "measured", "figures"]
    return report["figures"]


def check_form(entry: dict) -> None:
    assert list(entry)[: len(FORM)] == list(FORM)
    assert set(entry) - set(FORM) <= MORE
    assert all(isinstance(entry[key], kind) for key, kind in FORM.items())
    low, high = min(entry["values"]), max(entry["values"])
    assert low <= entry["median"] <= high
    assert entry["spread"] == pytest.approx(high - low, rel=1e-3, abs=1e-9)
    assert "(tiny)" in entry["name"], "a tiny figure must not pass for a real one"


def test_ratios_that_differ_between_two_results_are_told(benchmarks, tmp_path, monkeypatch, capsys):
    import bench

    def results(name: str, machine: str = "one", **ratios: float) -> str:
        made = [benchmarks.figure(title, "x", [ratio]) for title, ratio in ratios.items()]
        seconds = benchmarks.figure("time", "s", [sum(ratios.values()) * 9])
        (tmp_path / name).write_text(json.dumps({"machine": {"name": machine}, "figures": [*made, seconds]}))
        return str(tmp_path / name)

    old = results("old", f=1.0, s=2.0, alike=3.0, gone=1.0)
    for new, said in (
        (results("new", f=1.2, s=1.7, alike=3.3, came=9.0), "f: 1.0x, now 1.2x\ns: 2.0x, now 1.7x\n"),
        (old, "no ratio differs\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--compare", old, new])
        bench.main()
        assert capsys.readouterr().out == said
    monkeypatch.setattr(sys, "argv", ["bench.py", "--compare", old, results("far", "two", f=9.0)])
    with pytest.raises(ValueError, match="measured on one and on two"):
        bench.main()


@pytest.mark.more
@pytest.mark.slow
def test_every_part_runs_and_keeps_the_form(benchmarks, tmp_path):
    import bench

    parts = [part for part in bench.PARTS if part not in bench.ASKED_FOR]
    parts.sort(key=("first-minutes", "training", "merge").__contains__, reverse=True)
    with ThreadPoolExecutor(2) as pool:
        run = pool.map(lambda part: tiny(part, bench.PARTS[part][0], tmp_path / part), parts)
        found = dict(zip(parts, run, strict=True))
    for figures in found.values():
        for entry in figures:
            check_form(entry)
    ratios = {part: [e for e in figures if e["unit"] == "x"] for part, figures in found.items()}
    assert all(ratios[part] for part in ("data", "training", "packing", "merge", "inference"))
    epoch = [e["name"] for e in found["packing"] if "an epoch of the sample" in e["name"]]
    for what in ("tokens computed", "time"):
        of_both = [name for name in epoch if what in name]
        assert len(of_both) == 3, "with pairs, with conversations, and one over the other"
    for part in ("data", "training", "inference"):
        assert any(e["name"].endswith("exponent") for e in found[part]), f"{part} says how it grows"
    everything = [entry for figures in found.values() for entry in figures]
    assert len({entry["name"] for entry in everything}) == len(everything)
    the_tables_show_them(everything)


@pytest.mark.more
def test_training_on_a_gpu_is_checked_before_it_is_measured(benchmarks, tmp_path):
    """On a CPU too: packed rows train as they do alone, and a resumed run ends as one that was not interrupted."""
    figures = run_tiny(["gpu.py", "--part", "packing", "notebook"], tmp_path / "checks")
    for entry in figures:
        check_form(entry)
    for expected in ("relative error of the gradients", "loss over the trained one"):
        assert any(expected in entry["name"] for entry in figures), expected
    (resumed,) = [entry for entry in figures if "difference of the adapter" in entry["name"]]
    assert resumed["median"] == 0, "to the bit"


def the_tables_show_them(figures: list[dict]) -> None:
    """Every figure stands in the README's tables, every predictable one in docs/scaling.md."""
    import growth_figures
    import scaling
    import tables

    versions = dict.fromkeys(tables.SHOWN_VERSIONS, "1")
    report = {"machine": {"name": "M", "memory_gib": 1.0}, "versions": versions, "figures": figures}
    text = tables.of_machine(report)
    for entry in figures:
        assert entry["name"].partition(": ")[2].partition(", ")[0] in text, entry["name"]
    predicted = [entry for entry in figures if "inputs" in entry]
    assert predicted
    assert scaling.checked([report]).count("| M |") == len(predicted)
    assert set(growth_figures.pictures([report])) == set(growth_figures.FILES.values())


@pytest.mark.more
@pytest.mark.slow  # the counts on the meta device take seconds, and another version of transformers may count otherwise
def test_scaling_follows_from_the_formulas_and_the_results(benchmarks):
    import scaling

    found = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.document(benchmarks.read()) == found, "say: make tables"


def test_the_readme_follows_from_the_results(benchmarks):
    import growth_figures
    import tables

    reports = benchmarks.read()
    for name, blocks in tables.BLOCKS.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        assert tables.with_blocks(page, blocks, reports) == page, "say: make tables"
    assert tables.document(reports) == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), "say: make tables"
    assert [n for n in growth_figures.pictures(reports) if not (ROOT / "docs" / n).is_file()] == []


def test_no_results_no_tables(benchmarks):
    import tables

    blocks = tables.BLOCKS["README.md"]
    old = "".join(f"before\n<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nafter\n" for name in blocks)
    assert tables.with_blocks(old, blocks, []) == old.replace("old\n", "")
    for broken in ("no markers", old.replace("<!-- benchmarks: end -->", ""), old + old):
        with pytest.raises(ValueError, match="(make run|benchmarks): begin"):
            tables.with_blocks(broken, blocks, [])


def test_ratios_are_taken_pair_by_pair(benchmarks):
    slow, fast = [10.0, 20.0, 12.0], [1.0, 2.0, 1.0]
    *sides, ratio = benchmarks.compare("flattening", "s", ("loop", slow), ("ours", fast))
    assert [side["median"] for side in sides] == [12.0, 1.0]
    assert (ratio["values"], ratio["median"], ratio["spread"]) == ([10.0, 10.0, 12.0], 10.0, 2.0)
    assert ratio["of"] == ["flattening, loop", "flattening, ours"]


def test_sides_take_turns(benchmarks):
    order = []
    turns = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    benchmarks.in_turn(turns, 2)
    assert order == ["a", "b", "a", "b"]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(benchmarks, power):
    *points, fitted = benchmarks.growth("time", "rows", "s", {n: [3 * n**power] for n in (10, 100, 1000)})
    assert [point["at"] for point in points] == [10, 100, 1000]
    assert fitted["median"] == pytest.approx(power, rel=1e-3)


def test_a_part_measured_again_replaces_its_own_figures_alone(benchmarks, tmp_path):
    one = benchmarks.figure("time", "s", [1.0])
    benchmarks.record("merge", "small", [one, benchmarks.figure("memory", "GB", [1.0])], tmp_path)
    benchmarks.record("merge", "true", [one], tmp_path)
    benchmarks.record("merge again", "small", [one], tmp_path)
    benchmarks.record("merge", "small", [benchmarks.figure("time", "s", [2.0])], tmp_path)
    (report,) = benchmarks.read(tmp_path)
    found = {entry["name"]: entry["median"] for entry in report["figures"]}
    assert found == {"merge at Phi-2's true size: time": 1.0, "merge again: time": 1.0, "merge: time": 2.0}


def test_what_a_side_logged_before_goes_with_its_other_figures(benchmarks, tmp_path):
    """A peer logs at other steps in another call; one whose name ends as another's does is another side."""
    for side, step in (("TRL", 4), ("old TRL", 5), ("ours, TRL", 6), ("TRL", 7)):
        figures = [benchmarks.figure(f"loss at step {step}, {side}", "nats", [1.0])]
        benchmarks.record_side("beside", "small", side, figures, tmp_path)
    (report,) = benchmarks.read(tmp_path)
    names = [entry["name"] for entry in report["figures"]]
    assert names == [f"beside: loss at step {step}" for step in ("5, old TRL", "6, ours, TRL", "7, TRL")]


def test_other_versions_do_not_mix(benchmarks, tmp_path):
    path = benchmarks.record("merge", "small", [benchmarks.figure("time", "s", [1.0])], tmp_path)
    report = json.loads(path.read_text(encoding="utf-8"))
    report["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(ValueError, match=r"measured with torch 1\.0, now .*--results"):
        benchmarks.record("merge", "small", [], tmp_path)


@pytest.mark.parametrize("part", ["merge", "inference"])
def test_what_was_measured_before_a_part_is_stopped_stays(benchmarks, monkeypatch, tmp_path, part):
    """Here in its second round; a call on a GPU that is lent ends some time."""
    program, turns = importlib.import_module(part), []

    @contextmanager
    def sides(script: str, names: list[str], arguments: list[str], apart: bool):
        def turn(name: str) -> dict:
            if len(turns) == len(names):
                raise RuntimeError("the machine is gone")
            turns.append(name)
            return {"way": name, "load": 1.0, "first": 1.0, "seconds": 2.0, "peak": 3.0, "peak_gb": 3.0, "stages": {}}

        yield {name: (lambda name=name: turn(name)) for name in names}

    monkeypatch.setattr(benchmarks, "sides", sides)
    for name, found in (("make_adapter", None), ("hold_weights", [1.0]), ("published", None)):
        monkeypatch.setattr(program, name, lambda *given, found=found: found, raising=False)
    monkeypatch.setattr(program.shapes, "base", lambda *given: tmp_path)
    folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [part, "--size", "tiny", *folders])
    with pytest.raises(RuntimeError, match="the machine is gone"):
        program.main()
    (report,) = benchmarks.read(tmp_path / "results")
    assert all(any(entry["name"].endswith(f", {side}") for entry in report["figures"]) for side in turns)


def test_the_merge_is_timed_once_its_libraries_are_loaded(benchmarks, monkeypatch, tmp_path):
    import merge

    (tmp_path / "slow_library.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(merge, "LIBRARIES", (*merge.LIBRARIES, "slow_library"))
    monkeypatch.setattr(merge, "once", lambda *given: float("slow_library" in sys.modules))
    assert merge.job(merge.PEFT, "true", tmp_path)()["seconds"] == 1.0


def test_no_stage_is_timed_where_work_goes_on_when_a_layer_returns(benchmarks, monkeypatch):
    import inference
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = inference.TorchEngine.__new__(inference.TorchEngine)
    assert inference.stages(engine, lambda new_tokens: pytest.fail("answered for nothing")) == {}


def test_a_side_that_dies_says_why(benchmarks, tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("raise SystemExit('no disk left')", encoding="utf-8")
    monkeypatch.setattr(benchmarks, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match="no disk left"):
        benchmarks.Side("dies.py", "ours", [])
