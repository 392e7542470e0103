"""Training: what is trained, in which steps, and that nothing is lost when the process dies."""

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_small
from training_fixtures import digest, prepare, small_pairs, small_settings
from transformers import TrainerCallback

from llm_finetuning import hardware, tracebacks
from llm_finetuning.evaluation import mode, scoreboard
from llm_finetuning.files import checksums
from llm_finetuning.training import attention, callbacks, checkpoints, figures, qlora, selfcheck
from llm_finetuning.training import resumable as training
from llm_finetuning.training.dataset import encode_pairs
from llm_finetuning.training.metrics import Metrics
from llm_finetuning.training.trainer import pack

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """A prepared run without dropout, not trained."""
    return prepare(small_settings(tmp_path_factory.mktemp("run"), tiny_base, lora_dropout=0.0))


def test_rows_say_what_became_of_every_pair(run):
    pairs = [
        *small_pairs(6),
        {"prompt": "long", "response": "word " * 200},
        {"prompt": "p", "response": "r", "history": [
            {"role": "user", "content": "old " * 60}, {"role": "assistant", "content": "turn"}]},
    ]  # fmt: skip
    data = encode_pairs(pairs, run.template, 96)
    assert (data.read, data.dropped, data.truncated) == (8, 1, 1)
    assert len(data.examples) == 7
    assert data.too_long == {512: 1 / 8, 1024: 0, 2048: 0}
    assert max(data.lengths) <= 96


def test_no_pair_that_fits_is_an_error(run):
    with pytest.raises(ValueError, match="raise max_seq_length"):
        encode_pairs([{"prompt": "p", "response": "word " * 200}], run.template, 64)


def test_packing_keeps_every_pair_whole(run):
    packed = pack(run.data.examples, run.settings, run.plan)
    documents = []
    for row in packed:
        at = 0
        for length in row["seq_lengths"]:
            documents.append(tuple(row["input_ids"][at : at + length]))
            at += length
        assert at == len(row["input_ids"]) <= run.plan.micro_batch_tokens
    assert sorted(documents) == sorted(tuple(row["input_ids"]) for row in run.data.examples)


def loss_and_gradients(run, batches: list[dict], tokens: int):
    model = run.trainer.model.train()
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = run.trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(tokens))
        loss.backward()
        total += loss.item()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return total, gradients.clone()


def one_by_one(rows: list[dict]) -> list[dict]:
    return [
        {
            "input_ids": torch.tensor([row["input_ids"]]),
            "labels": torch.tensor([row["labels"]]),
            "attention_mask": torch.ones(1, len(row["input_ids"]), dtype=torch.long),
        }
        for row in rows
    ]


def test_packed_loss_and_gradients_equal_unpacked(run):
    rows = run.data.examples
    for parameter in run.trainer.model.parameters():  # B starts at zero: give A's gradient something to see
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    for module in run.trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = run.data.tokens_in_loss
    packed = pack(rows, run.settings, run.plan)
    batches = [run.trainer.data_collator([packed[i]]) for i in range(len(packed))]
    assert len(batches) < len(rows)
    packed_loss, packed_gradients = loss_and_gradients(run, batches, tokens)
    plain_loss, plain_gradients = loss_and_gradients(run, one_by_one(rows), tokens)
    assert packed_loss == pytest.approx(plain_loss, rel=1e-5)
    assert (packed_gradients - plain_gradients).norm() <= 1e-4 * plain_gradients.norm()


def test_loss_equals_the_one_of_sfttrainer(run):
    from trl import SFTTrainer

    run.trainer.model.eval()
    batch = run.trainer.data_collator([run.trainer.train_dataset[0]])
    tokens = torch.tensor(int((batch["labels"] != -100).sum()))
    with torch.no_grad():
        ours = run.trainer.compute_loss(run.trainer.model, dict(batch), num_items_in_batch=tokens)
        theirs = SFTTrainer.compute_loss(run.trainer, run.trainer.model, dict(batch), num_items_in_batch=tokens)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_gelu_in_one_kernel_is_the_same_function():
    from transformers.activations import ACT2FN

    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    assert torch.allclose(ACT2FN["gelu_new"](x), ACT2FN["gelu_pytorch_tanh"](x), atol=1e-12)


def test_only_adapters_are_trained_and_in_every_layer(run):
    table = qlora.coverage(run.trainer.model)
    assert table.adapted.sum() == 2 * 6
    trained = [n for n, p in run.trainer.model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert {p.dtype for p in run.trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_target_that_matches_nothing_stops(tiny_base):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="Wqkv match no linear module.*q_proj"):
        qlora.target_names(AutoModelForCausalLM.from_pretrained(tiny_base), "Wqkv, fc1")


def test_selfcheck_measures_and_leaves_no_trace(run):
    before = torch.random.get_rng_state()
    checks = selfcheck.run(run.trainer)
    assert torch.equal(before, torch.random.get_rng_state())
    assert checks.seconds > 0 and checks.memory > 0
    assert all(p.grad is None for p in run.trainer.model.parameters())
    assert run.trainer.seen_tokens == 0


def test_selfcheck_refuses_rows_without_an_end(run):
    row = run.data.examples[0]
    for broken in ({"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"])},
                   {"input_ids": row["input_ids"][:-1], "labels": row["labels"][:-1]}):  # fmt: skip
        with pytest.raises(ValueError, match="row 1 has"):
            selfcheck.check_ends([broken], run.template)


def test_steps_are_counted_as_the_trainer_does(tiny_base, tmp_path):
    for number, (epochs, packing) in enumerate([(1.0, True), (1.5, True), (2.0, False)]):
        chosen = small_settings(tmp_path / str(number), tiny_base, num_train_epochs=epochs, packing=packing)
        small = prepare(chosen, small_pairs(10))
        training.train(small.trainer)
        assert small.trainer.state.global_step == small.steps


def command(folder: Path, base: Path, epochs: int = 3) -> list[str]:
    return [sys.executable, str(SUPPORT / "train_small.py"), str(folder), str(base), str(epochs)]


@pytest.mark.parametrize("kills", [1, pytest.param("many", marks=pytest.mark.more)])
def test_killed_at_any_moment_it_ends_bit_for_bit_the_same(kills, tiny_base, tmp_path, request):
    """SIGKILL at random moments, saving included; dropout is on and checkpoints fall in mid-epoch."""
    kills = request.config.getoption("--kills") if kills == "many" else kills
    epochs, chance, folder = 3 * kills, random.Random(11), tmp_path / "killed"
    train_small.main(tmp_path / "whole", tiny_base, epochs)
    for _ in range(kills):
        process = subprocess.Popen(
            command(folder, tiny_base, epochs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=SUPPORT.parents[1]
        )
        for line in process.stdout:
            if line.startswith(b"READY"):
                break
        time.sleep(chance.uniform(0.1, 2.0))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (folder / "adapter").exists(), "over before it was killed"
        assert all(checksums.verify_checksums(found) for found in (folder / "checkpoints").glob("checkpoint-*"))
    finished = subprocess.run(
        command(folder, tiny_base, epochs), capture_output=True, text=True, cwd=SUPPORT.parents[1]
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert digest(folder / "adapter") == digest(tmp_path / "whole" / "adapter")


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A folder with a finished small run."""
    folder = tmp_path_factory.mktemp("trained")
    small = prepare(small_settings(folder, tiny_base, eval_steps=2))
    training.train(small.trainer)
    return folder


def test_checkpoints_are_kept_to_a_number_and_whole(trained):
    found = checkpoints.complete(trained / "checkpoints")
    assert len(found) == 2
    assert not list((trained / "checkpoints").glob(".*.partial"))


def test_metrics_hold_every_step_and_evaluation(trained):
    entries = Metrics(trained / "metrics.jsonl").read()
    steps = [entry["step"] for entry in entries if "loss" in entry]
    assert steps == list(range(1, steps[-1] + 1))
    losses = [entry["held_out_loss"] for entry in entries if "held_out_loss" in entry]
    assert losses[-1] < losses[0], "it learned"
    assert all(len(entry["answers"]) == 3 for entry in entries if "answers" in entry)


def test_a_finished_run_is_not_trained_again(trained, tiny_base):
    again = prepare(small_settings(trained, tiny_base, eval_steps=2))
    outcome = training.train(again.trainer)
    assert (outcome.step, outcome.of, outcome.ended_by) == (again.steps, again.steps, "finished before")
    assert outcome.resumed_from == f"checkpoint-{again.steps}"
    assert again.trainer.seen_tokens == 0


ENDS = [
    {"max_steps": 3, "lr_scheduler_type": "constant"},
    {"num_train_epochs": 0.5, "lr_scheduler_type": "cosine"},
    {"num_train_epochs": 1.5, "lr_scheduler_type": "constant"},
    {"num_train_epochs": 1.5, "lr_scheduler_type": "cosine"},
    {"max_steps": 3, "lr_scheduler_type": "cosine"},
    {"num_train_epochs": 1.0, "lr_scheduler_type": "constant_with_warmup"},
    {"num_train_epochs": 8.0, "learning_rate": 0.3, "eval_steps": 1, "early_stopping_patience": 1},
]


@pytest.mark.parametrize("changed", [*ENDS[:2], *(pytest.param(end, marks=pytest.mark.more) for end in ENDS[2:])])
def test_run_all_after_the_end_changes_nothing(changed, tiny_base, tmp_path):
    """Three times the cells of one run: one adapter, byte for byte, and nothing is trained after the first time."""
    digests, outcomes = set(), []
    for _ in range(3):
        small = prepare(small_settings(tmp_path, tiny_base, **changed))
        outcomes.append(training.train(small.trainer))
        training.save_adapter(small.trainer)
        digests.add(digest(tmp_path / "adapter"))
    assert len(digests) == 1
    assert outcomes[0].ended_by != "finished before"
    assert [outcome.ended_by for outcome in outcomes[1:]] == ["finished before"] * 2
    assert {(outcome.step, outcome.of) for outcome in outcomes} == {(outcomes[0].step, small.steps)}
    assert small.trainer.seen_tokens == 0


def test_fewer_steps_than_were_trained_are_refused(tiny_base, tmp_path):
    chosen = small_settings(tmp_path, tiny_base, max_steps=3, lr_scheduler_type="constant")
    training.train(prepare(chosen).trainer)
    fewer = prepare(dataclasses.replace(chosen, max_steps=2))
    with pytest.raises(ValueError, match="has trained 3 steps, and this run is to have 2: raise"):
        training.train(fewer.trainer)


def test_more_steps_go_on_where_the_schedule_so_far_is_the_same(tiny_base, tmp_path):
    at_once = small_settings(tmp_path / "at once", tiny_base, max_steps=4, warmup_ratio=0.0)
    first = dataclasses.replace(
        at_once, max_steps=2, drive_folder=str(tmp_path / "twice"), work_folder=str(tmp_path / "twice")
    )
    for chosen in (at_once, first, dataclasses.replace(first, max_steps=4)):
        small = prepare(chosen)
        outcome = training.train(small.trainer)
        training.save_adapter(small.trainer)
    assert (outcome.resumed_from, outcome.step) == ("checkpoint-2", 4)
    assert digest(tmp_path / "twice" / "adapter") == digest(tmp_path / "at once" / "adapter")
    warm = dataclasses.replace(first, max_steps=40, warmup_ratio=0.1)
    with pytest.raises(ValueError, match="warmup_steps: 0 in the checkpoint, 4 now"):
        training.train(prepare(warm).trainer)


def test_other_settings_are_refused_by_name(trained, tiny_base):
    with pytest.raises(ValueError, match="(?s)lora_alpha: 8 in the checkpoint, 16 now.*learning_rate.*resume = False"):
        prepare(small_settings(trained, tiny_base, eval_steps=2, learning_rate=1e-3, lora_alpha=16))


def test_a_damaged_checkpoint_is_passed_over(trained, tiny_base, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    older, newer = checkpoints.complete(folder / "checkpoints")
    weights = newer / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert checkpoints.newest(folder / "checkpoints", folder / "checkpoints") == older


def test_resume_false_starts_afresh_without_deleting(trained, tiny_base, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    afresh = prepare(small_settings(folder, tiny_base, resume=False, max_steps=1))
    outcome = training.train(afresh.trainer)
    assert (outcome.resumed_from, outcome.step, outcome.ended_by) == (None, 1, "finished")
    assert len(checkpoints.complete(folder / "checkpoints-before-1")) == 2


def test_a_fresh_start_moves_the_checkpoints_on_drive_aside_too(tiny_base, tmp_path):
    chosen = small_settings(tmp_path / "drive", tiny_base, work_folder=str(tmp_path / "vm"), max_steps=4)
    training.train(prepare(chosen).trainer)
    afresh = dataclasses.replace(chosen, resume=False, max_steps=2)
    assert training.train(prepare(afresh).trainer).resumed_from is None
    for place in ("drive", "vm"):
        assert [p.name for p in checkpoints.complete(tmp_path / place / "checkpoints")] == ["checkpoint-2"]
        assert checkpoints.complete(tmp_path / place / "checkpoints-before-1")[-1].name == "checkpoint-4"


def test_sigterm_saves_first(tiny_base, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, tiny_base, 30),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=SUPPORT.parents[1],
        text=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert "stopped by SIGTERM" in errors
    last = checkpoints.complete(tmp_path / "checkpoints")[-1]
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == checkpoints.step_of(last)
    assert f"{last.name} is saved" in errors


def test_checkpoints_reach_drive_and_come_back(tiny_base, tmp_path):
    chosen = small_settings(tmp_path / "drive", tiny_base, work_folder=str(tmp_path / "vm"))
    small = prepare(chosen)
    training.train(small.trainer)
    there = checkpoints.complete(tmp_path / "drive" / "checkpoints")
    assert there[-1].name == f"checkpoint-{small.steps}"
    fresh_vm = dataclasses.replace(chosen, work_folder=str(tmp_path / "another vm"))
    start = training.starting_point(prepare(fresh_vm).trainer)
    assert start.parent == tmp_path / "another vm" / "checkpoints"
    assert checksums.verify_checksums(start)


def test_a_lost_drive_does_not_end_training(tiny_base, tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "checkpoints").write_text("not a folder")
    chosen = small_settings(tmp_path / "drive", tiny_base, work_folder=str(tmp_path / "vm"))
    small = prepare(chosen)
    outcome = training.train(small.trainer)
    assert outcome.step == outcome.of == small.steps
    assert "is not on Drive yet" in outcome.mirror_problem


def test_a_loss_that_is_not_finite_stops_with_the_step(tiny_base, tmp_path):
    chosen = small_settings(tmp_path, tiny_base, learning_rate=1e30, max_grad_norm=0.0, warmup_ratio=0.0)
    small = prepare(chosen)
    with pytest.raises(FloatingPointError, match=r"at step \d+.*learning rate \(1e\+30\) may be too high"):
        training.train(small.trainer)


def test_a_step_that_the_gradient_scaler_leaves_out_does_not_end_training(run):
    state = SimpleNamespace(global_step=3)
    watch = SimpleNamespace(trainer=SimpleNamespace(newest_inputs={"input_ids": torch.ones(1, 4, dtype=torch.long)}))
    watch.settings, watch.plan, watch.template = run.settings, run.plan, run.template
    overflow, broken = {"loss": 1.0, "grad_norm": float("inf")}, {"loss": float("nan"), "grad_norm": 1.0}
    watch.skipped = 1
    callbacks.Monitor._check_finite(watch, state, overflow)
    for skipped, logs in [(0, overflow), (callbacks.MOST_SKIPPED + 1, overflow), (1, broken)]:
        watch.skipped = skipped
        with pytest.raises(FloatingPointError, match="at step 3"):
            callbacks.Monitor._check_finite(watch, state, logs)


def test_an_interrupted_training_goes_on_in_the_same_kernel(tiny_base, tmp_path):
    """Computed in bfloat16, as on a GPU: the parameters that the optimizer knows stay, and so does their dtype."""
    chosen = small_settings(tmp_path, tiny_base, save_steps=1, dtype="bfloat16")
    small = prepare(chosen)
    handler = signal.getsignal(signal.SIGTERM)
    small.trainer.add_callback(InterruptOnce(2))
    with pytest.raises(KeyboardInterrupt):
        training.train(small.trainer)
    assert signal.getsignal(signal.SIGTERM) is handler, "it would keep the model in memory"
    kept = {n: p.detach().clone() for n, p in small.trainer.model.named_parameters() if p.requires_grad}
    assert training.train(small.trainer).resumed_from == "checkpoint-1"
    trained = {n: p for n, p in small.trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not any(torch.equal(kept[n], p) for n, p in trained.items() if "lora_B" in n)


class InterruptOnce(TrainerCallback):
    """Ctrl-C at the end of a step, before it is saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = 0
            raise KeyboardInterrupt


@pytest.mark.parametrize(("recomputed", "cure"), [(False, "gradient_checkpointing = 'on'"), (True, "resume = False")])
def test_out_of_memory_advises_what_the_run_accepts(run, recomputed, cure):
    trainer = SimpleNamespace(newest_inputs=None, state=SimpleNamespace(global_step=4), settings=run.settings)
    trainer.args = SimpleNamespace(gradient_checkpointing=recomputed)
    assert cure in training._out_of_memory(trainer)


@pytest.fixture
def full(run):
    """The run on a device without memory for a forward pass."""

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = run.model.get_base_model().model.register_forward_pre_hook(run_out)
    yield run
    hook.remove()
    run.model.train()


@pytest.mark.parametrize(
    ("begin", "cure"),
    [
        (lambda run: selfcheck.run(run.trainer), "at step 1. Set gradient_checkpointing = 'on'"),
        (
            lambda run: scoreboard.before(run.model, run.held_out, run.template, run.settings),
            "while the model was measured.* lower eval_answers",
        ),
        (lambda run: run.trainer.held_out_losses(), "while the model was measured"),
        (
            lambda run: run.trainer.monitor.evaluate(SimpleNamespace(global_step=100), None),
            "in the evaluation at step 100, not in a training step. Set eval_steps = 0",
        ),
    ],
)
def test_running_out_of_memory_is_a_sentence_where_it_first_shows(begin, cure, full):
    with pytest.raises(MemoryError, match=f"the GPU ran out of memory .*{cure}") as raised:
        begin(full)
    assert tracebacks.is_curable(raised.value, raised.tb), "shown without a traceback"


def test_an_evaluation_without_room_costs_no_step(tiny_base, tmp_path, monkeypatch):
    """What was trained up to it is saved, and the advice goes on from there."""
    small = prepare(small_settings(tmp_path, tiny_base, eval_steps=2, save_steps=100, max_steps=3))

    def run_out(*_: object) -> None:
        if small.trainer.state.global_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 1.0

    monkeypatch.setattr(scoreboard, "held_out_loss", run_out)
    with pytest.raises(MemoryError, match="in the evaluation at step 2.*Set eval_steps = 0"):
        training.train(small.trainer)
    again = prepare(small_settings(tmp_path, tiny_base, eval_steps=0, save_steps=100, max_steps=3))
    outcome = training.train(again.trainer)
    assert outcome.resumed_from == "checkpoint-2" and again.trainer.state.global_step == 3


@pytest.mark.parametrize("said", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_a_full_gpu_is_known_by_what_libraries_say(said):
    with pytest.raises(MemoryError, match="no room"), mode.within_memory(lambda: "no room"):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="device-side assert"), mode.within_memory(lambda: "no room"):
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_what_an_error_of_memory_holds_is_freed(monkeypatch):
    """As in a notebook, which keeps the newest error, and with it the variables of what failed."""
    held = []

    def fail() -> None:
        model = torch.nn.Linear(2, 2)
        held.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    for kind, freed in ((MemoryError, True), (ValueError, False)):
        try:
            try:
                fail()
            except torch.OutOfMemoryError as error:
                raise kind("no room") from error
        except kind as error:
            monkeypatch.setattr(sys, "last_value", error, raising=False)
        hardware.free_memory()
        assert (held[-1]() is None) is freed


FITS = {384: "micro_batch_tokens = 192", 128: "micro_batch_tokens = 96"}
FITS |= {96: "max_seq_length = 48, micro_batch_tokens = 48 and"}


@pytest.mark.parametrize(("tokens", "fits"), FITS.items())
def test_what_is_advised_is_less_than_what_did_not_fit(tokens, fits, run):
    assert training.less_at_once(run.settings, tokens).startswith(fits)


def test_variable_length_attention_is_computed_in_16_bits_under_autocast(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "causal_varlen", lambda q, k, v, *others: seen.extend([q, k, v]) or q)
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    borders = torch.tensor([0, 5], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        attention.packed_attention(None, query, key, value, None, cu_seq_lens_q=borders, max_length_q=5)
    assert [x.dtype for x in seen] == [torch.bfloat16] * 3


def test_compiled_layers_run_as_they_are_between_training_steps(torch_compiles):
    class Layer(torch.nn.Module):
        def forward(self, values):
            return values * 2 + 1

    calls, layer = [], Layer()
    layer.compile(backend=lambda graph, inputs: calls.append(1) or graph.forward)
    with mode.uncompiled(layer):
        layer(torch.ones(2))
    assert not calls
    layer(torch.ones(2))
    assert calls


def test_early_stopping_keeps_the_best(tiny_base, tmp_path):
    chosen = small_settings(
        tmp_path, tiny_base, learning_rate=0.3, num_train_epochs=20.0, eval_steps=2, early_stopping_patience=2
    )
    small = prepare(chosen)
    outcome = training.train(small.trainer)
    assert outcome.step < outcome.of == small.steps and outcome.ended_by == "early stopping"
    best = min(e["held_out_loss"] for e in Metrics(tmp_path / "metrics.jsonl").read() if "held_out_loss" in e)
    assert outcome.best_loss == best
    found = scoreboard.held_out_loss(small.trainer.model, small.held_out, small.template)
    assert found == pytest.approx(best, rel=1e-4)


def test_a_held_out_loss_that_is_not_finite_is_never_the_best():
    nan, inf = math.nan, math.inf
    losses = [(0.5, 0), (nan, 1), (1.4, 2), (inf, 3), (-inf, 4)]
    assert callbacks.best_of(losses) == (1.4, 2) and callbacks.best_of(losses[:2]) is None
    over = [callbacks.is_over(losses[:count], SimpleNamespace(patience=2)) for count in range(1, 6)]
    assert over == [False, False, False, False, True]
    entry = {"step": 1, "accuracy": 0.5, "chosen_logp": nan, "rejected_logp": -2.0, "held_out_loss": nan, "kl": inf}
    assert figures.curves([entry]).axes


def test_training_goes_on_over_a_held_out_loss_that_is_not_finite(tiny_base, tmp_path, capsys, monkeypatch):
    chosen = small_settings(tmp_path, tiny_base, max_steps=4, eval_steps=1, early_stopping_patience=3)
    small = prepare(chosen)
    measured, spoiled = scoreboard.held_out_loss, iter([None, math.nan, math.nan])
    monkeypatch.setattr(scoreboard, "held_out_loss", lambda *given: next(spoiled, None) or measured(*given))
    outcome = training.train(small.trainer)
    said = capsys.readouterr().out
    assert all(f"not finite on the held-out set at step {step}: held_out_loss" in said for step in (1, 2))
    losses = [loss for loss, _ in small.trainer.monitor.losses]
    assert outcome.step == 4 and outcome.best_loss == min(losses[3:])
    assert measured(small.model, small.held_out, small.template) == pytest.approx(outcome.best_loss, rel=1e-4)


def test_the_best_adapter_comes_back_with_the_checkpoint(tiny_base, tmp_path):
    """The machine is lost after the best evaluation: what was best then is best on the next machine too."""
    chosen = small_settings(
        tmp_path / "drive",
        tiny_base,
        work_folder=str(tmp_path / "vm"),
        learning_rate=0.1,
        eval_steps=1,
        save_steps=1,
        early_stopping_patience=2,
    )
    first = prepare(chosen)
    training.train(first.trainer)
    stopped = first.trainer.state.global_step
    assert 2 <= stopped < first.steps
    best = min(e["held_out_loss"] for e in Metrics(chosen.folders.metrics).read() if "held_out_loss" in e)
    another_vm = dataclasses.replace(chosen, work_folder=str(tmp_path / "another vm"))
    again = prepare(another_vm)
    outcome = training.train(again.trainer)
    assert (outcome.resumed_from, outcome.step, outcome.of) == (f"checkpoint-{stopped}", stopped, first.steps)
    assert outcome.ended_by == "finished before"
    assert again.trainer.seen_tokens == 0, "early stopping had ended this run"
    assert outcome.best_loss == best
    found = scoreboard.held_out_loss(again.trainer.model, again.held_out, again.template)
    assert found == pytest.approx(best, rel=1e-4)


def test_tensorboard_gets_the_loss(tiny_base, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small = prepare(small_settings(tmp_path, tiny_base, report_to="tensorboard", max_steps=2))
    training.train(small.trainer)
    (events,) = tmp_path.rglob("events.out.tfevents*")
    board = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
