"""Training: the trainer, its whole-or-absent checkpoints, and going on from the newest one."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from trl import SFTConfig, SFTTrainer, pack_dataset

from llm_finetuning.prompts import Template
from llm_finetuning.settings import Finetuning
from llm_finetuning.training import callbacks, checkpoints, planning, qlora
from llm_finetuning.training.dataset import TrainingData
from llm_finetuning.training.planning import Plan

SAME_RUN = (
    "model_name",
    "system_message",
    "max_seq_length",
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
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "tokens_per_step",
)
"""Settings that a checkpoint cannot be continued without."""
SHARDED = "pytorch_model_fsdp.bin"
"""What FSDP puts into a checkpoint beside the adapter, by its name in accelerate."""


def dataset(rows: list[dict], settings: Finetuning, plan: Plan) -> Dataset:
    """Rows as SFTTrainer takes them; packed, one row holds up to `plan.micro_batch_tokens` tokens of whole pairs.

    Packing is best-fit decreasing (arXiv 2404.10830) over rows shuffled with the seed, and never splits a pair.
    """
    columns = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    data = Dataset.from_list(columns).shuffle(seed=settings.seed)
    return pack_dataset(data, plan.micro_batch_tokens, "bfd") if settings.packing else data


def batch_size(settings: Finetuning, plan: Plan) -> int:
    """Rows per micro-batch: one packed row, or as many of the longest as the tokens allow."""
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
        warmup_steps=round(settings.warmup_ratio * steps),
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
    """SFTTrainer without its per-step host synchronisations, with checkpoints that are whole or absent."""

    run: dict
    mirror: checkpoints.Mirror
    save_limit: int
    monitor: callbacks.Monitor
    seen_tokens = 0
    newest_inputs: dict | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean negative log-likelihood of the step's trained tokens, through TRL's fused head.

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The adapter, into the trained parameters and in their dtype; PEFT would put float32 ones in their place."""
        qlora.set_adapter(self.model, Path(resume_from_checkpoint))

    def _get_output_dir(self, trial) -> str:
        return str(self._partial_dir) if self._partial_dir else super()._get_output_dir(trial)

    _partial_dir: Path | None = None

    def _save_checkpoint(self, model, trial) -> None:
        """Written beside, closed with its sums, renamed; then older ones go and the copy to Drive starts."""
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._partial_dir = folder / f".partial-{name}"
        try:
            Trainer._save_checkpoint(self, model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                checkpoints.store_best(self._partial_dir / name, folder)
                done = checkpoints.finalize(self._partial_dir / name, folder / name, self.run)
                checkpoints.clear_partial(folder)
                checkpoints.keep_newest(folder, self.save_limit)
                self.mirror.send(done)
        finally:
            self._partial_dir = None

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds the tokens seen; the token metrics of SFTTrainer are not collected."""
        Trainer.log(self, logs | {"tokens": self.seen_tokens * self.args.world_size}, start_time)


def build(model, template: Template, data: TrainingData, settings: Finetuning, plan: Plan, held_out: list[dict]):
    """The trainer, ready to run, and the exact number of optimizer steps it will take."""
    packed = dataset(data.examples, settings, plan)
    steps = count_steps(len(packed), settings, plan)
    trainer = AssistantTrainer(
        model=model,
        args=arguments(settings, plan, steps),
        train_dataset=packed,
        processing_class=template.tokenizer,
    )
    qlora.cast_trainable(trainer.model, plan.adapter_dtype)
    trainer.run = identity(settings, plan, data)
    folders = settings.folders
    trainer.save_limit = settings.save_total_limit
    trainer.mirror = checkpoints.Mirror(folders.checkpoints, folders.drive / "checkpoints", settings.save_total_limit)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if settings.compile_layers:
        compile_layers(trainer.model)
    trainer.monitor = callbacks.Monitor(trainer, template, settings, plan, held_out, steps)
    trainer.add_callback(trainer.monitor)
    return trainer, steps


def count_steps(micro_batches: int, settings: Finetuning, plan: Plan) -> int:
    """Optimizer steps of the whole run: rows of one epoch over batch and accumulation, rounded up."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = -(-micro_batches // batch_size(settings, plan))
    return math.ceil(-(-batches // (plan.accumulation * plan.processes)) * settings.num_train_epochs)


def compile_layers(model) -> None:
    """Compiles each decoder layer by itself: quick to build, and adapters and 4-bit layers trace whole."""
    for module in model.get_base_model().modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.compile()


def identity(settings: Finetuning, plan: Plan, data: TrainingData) -> dict:
    """What two runs must share for one to continue the other's checkpoints."""
    names = list(SAME_RUN)
    if settings.lr_scheduler_type not in ("constant", "constant_with_warmup"):
        names += ["num_train_epochs", "max_steps"]
    digest = hashlib.sha256()
    for row in data.examples:
        digest.update(json.dumps(row["input_ids"]).encode())
    return {
        **{name: getattr(settings, name) for name in names},
        "dtype": str(plan.dtype),
        "optimizer": plan.optimizer,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "rows": len(data.examples),
        "rows_sha256": digest.hexdigest(),
    }


def train(trainer: AssistantTrainer, settings: Finetuning) -> str:
    """Trains to the end, from the newest complete checkpoint if there is one; says in one line what it did.

    Raises ValueError for a checkpoint of another run, FloatingPointError for a loss that is not finite, and
    MemoryError when the GPU ran out of memory.
    """
    with trainer.accelerator.main_process_first():  # one moves or fetches checkpoints, the others find them
        start = starting_point(trainer, settings)
    folder = settings.folders.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.is_world_process_zero():
        checkpoints.clear_partial(folder)
        checkpoints.restore_best(start, folder)
    trainer.accelerator.wait_for_everyone()
    try:
        if start and ended_early(start, settings):
            trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        elif start and (start / SHARDED).exists() and not trainer.is_fsdp_enabled:
            take_finished(trainer, start, settings)
        else:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except torch.OutOfMemoryError as error:
        raise MemoryError(_out_of_memory(trainer, settings)) from error
    finally:
        trainer.monitor.close()
        trainer.mirror.wait()
    begun = f"went on from {start.name}" if start else "started afresh"
    best = callbacks.restore_best(trainer.model, settings)
    notes = [
        f"kept the adapter with the best held-out loss, {best:.4f}" if best is not None else "",
        trainer.mirror.problem or "",
    ]
    said = f"{begun}, now at step {trainer.state.global_step} of {trainer.state.max_steps}"
    return "; ".join([said, *filter(None, notes)])


def take_finished(trainer: AssistantTrainer, start: Path, settings: Finetuning) -> None:
    """Takes the adapter of a run that was finished with a sharded model; raises ValueError when it was not."""
    state = TrainerState.load_from_json(str(start / "trainer_state.json"))
    longer = settings.max_steps <= 0 and state.num_train_epochs < settings.num_train_epochs
    if longer or state.global_step < max(state.max_steps, settings.max_steps):
        raise ValueError(
            f"{start} is of a run with a sharded model, which is not over at step {state.global_step}: go on with the"
            " command that began it (accelerate launch --config_file profiles/accelerate/fsdp.yaml …), or set"
            " resume = False"
        )
    qlora.set_adapter(trainer.model, start)
    trainer.state = state


def plan_run(settings: Finetuning, machine, model_config, lengths: list[int]) -> Plan:
    """`planning.plan`, with micro-batch and optimizer of the run that is to be continued, whatever is free today."""
    folders = settings.folders
    runs = [
        json.loads((folder / checkpoints.RUN_FILE).read_text(encoding="utf-8"))
        for root in (folders.checkpoints, folders.drive / "checkpoints")
        for folder in sorted(root.glob("checkpoint-*"), key=checkpoints.step_of)
        if (folder / checkpoints.RUN_FILE).is_file()
    ]
    if settings.resume and runs:
        same = {"micro_batch_tokens": settings.micro_batch_tokens or runs[-1]["micro_batch_tokens"]}
        if settings.optim == "auto":
            same["optim"] = runs[-1]["optimizer"]
        settings = dataclasses.replace(settings, **same)
    return planning.plan(settings, machine, model_config, lengths)


def starting_point(trainer: AssistantTrainer, settings: Finetuning) -> Path | None:
    """The checkpoint to go on from: the newest complete one, here or on Drive, of this very run."""
    folders = settings.folders
    if not settings.resume:
        for folder in (folders.checkpoints, folders.drive / "checkpoints"):  # where both are one, the second is gone
            if aside := checkpoints.set_aside(folder):
                print(f"resume = False: earlier checkpoints are in {aside}")
        return None
    start = checkpoints.newest(folders.checkpoints, folders.drive / "checkpoints")
    if start:
        checkpoints.check_same_run(start, trainer.run)
        print(f"going on from {start}")
    return start


def ended_early(start: Path, settings: Finetuning) -> bool:
    """Whether early stopping had ended the run at the checkpoint `start`: its best adapter is all that is needed."""
    losses = callbacks.Metrics(settings.folders.metrics).held_out_losses()
    so_far = [(loss, at) for loss, at in losses if at <= checkpoints.step_of(start)]
    return (start / checkpoints.BEST_INSIDE).exists() and callbacks.is_over(so_far, settings)


def _out_of_memory(trainer: AssistantTrainer, settings: Finetuning) -> str:
    """What was asked for and what would fit: recomputation, which the run can go on with, or smaller micro-batches."""
    tokens = trainer.newest_inputs["input_ids"].numel() if trainer.newest_inputs else 0
    half = max(settings.max_seq_length, tokens // 2)
    cure = (
        f"micro_batch_tokens = {half} and resume = False, for it is another run then"
        if trainer.args.gradient_checkpointing
        else "gradient_checkpointing = 'on' and run all cells again: training goes on from the newest checkpoint"
    )
    return (
        f"the GPU ran out of memory on a micro-batch of {tokens:,} tokens at step {trainer.state.global_step + 1}."
        f" Set {cure}"
    )


def save_adapter(trainer: AssistantTrainer, template: Template, settings: Finetuning) -> Path:
    """The trained adapter, its tokenizer with the chat template and settings.json, in `folders.adapter`.

    Every process calls it, the first one writes.
    """
    folder = settings.folders.adapter
    trained = qlora.gather_adapter(trainer.model)
    if not trainer.is_world_process_zero():
        return folder
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.peft_config["default"].base_model_name_or_path = settings.model_name
    qlora.save_adapter_weights(trainer.model, trained, partial)
    template.tokenizer.save_pretrained(partial)
    settings.save(partial / "settings.json")
    return checkpoints.finalize(partial, folder, trainer.run)
