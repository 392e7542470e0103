"""compile_layers with torch's own compiler, not a stand-in: the same training, and no layer compiled over and over."""

import pytest
import torch
from families import tiny_base_of
from inference_fixtures import make_model, make_tokenizer
from torch._dynamo.utils import counters
from training_fixtures import digest, prepare, save_base, small_pairs, small_settings

from llm_finetuning.evaluation import scoreboard
from llm_finetuning.training import selfcheck
from llm_finetuning.training.resumable import save_adapter, train
from llm_finetuning.training.trainer import compile_layers


def has_compiler() -> bool:
    from torch._inductor import cpp_builder, exc

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return False


pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler, which torch.compile needs on a CPU: install g++"),
]
LAYERS = 12
"""More than torch compiles one function for (torch._dynamo.config.recompile_limit is 8)."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """What g++ made for one test serves the next."""
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(autouse=True)
def fresh(kernels, torch_compiles, monkeypatch):
    """Nothing is compiled yet, and what is compiled over and over is an error."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """{family: a base of one small layer}: each kernel takes seconds to make."""
    phi = make_model(rows=448, layers=1, hidden=80, widening=1)
    return {
        "phi": save_base(tmp_path_factory.mktemp("phi"), phi, make_tokenizer()),
        "llama": tiny_base_of("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1),
    }


def gradients(run, rows: list[int]) -> tuple[float, dict]:
    """Loss and gradients of a micro-batch of the run's packed sequences."""
    run.model.zero_grad(set_to_none=True)
    loss = selfcheck._forward_backward(run.trainer, rows)
    return loss, {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_losses_and_gradients_are_those_without(family, one_layer, tmp_path):
    """On packed sequences of three lengths, the last one short; in float32 to 1e-4 of each gradient's norm."""
    run = prepare(small_settings(tmp_path, one_layer[family], lora_dropout=0.0))
    rows = {len(row["input_ids"]): place for place, row in enumerate(run.trainer.train_dataset)}
    lengths = {length: rows[length] for length in [*sorted(rows)[-2:], min(rows)]}
    for parameter in filter(lambda p: p.requires_grad, run.model.parameters()):
        torch.nn.init.normal_(parameter, std=0.05)  # B is zero at first, and A has no gradient then
    eager = [gradients(run, [row]) for row in lengths.values()]
    compile_layers(run.model)
    for row, (loss, expected) in zip(lengths.values(), eager, strict=True):
        compiled_loss, found = gradients(run, [row])
        assert compiled_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert len(lengths) == 3 and counters["stats"]["unique_graphs"] > 0


def test_nothing_is_compiled_anew_for_other_lengths_evaluations_and_layers(tmp_path, monkeypatch):
    """What is traced decides what is compiled: here the kernels themselves are left out.

    Twelve layers, an evaluation after each step, a last micro-batch that is short.
    """
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: whole(module, backend="eager", **options))
    base = save_base(tmp_path / "base", make_model(rows=448, layers=LAYERS, hidden=80, widening=1), make_tokenizer())
    run = prepare(small_settings(tmp_path, base, compile_layers="yes", eval_steps=1, num_train_epochs=1.0))
    assert len({len(row["input_ids"]) for row in run.trainer.train_dataset}) > 3
    checks = dict(selfcheck.run(run.trainer).table.itertuples(index=False))
    assert checks["compiled layers"].startswith("on: as set, compiled in ")
    traced = counters["stats"]["unique_graphs"]
    train(run.trainer)
    scoreboard.held_out_loss(run.model, run.held_out, run.template)
    assert counters["stats"]["unique_graphs"] == traced <= 4
    assert not counters["graph_break"]


def test_a_resumed_run_comes_to_the_same_bytes(one_layer, tmp_path):
    found = set()
    for folder, lengths in {"at once": [2], "twice": [1, 2]}.items():
        for steps in lengths:
            chosen = {"compile_layers": "yes", "max_steps": steps, "save_steps": 1}
            run = prepare(small_settings(tmp_path / folder, one_layer["phi"], **chosen))
            train(run.trainer)
        found.add(digest(save_adapter(run.trainer)))
    assert len(found) == 1


def test_a_compiler_that_is_missing_is_said_and_the_run_goes_on(one_layer, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing made before"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    run = prepare(small_settings(tmp_path, one_layer["phi"], compile_layers="yes"), small_pairs(8))
    said = dict(selfcheck.run(run.trainer).table.itertuples(index=False))["compiled layers"]
    assert said.startswith("off: cannot be made here (") and "\n" not in said
    train(run.trainer)
    assert run.trainer.state.global_step == run.steps
