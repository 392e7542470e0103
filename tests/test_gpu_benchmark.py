"""The GPU benchmark: what ends a part, what of a call stays, and the bounds of its checks. Here no GPU is asked for."""

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of benchmarks/ by name, as its programs import one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measuring

    return measuring


@pytest.fixture
def variants(benchmarks, monkeypatch, tmp_path):
    """variants(only, speed) measures those variants; each of them trains so many tokens a second."""
    import gpu_variants

    def measure(only: str, speed: float) -> dict[str, float]:
        machine = {"name": "M", "flops": 1.0}
        one = {"tokens_per_second": speed, "peak_gib": 1.0, "mfu": 0.5, "planned_gib": 1.0}
        one |= {"planned_tokens_per_second": 1.0, "inputs": {"tokens": 2, "rows": 1, "machine": machine}}
        monkeypatch.setattr(gpu_variants, "one", lambda *given: one)
        given = argparse.Namespace(only=only, size="tiny", ends=math.inf, results=tmp_path)
        assert gpu_variants.measure(given) == []
        (report,) = benchmarks.read(tmp_path)
        title = "training variants (tiny): "
        return {entry["name"].removeprefix(title): entry["median"] for entry in report["figures"]}

    return measure


def test_variants_measured_later_stand_beside_those_of_earlier_calls(variants):
    first = variants("", 30.0)
    names = [name for name in first if name.startswith("tokens per second, ours over ")]
    assert len(names) > 10 and {first[name] for name in names} == {1.0}
    second = variants("4,096", 10.0)
    assert first.keys() == second.keys()
    changed = {name: value for name, value in second.items() if value != first[name]}
    side = "ours, steps of 4,096 tokens"
    assert changed == {
        f"tokens per second, {side}": 10.0,
        f"rows per second, {side}": 5.0,
        f"tokens per second, ours over {side}": 3.0,
    }


def test_what_compiles_for_minutes_is_tried_last(benchmarks):
    """A variant is begun where the longest so far would end in time: these minutes would stop all that came after."""
    import gpu_variants

    assert list(gpu_variants.VARIANTS)[-1] == "ours, with layers compiled"


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(("moved", "right"), [(0.0, True), (0.01, "on a GPU"), (0.1, False)])
def test_a_resumed_run_may_differ_as_two_resumed_ones_do(benchmarks, monkeypatch, tmp_path, on_gpu, moved, right):
    """A GPU adds in another order each time; here its two runs are 0.01 apart."""
    import gpu_checks

    ends = iter([1 + moved, 1 + moved + 0.01])

    def resumed(*given: object) -> tuple:
        adapter = torch.nn.ParameterDict({"lora_A": torch.full((9,), next(ends))})
        return SimpleNamespace(close=lambda: None), SimpleNamespace(model=adapter, plan=SimpleNamespace(optimizer="x"))

    monkeypatch.setattr(gpu_checks, "on_gpu", lambda: on_gpu)
    monkeypatch.setattr(gpu_checks, "trained", lambda *given: {"lora_A": torch.ones(9)})
    monkeypatch.setattr(gpu_checks, "resumed", resumed)
    monkeypatch.setattr(gpu_checks, "merge", lambda *given: None)
    given = argparse.Namespace(size="tiny", results=tmp_path)
    if right is True or (right and on_gpu):
        gpu_checks.notebook(given)
    else:
        with pytest.raises(ValueError, match="ends with another adapter"):
            gpu_checks.notebook(given)


STATES = [("adamw", name) for name in (None, "lora_A.weight", "0.exp_avg_sq")]
STATES += [("paged", name) for name in (None, "0.state2")]


@pytest.mark.parametrize(("kind", "changed"), [*STATES, ("adamw", "all of the optimizer")])
def test_a_resumed_run_begins_with_what_its_checkpoint_holds(benchmarks, tmp_path, kind, changed):
    import gpu_checks

    model = torch.nn.ModuleDict({"lora_A": torch.nn.ModuleDict({"default": torch.nn.Linear(3, 2, bias=False)})})
    (weight,) = model.parameters()
    optimizer = torch.optim.AdamW([weight]) if kind == "adamw" else bitsandbytes.optim.PagedAdamW32bit([weight])
    if kind == "adamw":
        model["lora_A"]["default"](torch.ones(3)).sum().backward()
        optimizer.step()
    else:
        optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)  # its step needs a GPU
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    save_file({"lora_A.weight": weight.detach().clone()}, tmp_path / "adapter_model.safetensors")
    held = {"lora_A.weight": weight.detach()} | gpu_checks.moments(optimizer.state_dict())
    if changed in held:
        first = held[changed].view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.tensor(9.0)))
    if changed == "all of the optimizer":
        optimizer = torch.optim.AdamW([weight])
    loaded = gpu_checks.Loaded(SimpleNamespace(model=model, optimizer=optimizer), tmp_path)
    assert loaded.different is None
    loaded.on_train_begin(None, None, None)
    expected = {None: [], "all of the optimizer": ["0.exp_avg", "0.exp_avg_sq", "0.step"]}
    assert loaded.different == expected.get(changed, [changed])


@pytest.fixture
def gpu(benchmarks, monkeypatch, tmp_path):
    """gpu(*options) runs gpu.py's main in this process; in the place of its own process each part has a stub."""
    import gpu

    stub = tmp_path / "stub.py"
    stub.write_text(
        "import os, subprocess, sys, time\n"
        "part = sys.argv[sys.argv.index('--part') + 1]\n"
        f"open({str(tmp_path / 'begun')!r}, 'a').write(part + '\\n')\n"
        "if part == 'packing': os.abort()\n"
        f"if part == 'merge': open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '100']).pid))\n"
        "if part == 'merge': time.sleep(100)\n"
        "sys.exit(part == 'notebook')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu, "__file__", str(stub))
    monkeypatch.setattr(gpu, "GRACE", 0)

    def main(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--size", "tiny", "--results", str(tmp_path / "results"), *options])
        gpu.main()

    return main


def test_a_part_that_takes_its_process_down_costs_its_own_figures_alone(gpu, tmp_path):
    with pytest.raises(SystemExit) as said:
        gpu("--part", "attention", "packing", "notebook", "variants")
    assert str(said.value).splitlines() == ["packing: ended with -6", "notebook: ended with 1"]
    assert (tmp_path / "begun").read_text().split() == ["attention", "packing", "notebook", "variants"]


def test_when_the_time_is_up_the_part_under_way_is_stopped_and_the_others_are_named(gpu):
    with pytest.raises(SystemExit) as said:
        gpu("--part", "merge", "peers", "attention", "--minutes", "0.02")
    assert str(said.value).splitlines() == [
        "merge: stopped, the time is up",
        "peers: not begun, the time is up",
        "attention: not begun, the time is up",
    ]


def test_a_part_that_hangs_is_stopped_at_its_ceiling_and_costs_no_other(gpu, monkeypatch, tmp_path):
    """What it started ends with it, which would hold the GPU's memory; a part that runs alone is stopped too."""
    monkeypatch.setitem(sys.modules["gpu"].CEILING, "merge", 3)
    with pytest.raises(SystemExit) as said:
        gpu()
    wrong = ["packing: ended with -6", "notebook: ended with 1", "merge: stopped, it took more than 3 s"]
    assert str(said.value).splitlines() == wrong
    order = ["attention", "packing", "variants", "notebook", "merge", "inference", "peers"]
    assert (tmp_path / "begun").read_text().split() == order
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
    with pytest.raises(SystemExit, match="merge: stopped"):
        gpu("--part", "merge")


def test_a_call_without_options_ends_within_ten_minutes(benchmarks):
    import gpu

    imports = 60
    assert 60 * gpu.options().parse_args([]).minutes + gpu.GRACE + imports < 600


def test_results_of_other_versions_are_found_before_anything_is_measured(gpu, benchmarks, tmp_path):
    path = benchmarks.record("merge", "tiny", [benchmarks.figure("time", "s", [1.0])], tmp_path / "results")
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"measured with torch 0\..*--results"):
        gpu()
    assert path.read_bytes() == before and not (tmp_path / "begun").exists()
