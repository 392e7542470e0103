"""What happens beside the optimizer steps: progress, metrics.jsonl, evaluations, the live figure, early stopping."""

import math
import signal
import sys
import threading
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_finetuning import display, hardware
from llm_finetuning.evaluation import mode, scoreboard
from llm_finetuning.files.copying import WRITE_ERRORS, is_full
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import checkpoints, figures, planning, qlora
from llm_finetuning.training.metrics import Metrics

if TYPE_CHECKING:
    from llm_finetuning.training.resumable import ResumableTrainer

SAMPLES = 3
SAMPLE_TOKENS = 64
"""Longest of these answers: each token is a forward pass of its own, and a training step waits for all of them."""
MOST_SKIPPED = 16
"""Steps in a row that float16's gradient scaler may leave out: it halves 2^16, its first scale, at each of them."""


NOTED = ("grad_norm", "learning_rate", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
"""What metrics.jsonl takes over from a trainer's own record."""


class Monitor(TrainerCallback):
    """Logs, evaluates and stops a run; metrics.jsonl, a line an entry, is kept in step with the checkpoints."""

    def __init__(self, trainer: "ResumableTrainer"):
        self.trainer, self.settings, self.plan = trainer, trainer.settings, trainer.plan
        self.template, self.held_out = trainer.run_inputs.template, trainer.run_inputs.held_out
        self.main = trainer.is_world_process_zero()
        self.metrics = Metrics(self.settings.folders.metrics)
        self.losses: list[tuple[float, int]] = []  # (figure that patience goes by, step) of the whole run
        self.terminated = self.listening = self.stopped_early = False
        self.no_memory: MemoryError | None = None
        self.before: dict | None = None
        """The scoreboard's column of the base, where it was measured already: the evaluation at step 0."""
        self.held_out_changed = False
        """Whether the run goes on from a checkpoint that was evaluated on another held-out set."""
        self.unsaved_best: dict[str, torch.Tensor] | None = None
        self.skipped = 0
        """Steps in a row that float16's gradient scaler left out."""
        self.bar = None
        self.peak = hardware.PeakMemory(self.plan.device, self.plan.machine.free_memory)
        self.watched = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.no_memory = None
        if self.main:
            self.metrics.cut_after(state.global_step, self.held_out_changed)
        self.trainer.accelerator.wait_for_everyone()
        self.losses = self.metrics.evaluations(self.settings.patience_on)
        if state.global_step == 0 and self.settings.eval_steps:
            self.evaluate(state, control)
        begun = state.global_step
        name = f"resumed from step {begun}" if begun else None
        self.bar = tqdm(desc=name, total=state.max_steps, initial=begun, unit="step", file=sys.stdout, mininterval=2)
        self.bar.disable = not self.main
        self.seen, self.since, self.watched = self.trainer.seen_tokens, time.perf_counter(), 0.0
        self.peak.start()
        self._listen()

    def _listen(self) -> None:
        """SIGTERM saves a checkpoint at the end of the step and stops; only the main thread can listen."""
        if threading.current_thread() is threading.main_thread():
            self.old_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
            self.listening = True

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True

    def _anyone_terminated(self) -> bool:
        """Whether any process was told to stop: all of them save and stop at the same step."""
        self.terminated = bool(largest_of_all(self.terminated, self.plan))
        return self.terminated

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(1)
        self.skipped = self.skipped + 1 if self.trainer.accelerator.optimizer_step_was_skipped else 0
        if self._anyone_terminated():
            control.should_save = control.should_training_stop = True
        if self._is_due(state):
            self._evaluate_or_stop(state, control)

    def _evaluate_or_stop(self, state: TrainerState, control: TrainerControl) -> None:
        """Evaluates; where that does not fit into memory, the step is saved before the run ends with the error."""
        try:
            self.evaluate(state, control)
        except MemoryError as error:
            if self.plan.processes > 1:  # the others would wait for this one
                raise
            self.no_memory = error
            control.should_save = control.should_training_stop = True

    def _is_due(self, state: TrainerState) -> bool:
        """Whether this step is evaluated: each eval_steps-th, and the last one where the best adapter is kept."""
        step, every = state.global_step, self.settings.eval_steps
        return bool(every) and (step % every == 0 or bool(self.settings.patience) and step >= state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if "loss" not in (logs or {}):
            return
        self._check_finite(state, logs)
        if not self.main:
            return
        entry = {"step": state.global_step, "epoch": logs.get("epoch"), "loss": logs["loss"], **self._speed()}
        entry |= {name: logs[name] for name in NOTED if name in logs}
        self.metrics.write(entry)
        self.bar.set_postfix_str(
            f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s, MFU {entry['mfu']:.0%},"
            f" {hardware.as_gib(entry['memory_bytes'])}",
            refresh=False,
        )

    def _speed(self) -> dict:
        """Speed since the entry before."""
        now, seen = time.perf_counter(), self.trainer.seen_tokens * self.plan.processes
        seconds, tokens = now - self.since - self.watched, seen - self.seen
        self.since, self.seen, self.watched = now, seen, 0.0
        rate = tokens / max(seconds, 1e-9)
        return {
            "tokens": seen,
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": self.plan.mfu(rate),
            "memory_bytes": self.peak.read(),
        }

    def _check_finite(self, state: TrainerState, logs: dict) -> None:
        """Raises FloatingPointError for a loss that is not finite, or too many overflows of float16 in a row."""
        overflowed = not math.isfinite(logs.get("grad_norm", 0.0))
        if math.isfinite(logs["loss"]) and (not overflowed or 0 < self.skipped <= MOST_SKIPPED):
            return
        ids = self.trainer.newest_inputs["input_ids"][0, :48].tolist()
        cause = _likely_cause(self.settings, self.plan)
        raise FloatingPointError(
            f"the loss is {logs['loss']} (gradient norm {logs.get('grad_norm')}) at step {state.global_step}, last"
            f" micro-batch beginning {self.template.tokenizer.decode(ids)!r}. Likely cause: {cause}. The newest"
            " checkpoint is from before it; change the setting and run again"
        )

    def evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        """Held-out loss and three sample answers; a new best is kept when early stopping is on.

        Every process measures, so that all come to the same decision; one writes.
        """
        begun = time.perf_counter()
        with mode.within_memory(lambda: _no_room(state.global_step)):
            loss, answers = self._measure(state)
            entry = {"step": state.global_step, "held_out_loss": loss, "answers": answers} | self.trainer.figures()
        entry["evaluation_seconds"] = time.perf_counter() - begun
        self.losses.append((entry[self.settings.patience_on], state.global_step))
        if self.main:
            self._say_not_finite(entry)
            self.metrics.write(entry)
            display.live_figure(figures.curves(self.metrics.read()), "loss")
        if self.settings.patience and state.global_step:
            self._stop_early(state, control)
        self.watched += time.perf_counter() - begun

    def _say_not_finite(self, entry: dict) -> None:
        """Names what an evaluation found that is no number; training goes on, and it is never the best."""
        if odd := [name for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)]:
            cause = _likely_cause(self.settings, self.plan)
            print(f"not finite on the held-out set at step {entry['step']}: {', '.join(odd)}. Likely cause: {cause}")

    def _measure(self, state: TrainerState) -> tuple[float, list[str]]:
        """(held-out loss, sample answers) of the model as it is; of the base the scoreboard's are taken."""
        if self.before and state.global_step == 0:
            return self.before["loss"], [sample["text"] for sample in self.before["samples"][:SAMPLES]]
        model, asked = self.trainer.model, self.held_out[:SAMPLES]
        loss = scoreboard.held_out_loss(model, self.held_out, self.template)
        longest = min(SAMPLE_TOKENS, self.settings.max_new_tokens)
        given = scoreboard.answers(model, asked, self.template, longest)
        return loss, [answer.text for answer in given]

    def _stop_early(self, state: TrainerState, control: TrainerControl) -> None:
        if (best := best_of(self.losses)) is None:
            return
        best_loss, best_step = best
        if best_step == state.global_step:
            self._keep_best(qlora.gather_adapter(self.trainer.model))
        if is_over(self.losses, self.settings):
            what = f"{self.settings.patience_words} than {best_loss:.4f} at step {best_step}"
            print(f"no better {what} in {self.settings.patience} evaluations: stopping")
            self.stopped_early = control.should_training_stop = control.should_save = True

    def _keep_best(self, trained: dict[str, torch.Tensor]) -> None:
        """Keeps the adapter with the lowest held-out loss on the disk; in memory as long as that is full.

        The first process writes; each keeps it in memory, for each loads it in the end.
        """
        self.unsaved_best, full = None, False
        try:
            if self.main:
                write = partial(qlora.save_adapter_weights, self.trainer.model, trained)
                checkpoints.keep_best(write, self.settings.folders.checkpoints)
        except WRITE_ERRORS as error:
            if not is_full(error):
                raise
            full = True
            print(f"{self.settings.folders.checkpoints} is full: the best adapter so far is kept in memory alone")
        if largest_of_all(full, self.plan):
            self.unsaved_best = qlora.on_cpu(trained)

    def close(self) -> None:
        """Closes the bar and gives SIGTERM its handler back: ours would keep the model in memory. Idempotent."""
        self.peak.stop()
        if self.bar is not None:
            self.bar.close()
        if self.listening:
            signal.signal(signal.SIGTERM, self.old_handler)
            self.listening = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        if self.no_memory:
            raise self.no_memory
        if self.terminated:
            raise KeyboardInterrupt(f"stopped by SIGTERM; checkpoint-{state.global_step} is saved, run again to go on")


def _likely_cause(settings: Finetuning, plan: planning.Plan) -> str:
    """Of a loss that is not finite."""
    if str(plan.dtype) == "torch.float16":
        return "float16 overflows in this model's attention: train on a GPU with bfloat16 (A100, L4, H100)"
    return f"the learning rate ({settings.learning_rate:g}) may be too high, or the data holds a broken row"


def _no_room(step: int) -> str:
    """The sentence for an evaluation that did not fit into the GPU's memory."""
    return (
        f"the GPU ran out of memory in the evaluation at step {step}, not in a training step. Set eval_steps = 0, which"
        " leaves the evaluations out, and run all cells again: training goes on from the newest checkpoint"
    )


def largest_of_all(value: int, plan: planning.Plan) -> int:
    """The largest value of any process, by which all decide the same; every one calls it together."""
    if plan.processes == 1:
        return value
    shared = torch.tensor([value], dtype=torch.int32, device=plan.device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared.item())


def best_of(losses: list[tuple[float, int]]) -> tuple[float, int] | None:
    """The lowest finite (held-out loss, step) that was trained; step 0 is the base's, which is no adapter to keep."""
    return min(((loss, step) for loss, step in losses if step > 0 and math.isfinite(loss)), default=None)


def is_over(losses: list[tuple[float, int]], settings: Finetuning) -> bool:
    """Whether early stopping ends the run: no better (held-out loss, step) for as many evaluations as it waits.

    A loss that is not finite is no better one; where none was finite, nothing is known to wait for.
    """
    best = best_of(losses)
    if not settings.patience or best is None:
        return False
    return sum(step > best[1] for _, step in losses) >= settings.patience


def restore_best(trainer: "ResumableTrainer") -> float | None:
    """Loads the adapter with the lowest held-out loss of the run, if early stopping kept one; returns that loss.

    Says so where even that one is worse than the base: it is kept all the same, for a base is no result.
    """
    settings, unsaved = trainer.settings, trainer.monitor.unsaved_best
    best = settings.folders.checkpoints / checkpoints.BEST
    if not settings.patience or not (unsaved or best.exists()):
        return None
    losses = trainer.monitor.metrics.evaluations(settings.patience_on)
    if (found := best_of(losses)) is None:
        return None
    if unsaved:
        qlora.set_trained(trainer.model, unsaved)
    else:
        qlora.set_adapter(trainer.model, best)
    loss, step = found
    start = next((value for value, at in losses if at == 0), math.inf)
    if loss >= start and trainer.monitor.main:
        print(
            f"the best {settings.patience_words}, {loss:.4f} at step {step}, is not below the {start:.4f} before"
            f" training: lower learning_rate ({settings.learning_rate:g}), and look at the training pairs"
        )
    return loss
