"""One training run to be measured: settings, rows, base, a clock, and what predicts it. Serves every training part."""

import dataclasses
import gc
import json
import random
import time
from pathlib import Path

import measuring
import numpy as np
import torch
from transformers import AutoConfig, TrainerCallback

from llm_finetuning import hardware, models, prompts, settings
from llm_finetuning.training import fused_lora, planning, qlora
from llm_finetuning.training.dataset import TrainingData

PERCENTILES = [(0, 20), (5, 80), (25, 193), (50, 396), (75, 673), (90, 1098), (95, 1502), (99, 2870), (100, 3000)]
"""Token lengths of OASST1's threads along the best path, Phi-2's tokenizer."""
ORIGINAL_TARGETS = "q_proj, k_proj, v_proj, dense"
OURS = {"packing": True, "attention": "auto", "dtype": "auto", "lora_target_modules": ORIGINAL_TARGETS}
LONGEST = 512
"""Tokens at which the original cut its rows."""
ONCE = {"max_steps": -1, "num_train_epochs": 1.0}
"""The settings of one pass over the rows."""


def step_of(tokens: int) -> dict:
    """The settings of an optimizer step of one micro-batch."""
    return {"micro_batch_tokens": tokens, "tokens_per_step": tokens}


ORIGINAL = {"packing": False, "dtype": "float16", "optim": "paged_adamw_32bit", "gelu": True} | step_of(LONGEST)
"""The original's settings, written out from its description: batch 1, no packing, fp16 autocast, adapters on q, k, v
and dense, paged AdamW. Without a GPU the two that need one, fp16 and the paged optimizer, are left out."""
NEED_A_GPU = ("dtype", "optim")
PLANNED = (
    *("dtype", "attention", "packing", "max_seq_length", "use_4bit", "bnb_4bit_use_double_quant"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "optim", "tokens_per_step"),
    *("micro_batch_tokens", "gradient_checkpointing", "max_steps", "num_train_epochs"),
)
"""The settings that `planning.plan` reads."""


def settings_for(base: Path, folder: Path, changes: dict) -> settings.Finetuning:
    """The notebook's defaults without evaluation and checkpoints, until somebody stops, with the changes put in."""
    fixed = {
        "drive_folder": str(folder / "run"),
        "work_folder": str(folder / "run"),
        "model_name": str(base),
        "max_seq_length": LONGEST,
        "save_steps": 10**9,
        "eval_steps": 0,
        "report_to": "none",
        "resume": False,
        "logging_steps": 10**6,
        "max_steps": 10**6,
    }
    names = {field.name for field in dataclasses.fields(settings.Finetuning)}
    asked = {name: value for name, value in (OURS | changes).items() if name in names}
    return settings.from_cell(settings.Finetuning, measuring.defaults() | fixed | asked)


def oasst_length(percent: float, longest: int) -> int:
    """Tokens of OASST1's thread at this percentile, cut at `longest`."""
    at, lengths = zip(*PERCENTILES, strict=True)
    return min(longest, int(np.interp(percent, at, lengths)))


def rows_like_oasst(count: int, vocabulary: int, longest: int) -> TrainingData:
    """Random tokens with OASST1's lengths, cut at `longest`."""
    chance = random.Random(0)
    return random_rows([oasst_length(chance.uniform(0, 100), longest) for _ in range(count)], vocabulary)


def random_rows(lengths: list[int], vocabulary: int) -> TrainingData:
    """Rows of random tokens; the last 60% of each is the answer."""
    chance, rows = random.Random(1), []
    for length in lengths:
        ids = [chance.randrange(vocabulary) for _ in range(length)]
        cut = int(length * 0.4)
        rows.append({"input_ids": ids, "labels": [prompts.IGNORE_INDEX] * cut + ids[cut:]})
    return as_data(rows)


def as_data(rows: list[dict]) -> TrainingData:
    """Rows as a run takes them, none truncated or left out."""
    return TrainingData(rows, len(rows), sum(len(row["input_ids"]) for row in rows), len(rows), 0, 0, {})


class Clock(TrainerCallback):
    """Time after `warm_up` steps, until `seconds` are over or training is; the device is waited for at both ends."""

    def __init__(self, trainer, device: str, seconds: float, warm_up: int):
        self.trainer, self.device, self.seconds, self.warm_up = trainer, device, seconds, warm_up
        self.begun = False

    def on_train_begin(self, args, state, control, **kwargs):
        if self.warm_up == 0:
            self._begin(state)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.begun and state.global_step >= self.warm_up:
            self._begin(state)
        elif self.begun and time.perf_counter() - self.start > self.seconds:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.wait()
        self.elapsed = time.perf_counter() - self.start
        self.tokens, self.steps = self.trainer.seen_tokens - self.tokens, state.global_step - self.step

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _begin(self, state) -> None:
        self.wait()
        self.start, self.tokens, self.step = time.perf_counter(), self.trainer.seen_tokens, state.global_step
        self.begun = True


class Run:
    """A base with adapters, loaded once, that trains rows as often as it is asked to.

    changes: settings that differ from OURS, and "gelu" (the published eight kernels), "autocast", "adapter_dtype",
    "fused_lora".
    """

    def __init__(self, base: Path, folder: Path, changes: dict, rows: TrainingData):
        self.machine, self.folder, self.base = hardware.detect("auto"), folder, base
        self.changes = changes if self.machine.on_gpu else {k: v for k, v in changes.items() if k not in NEED_A_GPU}
        self.template = prompts.template_for(models.tokenizer(str(base)))
        self.peak = hardware.PeakMemory(self.machine.device, self.machine.free_memory).start()
        chosen = settings_for(base, folder, self.changes)
        self.model = qlora.add_adapters(load(chosen, self.planned(chosen, rows), base, self.changes), chosen)
        if not self.changes.get("fused_lora", True):
            with_peft_layers(self.model)

    def planned(self, chosen: settings.Finetuning, rows: TrainingData) -> planning.Plan:
        return planning.plan(
            chosen, self.machine, AutoConfig.from_pretrained(self.base, trust_remote_code=False), rows.lengths
        )

    def train(self, rows: TrainingData, seconds: float, warm_up: int, **changed) -> dict:
        """Trains until `seconds` are over, or the rows are with ONCE, and returns what was measured.

        changed: settings for this time. Raises FloatingPointError for a loss that is not finite.
        """
        from llm_finetuning.training.dataset import RunInputs
        from llm_finetuning.training.trainer import AssistantTrainer

        chosen = settings_for(self.base, self.folder, self.changes | changed)
        plan = self.planned(chosen, rows)
        trainer = AssistantTrainer(self.model, chosen, plan, RunInputs(self.template, rows, []))
        qlora.cast_trainable(trainer.model, self.changes.get("adapter_dtype", torch.float32))
        if self.changes.get("autocast"):
            trainer.compute_loss_context_manager = lambda: torch.autocast(plan.device.split(":")[0], torch.bfloat16)
        clock = Clock(trainer, plan.device, seconds, warm_up)
        trainer.add_callback(clock)
        trainer.train()
        loss = trainer.state.log_history[-1]["train_loss"]
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} with {self.changes}: nothing was measured")
        return summary(clock, plan, self.peak.read()) | {"inputs": inputs(plan, chosen, self.base)}

    def close(self) -> None:
        """Lets go of the model and its memory."""
        self.peak.stop()
        del self.model
        gc.collect()
        hardware.free_memory()


def load(chosen: settings.Finetuning, plan: planning.Plan, base: Path, changes: dict):
    model = qlora.load_base(chosen, dataclasses.replace(plan, model_path=base))
    if changes.get("gelu"):
        from transformers.activations import ACT2FN

        for layer in model.model.layers:
            layer.mlp.activation_fn = ACT2FN["gelu_new"]
    return model


def with_peft_layers(model: torch.nn.Module) -> None:
    """Gives the LoRA layers back the class that PEFT made them with."""
    plain = {fused: peft for peft, fused in fused_lora.FUSED.items()}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]


def summary(clock: Clock, plan: planning.Plan, peak: int) -> dict:
    """Speed, memory, measured and planned, and MFU of a run; MFU over the matrix rate measured at its start."""
    speed = clock.tokens / clock.elapsed
    return {
        "tokens_per_second": speed,
        "seconds": clock.elapsed,
        "step_seconds": clock.elapsed / clock.steps,
        "mfu": plan.mfu(speed),
        "peak_gib": peak / hardware.GIB,
        "planned_gib": plan.peak_memory / hardware.GIB,
        "planned_tokens_per_second": plan.steps * min(plan.step_tokens, plan.tokens) / plan.seconds,
    }


def inputs(plan: planning.Plan, chosen: settings.Finetuning, base: Path) -> dict:
    """What `planning.plan` needs to predict this run again."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=False).to_diff_dict()
    return {
        "machine": dataclasses.asdict(plan.machine),
        "config": {name: value for name, value in config.items() if name not in ("architectures", "dtype")},
        "settings": {name: getattr(chosen, name) for name in PLANNED},
        "rows": plan.examples,
        "tokens": plan.tokens,
    }


def figures(name: str, found: dict) -> list[dict]:
    """Speed, memory and MFU of one run, with what predicts the first two."""
    known = {"inputs": found["inputs"]}
    return [
        measuring.figure(f"tokens per second, {name}", "tokens/s", [found["tokens_per_second"]], **known),
        measuring.figure(f"peak memory, {name}", "GiB", [found["peak_gib"]], **known),
        measuring.figure(f"MFU, {name}", "1", [found["mfu"]]),
    ]


def as_text(found: dict) -> str:
    """The run on one line."""
    return json.dumps({name: round(value, 4) for name, value in found.items() if name != "inputs"})
