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
from peft import PeftModel

from llm_finetuning import hardware, prompts
from llm_finetuning.evaluation import mode
from llm_finetuning.hardware import readable_seconds
from llm_finetuning.prompts import Template
from llm_finetuning.settings import AUTO
from llm_finetuning.training import callbacks, checkpoints, qlora
from llm_finetuning.training.resumable import ResumableTrainer, within_memory
from llm_finetuning.training.trainer import compile_layers

TIMED_BATCHES = 3
COMPILED_FROM = 600
"""Seconds of a run from which on it is measured whether compiled layers pay; compiling takes minutes on a GPU."""
ISOLATION = {torch.float32: 1e-3}
"""Relative difference of the logits of a packed example and the same one alone; 16 bits round to 0.05."""


@dataclass(frozen=True)
class Checks:
    """`table`: check, found. `seconds`: predicted for the whole run from measured steps; `memory`: peak in bytes."""

    table: pd.DataFrame
    seconds: float
    memory: int


def run(trainer: ResumableTrainer) -> Checks:
    """Runs every check. Raises ValueError with what is wrong, FloatingPointError for a loss that is not finite.

    Raises MemoryError, with what to change, where a micro-batch does not fit into the GPU's memory.

    A model that is to be sharded is still whole here and may not leave room for a step: then none is tried, and the
    plan's predictions stand in for the measured ones.
    """
    plan, inputs = trainer.plan, trainer.run_inputs
    found = [
        ("EOS ends every response", check_ends(inputs.data.examples, inputs.template)),
        ("adapters", check_adapters(trainer.model)),
        ("a checkpoint written and read back", check_checkpoint(trainer.model)),
    ]
    seconds, memory = plan.seconds, int(plan.peak_memory)
    if plan.shards == 1:
        with within_memory(trainer):
            if trainer.settings.packing and len(inputs.data.examples) > 1:
                found.append(("packed examples", check_packing(trainer)))
            found[2:2], seconds, memory = check_steps(trainer)
    return Checks(pd.DataFrame(found, columns=["check", "found"]), seconds, memory)


def check_steps(trainer: ResumableTrainer) -> tuple[list[tuple[str, str]], float, int]:
    """(lines of the table, predicted seconds of the run, peak bytes) from steps that leave no trace."""
    plan = trainer.plan
    with torch.random.fork_rng(), hardware.PeakMemory(plan.device, plan.machine.free_memory) as peak:
        as_set = trainer.settings.compile_layers == "yes"
        compiled = [("compiled layers", keep_if_it_compiles(trainer))] if as_set else []
        loss, norm = check_longest(trainer)
        per_token, tokens = seconds_per_token(trainer), trainer.steps * min(plan.step_tokens, plan.tokens)
        if trainer.settings.compile_layers == AUTO:
            per_token, said = compile_if_it_pays(trainer, per_token, tokens * _left(trainer) / plan.processes)
            compiled = [("compiled layers", said)]
    trainer.model.zero_grad(set_to_none=True)
    trainer.forget()
    seconds = per_token * tokens / plan.processes
    mfu, cost = plan.mfu(plan.processes / per_token), plan.cost_of(seconds)
    lines = [
        ("longest batch, forward and backward", f"loss {loss:.3f}, gradient norm {norm:.3f}, finite"),
        ("speed", f"{1 / per_token:,.0f} tokens/s over {TIMED_BATCHES} micro-batches, MFU {mfu:.0%}"),
        *compiled,
        ("time for the run, from these", f"{readable_seconds(seconds)}; planned {readable_seconds(plan.seconds)}"),
        *([] if cost is None else [("cost of the run, from these", f"{cost:.2f}; planned {plan.cost:.2f}")]),
        ("memory, peak", f"{hardware.as_gib(peak.read())}; planned {hardware.as_gib(plan.peak_memory)}"),
    ]
    return lines, seconds, peak.read()


@torch.no_grad()
def check_packing(trainer: ResumableTrainer) -> str:
    """An example that is packed behind another one gets the logits that it gets alone; raises ValueError otherwise.

    Recurrent and convolutional layers, and masks that do not know of packing, carry one example into the next.
    """
    first, second = sorted((example["input_ids"] for example in trainer.run_inputs.data.examples), key=len)[:2]

    def logits(*examples: list[int]) -> torch.Tensor:
        ids = [token for example in examples for token in example]
        batch = _batch(trainer, [{"input_ids": ids, "labels": ids, "seq_lengths": [*map(len, examples)]}])
        trainer.note(batch)
        del batch["labels"]
        with trainer.accelerator.autocast(), mode.uncompiled(trainer.model):
            return trainer.model(**batch, use_cache=False).logits[0, -len(examples[-1]) :].float()

    trainer.model.eval()
    packed, alone = logits(first, second), logits(second)
    trainer.model.train()
    difference = float((packed - alone).norm() / alone.norm())
    if not difference <= ISOLATION.get(trainer.plan.dtype, 0.05):
        raise ValueError(
            f"in {trainer.model.config.model_type} packed examples are not isolated from one another (the logits differ"
            f" by {difference:.1%}): set packing = False"
        )
    return f"isolated from one another (logits differ by {difference:.1e})"


def check_ends(examples: list[dict], template: Template) -> str:
    """Every example has tokens in the loss, and the last of them is a stop token; raises ValueError otherwise."""
    for number, example in enumerate(examples, 1):
        in_loss = [label for label in example["labels"] if label != prompts.IGNORE_INDEX]
        if not in_loss or in_loss[-1] not in template.stop_token_ids:
            tail = template.tokenizer.decode(example["input_ids"][-20:])
            raise ValueError(
                f"row {number} has {len(in_loss)} trained tokens and does not end with an end-of-text token:"
                f" …{tail!r}. Check the tokenizer's chat template"
            )
    return f"in all {len(examples):,} examples"


def check_adapters(model: PeftModel) -> str:
    """Every target has an adapter, and nothing else is trained; raises ValueError otherwise."""
    table = qlora.coverage(model)
    others = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    if others:
        raise ValueError(f"parameters beside the adapters would be trained: {', '.join(others[:3])}")
    return f"on {table.adapted.sum()} of {table['of'].sum()} modules, nothing else is trained"


def check_longest(trainer: ResumableTrainer) -> tuple[float, float]:
    """(loss, gradient norm) of the micro-batch with the most tokens; raises FloatingPointError unless finite."""
    data = trainer.train_dataset
    by_length = sorted(range(len(data)), key=lambda i: -trainer.row_tokens(data[i]))
    loss = _forward_backward(trainer, by_length[: trainer.args.per_device_train_batch_size])
    norms = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    norm = float(torch.stack(norms).float().norm())
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(
            f"the longest batch gives loss {loss} and gradient norm {norm} before any training: with float16, use a"
            " GPU that has bfloat16; else the base or its dtype is at fault"
        )
    return loss, norm


def _forward_backward(trainer: ResumableTrainer, indices: list[int]) -> float:
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    batch = _batch(trainer, [trainer.train_dataset[i] for i in indices])
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item()


def _batch(trainer: ResumableTrainer, examples: list[dict]) -> dict:
    """The examples collated as in training, on the device."""
    batch = trainer.data_collator(examples)
    return {name: v.to(trainer.args.device) if torch.is_tensor(v) else v for name, v in batch.items()}


def seconds_per_token(trainer: ResumableTrainer) -> float:
    """Forward and backward over a few micro-batches from the start of the data, per token."""
    count = min(TIMED_BATCHES * trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    size = trainer.args.per_device_train_batch_size
    begun, seen = time.perf_counter(), trainer.seen_tokens
    for start in range(0, count, size):
        _forward_backward(trainer, list(range(start, min(start + size, count))))
    return (time.perf_counter() - begun) / (trainer.seen_tokens - seen)


def compile_if_it_pays(trainer: ResumableTrainer, per_token: float, tokens: float) -> tuple[float, str]:
    """Compiles the layers where that saves more of the run than it takes; returns (seconds per token, what was found).

    per_token: seconds without; tokens: of what is left of the run in this process. Processes decide together.
    """
    if not callbacks.largest_of_all(per_token * tokens >= COMPILED_FROM, trainer.plan):
        return per_token, f"off: not tried for a run of less than {readable_seconds(COMPILED_FROM)}"
    compile_layers(trainer.model)
    begun, pays = time.perf_counter(), False
    try:
        seconds_per_token(trainer)
        spent = time.perf_counter() - begun
        compiled = seconds_per_token(trainer)
        saved = (per_token - compiled) * tokens
        pays = saved > spent
        said = f"{per_token / compiled:.2f} times as fast, compiled in {readable_seconds(spent)}"
    except Exception as error:
        said = _not_made(error)
    if callbacks.largest_of_all(not pays, trainer.plan):
        compile_layers(trainer.model, on=False)
        return per_token, f"off: {said}"
    return compiled, f"on: {said}"


def _left(trainer: ResumableTrainer) -> float:
    """The share of the run's steps that no checkpoint has yet."""
    folders = trainer.settings.folders
    done = checkpoints.newest_step(folders.checkpoints, folders.mirrored) if trainer.settings.resume else 0
    return max(0.0, 1 - done / trainer.steps)


def keep_if_it_compiles(trainer: ResumableTrainer) -> str:
    """Tries the compiled layers of `compile_layers = "yes"`; where they cannot be made they run as they are."""
    begun, said = time.perf_counter(), ""
    try:
        seconds_per_token(trainer)
    except Exception as error:
        said = f"off: {_not_made(error)}"
    if callbacks.largest_of_all(bool(said), trainer.plan):
        compile_layers(trainer.model, on=False)
        return said or "off: another process cannot make them"
    return f"on: as set, compiled in {readable_seconds(time.perf_counter() - begun)}"


def _not_made(error: Exception) -> str:
    """What the compiler, or what it calls, failed with; without it the run is the same, and slower."""
    return f"cannot be made here ({type(error).__name__}: {' '.join(str(error).split()[:20])})"


def check_checkpoint(model: PeftModel) -> str:
    """Saves the adapter and reads it back bit for bit."""
    from peft import load_peft_weights

    whole = qlora.gather_adapter(model)
    with tempfile.TemporaryDirectory() as folder:
        qlora.save_adapter_weights(model, whole, Path(folder))
        back = load_peft_weights(folder, device="cpu")
    state = {qlora.saved_name(n): p for n, p in whole.items()}
    different = [n for n, p in state.items() if n not in back or not torch.equal(back[n], p.cpu())]
    if different or len(back) != len(state):
        raise ValueError(f"the adapter read back differs from the one in memory: {different[:3]}")
    return f"{len(back)} tensors, equal to the bit"
