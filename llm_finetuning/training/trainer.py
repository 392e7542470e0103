"""Training: the trainer, its atomic checkpoints, and how a run is resumed from the newest one."""

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from trl import SFTConfig, SFTTrainer, pack_dataset

from llm_finetuning import models
from llm_finetuning.files import drive
from llm_finetuning.files.atomic import partial_name, remove_partials
from llm_finetuning.files.copying import WRITE_ERRORS, gigabytes, is_full
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import callbacks, checkpoints, qlora
from llm_finetuning.training.dataset import RunInputs
from llm_finetuning.training.planning import Plan

SAME_RUN = (
    "model_name",
    "system_message",
    "max_seq_length",
    "train_on",
    "packing",
    "use_4bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "tokens_per_step",
)
"""Settings that two runs must share for one to resume the checkpoints of the other."""
FULL, FAILED = 1, 2
"""How the writing of a checkpoint may end in one of several processes; the worst is what counts."""
SHARDED = "pytorch_model_fsdp.bin"
"""What FSDP puts into a checkpoint beside the adapter, by its name in accelerate."""


def pack(examples: list[dict], settings: Finetuning, plan: Plan) -> Dataset:
    """Examples as SFTTrainer takes them; packed, a sequence holds up to `plan.micro_batch_tokens` tokens.

    Packing is best-fit decreasing (arXiv 2404.10830) over examples shuffled with the seed, and never splits one.
    """
    columns = [{"input_ids": example["input_ids"], "labels": example["labels"]} for example in examples]
    data = Dataset.from_list(columns).shuffle(seed=settings.seed)
    return pack_dataset(data, plan.micro_batch_tokens, "bfd") if settings.packing else data


def batch_size(settings: Finetuning, plan: Plan) -> int:
    """Sequences per micro-batch: one that is packed, or as many of the longest examples as the tokens allow."""
    return 1 if settings.packing else max(1, plan.micro_batch_tokens // settings.max_seq_length)


def arguments(settings: Finetuning, plan: Plan, steps: int) -> SFTConfig:
    """The trainer's configuration; derived from the settings and the plan, nothing else."""
    config = SFTConfig(
        output_dir=str(settings.folders.checkpoints),
        max_length=None,
        packing=settings.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=batch_size(settings, plan),
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=warmup_steps(settings, steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=plan.optimizer,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=False,
        fp16=plan.dtype == torch.float16,
        use_cpu=not plan.machine.on_gpu,
        ddp_backend="gloo" if plan.processes > 1 and not plan.machine.on_gpu else None,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=plan.gradient_checkpointing,
        logging_strategy="steps",
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=None,
        eval_strategy="no",
        report_to=[] if settings.report_to == "none" else [settings.report_to],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=plan.machine.on_gpu,
        remove_unused_columns=False,
    )
    config._n_gpu = min(1, config.n_gpu)  # one process trains on one GPU; others that it sees are left alone
    return config


class AssistantTrainer(SFTTrainer):
    """SFTTrainer without its per-step host synchronisations, with checkpoints that are written atomically.

    steps: optimizer steps of the whole run, counted over the packed data. identity: what another run must share to
    resume its checkpoints. seen_tokens: tokens that this process has trained on, since it was built.
    """

    seen_tokens = 0
    newest_inputs: dict | None = None
    _partial_dir: Path | None = None

    def __init__(self, model: PeftModel, settings: Finetuning, plan: Plan, inputs: RunInputs):
        packed = pack(inputs.data.examples, settings, plan)
        self.settings, self.plan, self.run_inputs = settings, plan, inputs
        self.steps = count_steps(len(packed), settings, plan)
        self.identity = identity(settings, plan, inputs, self.steps)
        super().__init__(
            model=model,
            args=arguments(settings, plan, self.steps),
            train_dataset=packed,
            processing_class=inputs.template.tokenizer,
        )
        qlora.cast_trainable(self.model)
        folders = settings.folders
        self.mirror = checkpoints.Mirror(folders.checkpoints, folders.drive / "checkpoints", settings.save_total_limit)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if settings.compile_layers:
            compile_layers(self.model)
        self.monitor = callbacks.Monitor(self)
        self.add_callback(self.monitor)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple:
        """Mean negative log-likelihood of the step's tokens in the loss, through TRL's fused head.

        Equal to SFTTrainer's own; its entropy and accuracy, three reads from the GPU a step, are left out.
        """
        self.newest_inputs = inputs
        self.seen_tokens += inputs["input_ids"].numel()
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

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


def warmup_steps(settings: Finetuning, steps: int) -> int:
    """Optimizer steps of the run over which the learning rate rises; "constant" knows no warm-up."""
    return 0 if settings.lr_scheduler_type == "constant" else round(settings.warmup_ratio * steps)


def count_steps(sequences: int, settings: Finetuning, plan: Plan) -> int:
    """Optimizer steps of the whole run: sequences of one epoch over batch and accumulation, rounded up."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = -(-sequences // batch_size(settings, plan))
    return math.ceil(-(-batches // (plan.accumulation * plan.processes)) * settings.num_train_epochs)


def compile_layers(model: torch.nn.Module) -> None:
    """Compiles each decoder layer by itself: quick to build, and adapters and 4-bit layers trace whole."""
    for module in model.get_base_model().modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.compile()


def identity(settings: Finetuning, plan: Plan, inputs: RunInputs, steps: int) -> dict:
    """What two runs must share for one to resume the other's checkpoints; written to run.json in each of them."""
    names, tokenizer = list(SAME_RUN), inputs.template.tokenizer
    if settings.lr_scheduler_type not in ("constant", "constant_with_warmup"):
        names += ["num_train_epochs", "max_steps"]
    return {
        **{name: getattr(settings, name) for name in names},
        "warmup_steps": warmup_steps(settings, steps),
        "dtype": str(plan.dtype),
        "optimizer": plan.optimizer,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "base": models.fingerprint(plan.model_path) if plan.model_path else None,
        "tokenizer": _digest([json.dumps(tokenizer.get_vocab(), sort_keys=True)]),
        "chat_template": _digest([tokenizer.chat_template]),
        "rows": len(inputs.data.examples),
        "rows_sha256": _digest(json.dumps([row["input_ids"], row["labels"]]) for row in inputs.data.examples),
        "held_out": _digest(json.dumps(example["input_ids"]) for example in inputs.held_out),
    }


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


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
    """Held-out loss of the adapter that is loaded now, where early stopping kept the best one."""
    mirror_problem: str | None
    """Why the newest checkpoint is not on Drive."""

    def __str__(self) -> str:
        begun = f"went on from {self.resumed_from}" if self.resumed_from else "started afresh"
        best = f"kept the adapter with the best held-out loss, {self.best_loss:.4f}" if self.best_loss else None
        said = [f"{begun}, now at step {self.step} of {self.of}", best, self.mirror_problem]
        return "; ".join(filter(None, said))


def train(trainer: AssistantTrainer) -> Outcome:
    """Trains to the end, from the newest complete checkpoint if there is one.

    Raises ValueError for a checkpoint of another run, FloatingPointError for a loss that is not finite, and
    MemoryError when the GPU ran out of memory.
    """
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
        ended_by = _train_from(trainer, start)
    except torch.OutOfMemoryError as error:
        raise MemoryError(_out_of_memory(trainer)) from error
    finally:
        trainer.monitor.close()
        trainer.mirror.wait()
    best = callbacks.restore_best(trainer)
    state, resumed_from = trainer.state, start.name if start else None
    return Outcome(resumed_from, state.global_step, state.max_steps, ended_by, best, trainer.mirror.problem)


def _train_from(trainer: AssistantTrainer, start: Path | None) -> str:
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


def starting_point(trainer: AssistantTrainer) -> Path | None:
    """The checkpoint to resume from: the newest complete one, here or on Drive, of this very run."""
    folders = trainer.settings.folders
    if not trainer.settings.resume:
        for folder in (folders.checkpoints, folders.drive / "checkpoints"):  # without a Drive both are one folder
            if aside := checkpoints.set_aside(folder):
                print(f"resume = False: earlier checkpoints are in {aside}")
        return None
    start = checkpoints.newest(folders.checkpoints, folders.drive / "checkpoints")
    if start:
        optional = "" if trainer.settings.early_stopping_patience else "held_out"  # which then decides nothing
        trainer.monitor.held_out_changed = checkpoints.check_same_run(start, trainer.identity, optional)
        print(f"going on from {start}")
        if trainer.monitor.held_out_changed:
            print(f"{checkpoints.CHANGED['held_out']}: the losses that were measured on the other one are left out")
    return start


def ended_early(start: Path, settings: Finetuning) -> bool:
    """Whether early stopping had ended the run at the checkpoint `start`: its best adapter is all that is needed."""
    losses = callbacks.Metrics(settings.folders.metrics).held_out_losses()
    so_far = [(loss, at) for loss, at in losses if at <= checkpoints.step_of(start)]
    return (start / checkpoints.BEST_INSIDE).exists() and callbacks.is_over(so_far, settings)


def _out_of_memory(trainer: AssistantTrainer) -> str:
    """What was asked for and what would fit: activation checkpointing, with which the run can be resumed, or less."""
    tokens = trainer.newest_inputs["input_ids"].numel() if trainer.newest_inputs else 0
    half = max(trainer.settings.max_seq_length, tokens // 2)
    cure = (
        f"micro_batch_tokens = {half} and resume = False, for it is another run then"
        if trainer.args.gradient_checkpointing
        else "gradient_checkpointing = 'on' and run all cells again: training goes on from the newest checkpoint"
    )
    return (
        f"the GPU ran out of memory on a micro-batch of {tokens:,} tokens at step {trainer.state.global_step + 1}."
        f" Set {cure}"
    )


def save_adapter(trainer: AssistantTrainer) -> Path:
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


def _write_adapter(trainer: AssistantTrainer, trained: dict[str, torch.Tensor], folder: Path) -> Path:
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
