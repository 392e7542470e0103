"""What every trainer here shares: atomic checkpoints, resuming from the newest one, and saving the adapter."""

import errno
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState

from llm_finetuning.evaluation import likelihood, mode
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.files import drive
from llm_finetuning.files.atomic import partial_name, remove_partials
from llm_finetuning.files.copying import WRITE_ERRORS, gigabytes, is_full
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import callbacks, checkpoints, qlora
from llm_finetuning.training.dataset import RunInputs
from llm_finetuning.training.metrics import Metrics
from llm_finetuning.training.planning import Plan

FULL, FAILED = 1, 2
"""How the writing of a checkpoint may end in one of several processes; the worst is what counts."""
SHARDED = "pytorch_model_fsdp.bin"
"""What FSDP puts into a checkpoint beside the adapter, by its name in accelerate."""


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints are whole or not there, and whose run goes on from the newest one.

    A subclass sets the fields before it calls `watch`. steps: optimizer steps of the whole run. identity: what another
    run must share to resume its checkpoints. seen_tokens: tokens that this process has trained on, since it was built.
    loss_unit: of `held_out_losses`.
    """

    settings: Finetuning
    plan: Plan
    run_inputs: RunInputs
    steps: int
    identity: dict
    loss_unit = "nats per token"
    seen_tokens = 0
    newest_inputs: dict | None = None
    _partial_dir: Path | None = None

    def watch(self) -> None:
        """Puts our progress in place of the library's, and starts the copies of checkpoints to Drive."""
        folders = self.settings.folders
        keep = self.settings.save_total_limit
        self.mirror = checkpoints.Mirror(folders.checkpoints, folders.mirrored, keep)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.monitor = callbacks.Monitor(self)
        self.add_callback(self.monitor)

    def note(self, inputs: dict) -> None:
        """Counts a micro-batch, and keeps it for what an error says of it."""
        self.newest_inputs = inputs
        self.seen_tokens += inputs["input_ids"].numel()

    def forget(self) -> None:
        """Forgets what was counted before the training."""
        self.seen_tokens = 0

    def row_tokens(self, row: dict) -> int:
        """Tokens of a row of the training set in a micro-batch."""
        return len(row["input_ids"])

    def figures(self) -> dict:
        """What an evaluation measures beside the held-out loss, as numbers by name."""
        return {}

    @mode.within_memory(mode.while_measuring)
    def held_out_losses(self) -> Sample:
        """The loss of each held-out unit, by which trainings are compared; lower is better."""
        return likelihood.losses(self.model, self.run_inputs.held_out, self.run_inputs.template)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's, or with a ratio of rates one whose B matrices (DoRA's lengths too) learn faster (LoRA+)."""
        if self.settings.loraplus_lr_ratio == 1 or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        options |= {"loraplus_lr_ratio": self.settings.loraplus_lr_ratio}
        options |= {"loraplus_weight_decay": self.settings.weight_decay}
        self.optimizer = create_loraplus_optimizer(model, kind, **options)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter; where the model is sharded it alone is gathered, not the frozen base."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        return self._save(output_dir, state_dict=qlora.gather_adapter(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module = None) -> None:
        """The adapter, into the trained parameters and in their dtype; PEFT would put float32 ones in their place."""
        qlora.set_adapter(self.model, Path(resume_from_checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial_dir) if self._partial_dir else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes a checkpoint atomically; then older ones go, and its copy to Drive starts.

        A full disk does not end training: what was written goes, and the next checkpoint is tried.
        """
        folder, needed = Path(self.args.output_dir), self.plan.checkpoint_bytes
        name = f"checkpoint-{self.state.global_step}"
        self._partial_dir = partial_name(folder / name)
        try:
            self._write_together(model, trial, folder / name)
            if self.is_world_process_zero():
                checkpoints.store_extras(self._partial_dir / name, folder, self.settings.folders.metrics)
                done = checkpoints.finalize(self._partial_dir / name, folder / name, self.identity)
                remove_partials(folder)
                checkpoints.keep_newest(folder, self.settings.save_total_limit)
                self.mirror.send(done)
        except WRITE_ERRORS as error:
            if not is_full(error, folder, needed):
                raise
            if self.is_world_process_zero():
                remove_partials(folder)
                print(f"{name} was not saved, for {folder} is full: free {gigabytes(needed)} there; training goes on")
        finally:
            self._partial_dir = None

    def _write_together(self, model: torch.nn.Module, trial: Any, final: Path) -> None:
        """Has each process write its part of a checkpoint; when one cannot, all of them raise.

        Several look for room first: a sharded model is gathered while it is written, and a process that fails in
        between would leave the others waiting.
        """
        needed = self.plan.checkpoint_bytes
        full = self.plan.processes > 1 and shutil.disk_usage(final.parent).free < needed
        problem = OSError(errno.ENOSPC, f"{final.parent} has no room") if full else None
        if not callbacks.largest_of_all(full, self.plan):
            try:
                Trainer._save_checkpoint(self, model, trial)
            except WRITE_ERRORS as error:
                if self.is_fsdp_enabled:
                    raise
                problem = error
        severity = 0 if problem is None else FULL if is_full(problem, final.parent, needed) else FAILED
        if worst := callbacks.largest_of_all(severity, self.plan):
            number = errno.ENOSPC if worst == FULL else errno.EIO
            raise problem or OSError(number, f"another process could not write its part of {final.name}")

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds the tokens seen; the token metrics of SFTTrainer are not collected."""
        Trainer.log(self, logs | {"tokens": self.seen_tokens * self.args.world_size}, start_time)


@dataclass(frozen=True)
class Outcome:
    """What a call of `train` did; as text, the sentence that the notebook prints."""

    resumed_from: str | None
    """Name of the checkpoint, None for a run that began afresh."""
    step: int
    of: int
    """Optimizer steps of the whole run."""
    ended_by: str
    """ "finished", "early stopping", or "finished before": there was nothing left to train."""
    best_loss: float | None
    """Of the adapter that is loaded now, where early stopping kept the best one: its held-out loss, or what `of_best`
    says."""
    mirror_problem: str | None
    """Why the newest checkpoint is not on Drive."""
    of_best: str = "held-out loss"

    def __str__(self) -> str:
        begun = f"went on from {self.resumed_from}" if self.resumed_from else "started afresh"
        best = (
            None if self.best_loss is None else f"kept the adapter with the best {self.of_best}, {self.best_loss:.4f}"
        )
        said = [f"{begun}, now at step {self.step} of {self.of}", best, self.mirror_problem]
        return "; ".join(filter(None, said))


def train(trainer: ResumableTrainer, before: dict | None = None) -> Outcome:
    """Trains to the end, from the newest complete checkpoint if there is one.

    before: the scoreboard's column of the base, which stands in for an evaluation before the first step. Raises
    ValueError for a checkpoint of another run, FloatingPointError for a loss that is not finite, and MemoryError when
    the GPU ran out of memory.
    """
    trainer.monitor.before = before
    with trainer.accelerator.main_process_first():  # one moves or fetches checkpoints, the others find them
        start = starting_point(trainer)
    folder = trainer.settings.folders.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.is_world_process_zero():
        remove_partials(folder)
        folders = trainer.settings.folders
        same_set = not trainer.monitor.held_out_changed
        checkpoints.restore_extras(start, folder, folders.metrics, folders.drive, best=same_set)
    trainer.accelerator.wait_for_everyone()
    try:
        with within_memory(trainer):
            ended_by = _train_from(trainer, start)
    finally:
        trainer.monitor.close()
        trainer.mirror.wait()
    best = callbacks.restore_best(trainer)
    state, resumed_from = trainer.state, start.name if start else None
    words = trainer.settings.patience_words
    return Outcome(resumed_from, state.global_step, state.max_steps, ended_by, best, trainer.mirror.problem, words)


def _train_from(trainer: ResumableTrainer, start: Path | None) -> str:
    """Trains from the checkpoint `start`, unless the run had ended there; returns by what the run ended.

    Trainer itself would train further steps from a checkpoint at or past the end. Raises ValueError for a checkpoint
    that has trained more steps than the run is to have, and for a sharded one that is not over.
    """
    step, steps = checkpoints.step_of(start) if start else 0, trainer.steps
    if step > steps:
        raise ValueError(
            f"{start} has trained {step} steps, and this run is to have {steps}: raise num_train_epochs or max_steps"
            " again, or set resume = False to start afresh (old checkpoints are moved aside, not deleted)"
        )
    if start and (step == steps or ended_early(start, trainer.settings)):
        qlora.set_adapter(trainer.model, start)
        trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        return "finished before"
    if start and (start / SHARDED).exists() and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"{start} is of a run with a sharded model, which is not over at step {step}: go on with the command that"
            " began it (accelerate launch --config_file profiles/accelerate/fsdp.yaml …), or set resume = False"
        )
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    return "early stopping" if trainer.monitor.stopped_early else "finished"


def starting_point(trainer: ResumableTrainer) -> Path | None:
    """The checkpoint to resume from: the newest complete one, here or on Drive, of this very run."""
    folders = trainer.settings.folders
    if not trainer.settings.resume:
        for folder in (folders.checkpoints, folders.mirrored):  # without a Drive both are one folder
            if aside := checkpoints.set_aside(folder):
                print(f"resume = False: earlier checkpoints are in {aside}")
        return None
    start = checkpoints.newest(folders.checkpoints, folders.mirrored)
    if start:
        optional = "" if trainer.settings.patience else "held_out"  # which then decides nothing
        trainer.monitor.held_out_changed = checkpoints.check_same_run(start, trainer.identity, optional)
        print(f"going on from {start}")
        if trainer.monitor.held_out_changed:
            print(f"{checkpoints.CHANGED['held_out']}: the losses that were measured on the other one are left out")
    return start


def ended_early(start: Path, settings: Finetuning) -> bool:
    """Whether early stopping had ended the run at the checkpoint `start`: its best adapter is all that is needed."""
    losses = Metrics(settings.folders.metrics).evaluations(settings.patience_on)
    so_far = [(loss, at) for loss, at in losses if at <= checkpoints.step_of(start)]
    return (start / checkpoints.BEST_INSIDE).exists() and callbacks.is_over(so_far, settings)


def within_memory(trainer: ResumableTrainer) -> AbstractContextManager:
    """Raises MemoryError, with what cures it, where a training step in the block does not fit into the GPU's memory."""
    return mode.within_memory(lambda: _out_of_memory(trainer))


def _out_of_memory(trainer: ResumableTrainer) -> str:
    """What was asked for and what would fit: activation checkpointing, with which the run can be resumed, or less."""
    tokens = trainer.newest_inputs["input_ids"].numel() if trainer.newest_inputs else 0
    cure = (
        less_at_once(trainer.settings, tokens)
        if trainer.args.gradient_checkpointing
        else "gradient_checkpointing = 'on' and run all cells again: training goes on from the newest checkpoint"
    )
    step = trainer.state.global_step + 1
    return f"the GPU ran out of memory on a micro-batch of {tokens:,} tokens at step {step}. Set {cure}"


def less_at_once(settings: Finetuning, tokens: int) -> str:
    """The settings with which a step takes less memory than one on `tokens` tokens."""
    half, smaller = max(settings.unit_tokens, tokens // 2), settings.max_seq_length // 2
    shorter = f"max_seq_length = {smaller}, micro_batch_tokens = {settings.unit_tokens // 2}"
    fits = f"micro_batch_tokens = {half}" if half < tokens else shorter
    return f"{fits} and resume = False, for it is another run then"


def save_adapter(trainer: ResumableTrainer) -> Path:
    """Writes the trained adapter, its tokenizer with the chat template and settings.json to `folders.adapter`.

    Every process calls it, the first one writes. Raises OSError where the local disk is full; the adapter is then
    written to the folder of the results, if there is room.
    """
    settings, folder = trainer.settings, trainer.settings.folders.adapter
    trained = qlora.gather_adapter(trainer.model)
    if not trainer.is_world_process_zero():
        return folder
    try:
        return _write_adapter(trainer, trained, folder)
    except WRITE_ERRORS as error:
        elsewhere = settings.folders.drive / folder.name
        if not is_full(error) or elsewhere == folder:
            raise
        _write_adapter(trainer, trained, elsewhere)
        raise OSError(
            errno.ENOSPC,
            f"{folder.parent} is full; the adapter is saved in {elsewhere}. Free"
            f" {gigabytes(trainer.plan.disk_work)} for the merge and run this cell again",
        ) from error


def _write_adapter(trainer: ResumableTrainer, trained: dict[str, torch.Tensor], folder: Path) -> Path:
    partial = partial_name(folder)
    drive.remove(partial, ignore_errors=True)
    try:
        trainer.model.peft_config["default"].base_model_name_or_path = trainer.settings.model_name
        qlora.save_adapter_weights(trainer.model, trained, partial)
        trainer.run_inputs.template.tokenizer.save_pretrained(partial)
        trainer.settings.save(partial / "settings.json")
        return checkpoints.finalize(partial, folder, trainer.identity)
    finally:
        drive.remove(partial, ignore_errors=True)
