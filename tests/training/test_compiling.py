"""compile_layers = "auto": measured in the self-check, kept where it pays, and left where it cannot be used."""

from types import SimpleNamespace

import pytest
import torch
from training_fixtures import prepare, small_settings

from llm_finetuning.training import resumable as training
from llm_finetuning.training import selfcheck
from llm_finetuning.training.trainer import compile_layers

pytestmark = pytest.mark.usefixtures("torch_compiles")


def compiled(model) -> set[bool]:
    layers = model.get_base_model().model.layers
    return {layer._compiled_call_impl is not None for layer in layers}


@pytest.fixture(scope="module")
def small(tiny_base, tmp_path_factory):
    return prepare(small_settings(tmp_path_factory.mktemp("run"), tiny_base, compile_layers="auto", resume=False))


@pytest.fixture
def untouched(small):
    """A small run before its self-check; nothing is compiled in it."""
    assert compiled(small.model) == {False}
    yield small
    compile_layers(small.model, on=False)


def clock(monkeypatch, *moments: float) -> None:
    given = iter(moments)
    monkeypatch.setattr(selfcheck, "time", SimpleNamespace(perf_counter=lambda: next(given)))


@pytest.mark.parametrize(
    ("per_token", "with_layers_compiled", "spent", "tokens", "on"),
    [
        (1.0, 0.8, 100, 1000, True),
        (1.0, 0.8, 300, 1000, False),
        (1.0, 1.1, 0, 10_000, False),
        (1.0, float("nan"), 0, 10_000, False),
    ],
)
def test_layers_are_compiled_where_the_run_saves_more_than_it_takes(
    untouched, monkeypatch, per_token, with_layers_compiled, spent, tokens, on
):
    monkeypatch.setattr(selfcheck, "seconds_per_token", lambda trainer: with_layers_compiled)
    clock(monkeypatch, 0, spent)
    seconds, said = selfcheck.compile_if_it_pays(untouched.trainer, per_token, tokens)
    assert compiled(untouched.model) == {on}
    assert seconds == (with_layers_compiled if on else per_token)
    assert said.startswith("on: 1.25 times as fast, compiled in 1 min 40 s" if on else "off: ")


def test_a_short_run_is_not_compiled_to_find_out(untouched, monkeypatch):
    monkeypatch.setattr(selfcheck, "seconds_per_token", lambda trainer: pytest.fail("a step was compiled"))
    seconds, said = selfcheck.compile_if_it_pays(untouched.trainer, 1.0, selfcheck.COMPILED_FROM - 1)
    assert (seconds, said) == (1.0, "off: not tried for a run of less than 10 min 0 s")
    assert compiled(untouched.model) == {False}


@pytest.mark.parametrize(("resume", "left"), [(True, 0.25), (False, 1.0)])
def test_only_what_is_left_of_a_run_has_to_pay(tiny_base, tmp_path, monkeypatch, resume, left):
    run = prepare(small_settings(tmp_path, tiny_base, compile_layers="auto", max_steps=4, resume=resume))
    (run.settings.folders.checkpoints / "checkpoint-3").mkdir(parents=True)
    asked = []
    keep = lambda trainer, per_token, tokens: (asked.append(tokens), (per_token, "off"))[1]  # noqa: E731
    monkeypatch.setattr(selfcheck, "compile_if_it_pays", keep)
    selfcheck.run(run.trainer)
    assert asked == [left * 4 * run.plan.step_tokens]


def broken_compiler(graph, inputs):
    raise RuntimeError("no C++ compiler found\nsecond line")


@pytest.mark.parametrize(
    ("backend", "on"), [(broken_compiler, False), pytest.param("eager", True, marks=pytest.mark.more)]
)
def test_a_compiler_that_fails_leaves_the_run_as_it_was(backend, on, untouched, monkeypatch):
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: whole(module, backend=backend, **options))
    monkeypatch.setattr(selfcheck, "COMPILED_FROM", 0)
    clock(monkeypatch, 0, 9, 10, 10, 11, 11, 11, 11.1)  # a measurement, the compiler's first steps, a measurement
    checks = dict(selfcheck.run(untouched.trainer).table.itertuples(index=False))
    assert compiled(untouched.model) == {on}
    if not on:
        said = checks["compiled layers"]
        assert said.startswith("off: cannot be made here (") and "no C++ compiler found" in said and "\n" not in said
    training.train(untouched.trainer)
    assert untouched.trainer.state.global_step == untouched.steps
