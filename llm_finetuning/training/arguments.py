"""The configuration that every trainer here has."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from llm_finetuning.settings import Finetuning

if TYPE_CHECKING:
    from llm_finetuning.training.planning import Plan


def shared_arguments(settings: Finetuning, plan: "Plan", steps: int, batch: int) -> dict[str, Any]:
    """Arguments of a trainer's configuration, from the settings and the plan; batch: rows of a micro-batch."""
    return {
        "output_dir": str(settings.folders.checkpoints),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": plan.accumulation,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": warmup_steps(settings, steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": plan.optimizer,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": False,
        "fp16": plan.dtype == torch.float16,
        "use_cpu": not plan.machine.on_gpu,
        "ddp_backend": "gloo" if plan.processes > 1 and not plan.machine.on_gpu else None,
        "ddp_find_unused_parameters": False,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "logging_strategy": "steps",
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": None,
        "eval_strategy": "no",
        "router_aux_loss_coef": 0.0,  # the responses alone are learned; TRL cannot weigh the routers of every family
        "report_to": [] if settings.report_to == "none" else [settings.report_to],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": plan.machine.on_gpu,
        "remove_unused_columns": False,
    }


def on_one_gpu(config: TrainingArguments) -> TrainingArguments:
    """One process trains on one GPU; others that it sees are left alone."""
    config._n_gpu = min(1, config.n_gpu)
    return config


def warmup_steps(settings: Finetuning, steps: int) -> int:
    """Optimizer steps of the run over which the learning rate rises; "constant" knows no warm-up."""
    return 0 if settings.lr_scheduler_type == "constant" else round(settings.warmup_ratio * steps)
