"""Measures the training of a peer, in its own process: whatever it builds stands on the Trainer of transformers.

Every recipe here reads its job, attaches this, and trains. Nothing of this project is imported, nor anything that the
peer would not import itself.
"""

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import TrainerCallback, trainer

GIB = 2**30
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "llamafactory", "axolotl")


def read_job() -> dict:
    """What the parent asks for: base, rows, work, result (paths), seconds, warm_up, packing.

    rows: JSON lines of `input_ids`, `attention_mask` and `labels`; warm_up: optimizer steps before the clock starts.
    """
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


class Watch(TrainerCallback):
    """Counts tokens and time after the warm-up, ends the training when `seconds` are over, and writes what it saw.

    Made before anything is loaded, as memory is counted from then; `settings` go into the result as they are.
    """

    def __init__(self, job: dict, settings: dict):
        self.job, self.settings = job, settings
        self.gpu = torch.cuda.is_available()
        self.free = torch.cuda.mem_get_info()[0] if self.gpu else 0
        self.tokens: list[torch.Tensor] = []
        self.losses: list[list[float]] = []
        self.mean_loss = self.start = None

    def attach(self, built: trainer.Trainer | None = None) -> None:
        """Watches this trainer, or without one every trainer that is built from here on."""
        if built is None:
            trainer.DEFAULT_CALLBACKS.append(self)
        else:
            built.add_callback(self)
        owner = built or trainer.Trainer
        step = owner.training_step

        def counted(*given: object, **named: object) -> object:
            self.count(next(value for value in (*given, *named.values()) if isinstance(value, Mapping)))
            return step(*given, **named)

        owner.training_step = counted

    def count(self, inputs: Mapping) -> None:
        """Notes the tokens of a micro-batch, padding left out; stays on the device, so that nothing waits."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        whole = mask is None or mask.shape != ids.shape
        self.tokens.append(torch.tensor(ids.numel()) if whole else (mask != 0).sum())

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.start is None and state.global_step >= self.job["warm_up"]:
            self.begin(state)
        elif self.start is not None and time.perf_counter() - self.start > self.job["seconds"]:
            control.should_training_stop = True

    def on_log(self, args: object, state: object, control: object, logs: dict | None = None, **kwargs: object) -> None:
        if "loss" in (logs or {}):
            self.losses.append([state.global_step, float(logs["loss"])])
        self.mean_loss = (logs or {}).get("train_loss", self.mean_loss)

    def begin(self, state: object) -> None:
        self.wait()
        self.start, self.first, self.step = time.perf_counter(), len(self.tokens), state.global_step

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.job["warm_up"] == 0:
            self.begin(state)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Writes the result, atomically. Raises RuntimeError for a training that ended within its warm-up."""
        self.wait()
        if self.start is None:
            raise RuntimeError(f"the training ended after {state.global_step} steps, all of them warm-up")
        seconds, tokens = time.perf_counter() - self.start, [int(count) for count in self.tokens]
        found = {
            "seconds": seconds,
            "tokens": sum(tokens[self.first :]),
            "steps": state.global_step - self.step,
            "all_tokens": sum(tokens),
            "peak_gib": self.peak() / GIB,
            "loss": self.mean_loss,
            "losses": self.losses[:1] + self.losses[-1:],
            "settings": self.settings,
            "versions": versions(),
        }
        partial = Path(f"{self.job['result']}.partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, self.job["result"])

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def peak(self) -> int:
        """Bytes: on a GPU what was allocated, and what has gone of its free memory beside; else resident memory."""
        if not self.gpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        beside = self.free - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
        return torch.cuda.max_memory_allocated() + max(0, beside)


def versions() -> dict[str, str]:
    """Of what is installed of PACKAGES in this environment."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {"python": sys.version.split()[0], **installed}


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def on_gpu(settings: dict, without: dict) -> dict:
    """The settings as they are where there is a GPU, else with what a CPU needs in their place."""
    return settings if torch.cuda.is_available() else settings | without
