"""Verifying a merge: a merged folder is the trained model, or it is not published."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from torch.overrides import TorchFunctionMode

from llm_finetuning import hardware, models
from llm_finetuning.evaluation import mode, scoreboard
from llm_finetuning.files.shards import Weights
from llm_finetuning.prompts import Template
from llm_finetuning.release import companions, held_weights, merging
from llm_finetuning.release.merging import BASES, Merge
from llm_finetuning.training.memory import VERIFIED_EXAMPLES
from llm_finetuning.training.planning import Plan

LOSS_TOLERANCE = 1.01
"""Held-out loss of the merged model over that of the trained 4-bit model with its adapter."""


@dataclass(frozen=True)
class Merged:
    """A merged folder that passed its verification."""

    folder: Path
    base: str
    losses: dict[str, float]
    """Held-out loss by base; only the measured ones."""
    checks: pd.DataFrame
    """check, found, allowed, passed."""
    answers: pd.DataFrame
    """Greedy answers of the unmerged and the merged model."""


def merge_and_verify(
    plan: Plan, quantised: set[str], template: Template, held_out: list[dict], after_loss: float
) -> Merged:
    """Merges the adapter into each base that the settings ask for, keeps the better one and verifies it.

    quantised: names of the weights that were trained in 4 bits (`merging.quantised_names`); after_loss: held-out loss
    of the trained model. The trainer's model must have been freed. Raises ValueError with what differed.
    """
    settings = plan.settings
    weights = Weights(plan.model_path)
    adapter = merging.read_adapter(settings.folders.adapter, weights)
    stored = merging.stored_names(quantised | set(adapter.factors), weights)
    adapter, quantised = adapter.renamed(stored), {stored[name] for name in quantised}
    merge = Merge("original", settings, plan.dtype, plan.save_dtype, plan.device, weights, adapter, quantised)
    merge = dataclasses.replace(merge, held=held_weights.find(plan))
    candidates = BASES if settings.merge_base == "best" else [settings.merge_base]
    losses: dict[str, float] = {}
    for base in candidates if quantised else ["original"]:
        losses[base] = _write_and_measure(dataclasses.replace(merge, base=base), template, held_out)
        best = min(losses, key=losses.get)
        for other in set(losses) - {best}:
            shutil.rmtree(settings.folders.merged / other, ignore_errors=True)
    verified = _verify(dataclasses.replace(merge, base=best), template, held_out, losses, after_loss)
    held_weights.remove(plan)
    return verified


def _write_and_measure(merge: Merge, template: Template, held_out: list[dict]) -> float:
    """Writes the merged folder anew, and returns its held-out loss as it is read back."""
    folder = merge.settings.folders.merged / merge.base
    shutil.rmtree(folder, ignore_errors=True)
    merging.write_merged(merge, folder)
    companions.write_companions(folder, merge.weights.folder, template, merge.save_dtype)
    loss = scoreboard.held_out_loss(models.load_strict(folder, merge.save_dtype, merge.device), held_out, template)
    hardware.free_memory()
    return loss


def _verify(
    merge: Merge, template: Template, held_out: list[dict], losses: dict[str, float], after_loss: float
) -> Merged:
    folder = merge.settings.folders.merged / merge.base
    examples = held_out[:VERIFIED_EXAMPLES]

    def outputs(model: torch.nn.Module, routing: Routing) -> tuple[list[torch.Tensor], list[str]]:
        answers = scoreboard.answers(model, examples, template, merge.settings.max_new_tokens)
        with routing:
            return logits(model, examples), [answer.text for answer in answers]

    changed = changed_tensors(merge, Weights(folder))
    routing = Routing()
    expected, unmerged_answers = outputs(unmerged_model(merge), routing)
    hardware.free_memory()
    routing = Routing(routing.choices)
    found, merged_answers = outputs(models.load_strict(folder, merge.save_dtype, merge.device), routing)
    hardware.free_memory()
    checks = verification_table(merge, changed, expected, found, losses[merge.base], after_loss, routing)
    if not checks.passed.all():
        raise ValueError(
            f"the merged model in {folder} is not the trained one, so nothing is published:\n"
            f"{checks[~checks.passed].to_string(index=False)}\n"
            "The adapter and the checkpoints are untouched. The same merge would fail again: " + _cure(merge, losses)
        )
    prompts = [example["pair"]["prompt"] for example in examples]
    answers = pd.DataFrame({"prompt": prompts, "unmerged": unmerged_answers, "merged": merged_answers})
    return Merged(folder, merge.base, losses, checks, answers)


def _cure(merge: Merge, losses: dict[str, float]) -> str:
    """What can be changed after a merge that failed its verification; `losses` are of the bases that were tried."""
    others = [base for base in BASES if merge.quantised and base not in losses]
    if others:
        return f"set merge_base = {others[0]!r} and run all cells again"
    return "the adapter alone can be used, with the base as it was trained on (peft.PeftModel.from_pretrained)"


def verification_table(
    merge: Merge,
    changed: set[str],
    expected: list[torch.Tensor],
    found: list[torch.Tensor],
    loss: float,
    after_loss: float,
    routing: "Routing | None" = None,
) -> pd.DataFrame:
    """Returns each check with what was found, what is allowed, and whether it passed. NaN never passes.

    changed: names of the tensors that differ from the base; expected, found: logits of the unmerged and the merged
    model; loss, after_loss: held-out loss of the merged and the trained model; routing: of a mixture of experts.
    """
    adapter = merge.adapter
    intended = adapter.names - (adapter.experts.silent() if adapter.experts else set())
    a, b = torch.cat(expected), torch.cat(found)
    difference = float((a - b).norm() / a.norm())
    # Half a step of the dtype for each changed tensor; roundings are independent and add up like a random walk.
    tolerance = 2.0 ** -(merging.MANTISSA_BITS[merge.save_dtype] + 1) * adapter.count**0.5
    extra, missing = sorted(changed - intended), sorted(intended - changed)
    checks = [
        ("intended tensors changed", f"{len(intended & changed)} of {len(intended)}", "all", not missing),
        ("other tensors changed", ", ".join(extra[:3]) or "none", "none", not extra),
        ("logits, relative difference", f"{difference:.2e}", f"{tolerance:.2e}", bool(difference <= tolerance)),
        (
            "held-out loss over the trained model's",
            f"{loss:.4f} / {after_loss:.4f} = {loss / after_loss:.4f}",
            f"{LOSS_TOLERANCE:g}",
            bool(loss <= after_loss * LOSS_TOLERANCE),
        ),
    ]
    if routing is not None and routing.chosen:
        checks.insert(3, ("experts that the merged model would choose otherwise", routing.share_of_flips, "any", True))
    return pd.DataFrame(checks, columns=["check", "found", "allowed", "passed"])


class Routing(TorchFunctionMode):
    """Notes which experts the routers of a mixture choose (`topk`), or has the model use those that were noted.

    Rounding flips a choice between two experts that are almost equal, and the token's logits jump: that says nothing
    about the merge. With the same experts, logits differ by rounding alone, in a mixture as in any other model.
    """

    def __init__(self, choices: list[torch.Tensor] | None = None):
        super().__init__()
        self.choices: list[torch.Tensor] = []
        """Chosen experts, (…, k) for each call of a router."""
        self.chosen = self.flipped = 0
        """Choices that were replaced by noted ones; those among them that were others."""
        self._noted = None if choices is None else iter(choices)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return result
        if self._noted is None:
            self.choices.append(result.indices.cpu())
            return result
        noted = next(self._noted).to(result.indices.device)
        self.chosen += noted.numel()
        self.flipped += int((~(result.indices.unsqueeze(-1) == noted.unsqueeze(-2)).any(-1)).sum())
        scores = args[0]
        return torch.return_types.topk((scores.gather(-1, noted), noted))

    @property
    def share_of_flips(self) -> str:
        return f"{self.flipped:,} of {self.chosen:,} ({self.flipped / self.chosen:.1%})"


def changed_tensors(merge: Merge, merged: Weights) -> set[str]:
    """Returns the names of the tensors that differ from the base, as read back. Raises ValueError for other names."""
    weights = merge.weights
    if others := sorted(set(weights.names()) ^ set(merged.names())):
        raise ValueError(f"{merged.folder} holds other tensors than its base: {others[:5]}")

    def is_same(name: str) -> bool:
        return torch.equal(merge.start(name).to(merge.save_dtype).cpu(), merged.read(name))

    return {name for name in merged.names() if not is_same(name)}


def unmerged_model(merge: Merge) -> torch.nn.Module:
    """Loads the same 16-bit base with the adapter beside it, as PEFT runs it."""
    model = models.load_strict(merge.weights.folder, merge.save_dtype, merge.device)
    if merge.base == "dequantized":
        stored = set(merge.weights.names())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                place = models.stored_name(name, stored, model.config)
                if place in merge.quantised:
                    parameter.copy_(merge.start(place))
    return PeftModel.from_pretrained(model, merge.settings.folders.adapter).eval()


def logits(model: torch.nn.Module, examples: list[dict]) -> list[torch.Tensor]:
    """Returns the logits (T, V) of each example in float32 on the CPU."""
    device = next(model.parameters()).device
    with mode.evaluating(model):
        return [
            model(input_ids=torch.tensor([e["input_ids"]], device=device), use_cache=False).logits[0].float().cpu()
            for e in examples
        ]
