"""About a minute before a long run: what would otherwise come out hours later.

The random numbers of the run are left as they were, so a checked run is the same run.
"""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from llm_finetuning import hardware, prompts
from llm_finetuning.hardware import readable_seconds
from llm_finetuning.training import qlora

TIMED_BATCHES = 3


@dataclass(frozen=True)
class Checks:
    """`table`: check, found. `seconds`: predicted for the whole run from measured steps; `memory`: peak in bytes."""

    table: pd.DataFrame
    seconds: float
    memory: int


def run(trainer, data, template, settings, plan, steps: int) -> Checks:
    """Runs every check. Raises ValueError with what is wrong; FloatingPointError for a loss that is not finite."""
    found = [
        ("EOS ends every answer", check_ends(data.examples, template)),
        ("adapters", check_adapters(trainer.model)),
    ]
    with torch.random.fork_rng(), hardware.PeakMemory(plan.device, plan.machine.free_memory) as peak:
        loss, norm = check_longest(trainer)
        found.append(("longest batch, forward and backward", f"loss {loss:.3f}, gradient norm {norm:.3f}, finite"))
        per_token = seconds_per_token(trainer)
    found.append(("a checkpoint written and read back", check_checkpoint(trainer.model)))
    seconds = per_token * steps * min(plan.step_tokens, plan.tokens) / plan.processes
    found += [
        ("speed", f"{1 / per_token:,.0f} tokens/s over {TIMED_BATCHES} micro-batches"),
        ("time for the run, from these", readable_seconds(seconds)),
        ("memory, peak", f"{hardware.as_gib(peak.read())}; planned {hardware.as_gib(plan.peak_memory)}"),
    ]
    trainer.model.zero_grad(set_to_none=True)
    trainer.seen_tokens = 0
    return Checks(pd.DataFrame(found, columns=["check", "found"]), seconds, peak.read())


def check_ends(rows: list[dict], template) -> str:
    """Every row has trained labels, and the last of them ends an answer; raises ValueError where one has not."""
    for number, row in enumerate(rows, 1):
        trained = [label for label in row["labels"] if label != prompts.IGNORE_INDEX]
        if not trained or trained[-1] not in template.stop_token_ids:
            shown = template.tokenizer.decode(row["input_ids"][-20:])
            raise ValueError(
                f"row {number} has {len(trained)} trained tokens and does not end with an end-of-text token:"
                f" …{shown!r}. Check the tokenizer's chat template"
            )
    return f"in all {len(rows):,} rows"


def check_adapters(model) -> str:
    table = qlora.coverage(model)
    others = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    if others:
        raise ValueError(f"parameters beside the adapters would be trained: {', '.join(others[:3])}")
    return f"on {table.adapted.sum()} of {table['of'].sum()} modules, nothing else is trained"


def check_longest(trainer) -> tuple[float, float]:
    """(loss, gradient norm) of the micro-batch with the most tokens; raises FloatingPointError unless finite."""
    data = trainer.train_dataset
    longest = max(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    loss = _forward_backward(trainer, [longest])
    norms = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    norm = float(torch.stack(norms).float().norm())
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(
            f"the longest batch gives loss {loss} and gradient norm {norm} before any training: with float16, use a"
            " GPU that has bfloat16; else the base or its dtype is at fault"
        )
    return loss, norm


def _forward_backward(trainer, indices: list[int]) -> float:
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in indices])
    batch = {k: v.to(trainer.args.device) if torch.is_tensor(v) else v for k, v in batch.items()}
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item()


def seconds_per_token(trainer) -> float:
    """Forward and backward over a few micro-batches from the start of the data, per token."""
    count = min(TIMED_BATCHES * trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    size = trainer.args.per_device_train_batch_size
    begun, seen = time.perf_counter(), trainer.seen_tokens
    for start in range(0, count, size):
        _forward_backward(trainer, list(range(start, min(start + size, count))))
    return (time.perf_counter() - begun) / (trainer.seen_tokens - seen)


def check_checkpoint(model) -> str:
    """Saves the adapter and reads it back bit for bit."""
    from peft import load_peft_weights

    whole = qlora.gather_adapter(model)
    with tempfile.TemporaryDirectory() as folder:
        qlora.save_adapter_weights(model, whole, Path(folder))
        back = load_peft_weights(folder, device="cpu")
    state = {n.replace(".default", ""): p for n, p in whole.items()}
    different = [n for n, p in state.items() if n not in back or not torch.equal(back[n], p.cpu())]
    if different or len(back) != len(state):
        raise ValueError(f"the adapter read back differs from the one in memory: {different[:3]}")
    return f"{len(back)} tensors, equal to the bit"
