"""The proof that a merged folder is the trained model; whoever fails it is not published."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from llm_finetuning import hardware, models
from llm_finetuning.evaluation import mode, scoreboard
from llm_finetuning.files.shards import Weights
from llm_finetuning.release import merging
from llm_finetuning.release.merging import BASES, Merge

LOSS_TOLERANCE = 1.01
"""Held-out loss of the merged model over that of the trained 4-bit model with its adapter."""
PROMPTS = 4


@dataclass(frozen=True)
class Merged:
    """A merged folder that passed its proof."""

    folder: Path
    base: str
    losses: dict[str, float]
    """Held-out loss by base; only the measured ones."""
    proof: pd.DataFrame
    """check, found, allowed, passed."""
    answers: pd.DataFrame
    """Greedy answers of the unmerged and the merged model."""


def merge_and_verify(settings, plan, model_path: Path, quantised: set[str], template, held_out, after_loss: float):
    """Merges the adapter into each base the settings ask for, keeps the better one and proves it.

    model_path: folder of the base (`bases.locate`); quantised: names of the weights that were trained in 4 bits
    (`merging.quantised_names`); after_loss: held-out loss of the trained model. The trainer's model must have been
    freed. Raises ValueError with what differed.
    """
    weights = Weights(model_path)
    adapter = merging.read_adapter(settings.folders.adapter)
    candidates = list(BASES) if settings.merge_base == "best" else [settings.merge_base]
    candidates = candidates if quantised else ["original"]
    losses: dict[str, float] = {}
    for base in candidates:
        merge = _merge(settings, plan, base)
        folder = settings.folders.merged / base
        merging.remove(folder)
        merging.write_merged(merge, weights, adapter, quantised, folder)
        merging.write_companions(folder, weights.folder, template, merge.save_dtype)
        losses[base] = _loss(folder, merge, held_out, template)
        worse = [b for b in losses if losses[b] > min(losses.values())]
        for b in worse:
            merging.remove(settings.folders.merged / b)
    best = min(losses, key=losses.get)
    return _prove(_merge(settings, plan, best), weights, adapter, quantised, template, held_out, after_loss, losses)


def _merge(settings, plan, base: str) -> Merge:
    return Merge(base, settings, plan.dtype, plan.save_dtype, plan.device)


def _loss(folder: Path, merge: Merge, held_out, template) -> float:
    model = models.load_strict(folder, merge.save_dtype, merge.device)
    loss = scoreboard.held_out_loss(model, held_out, template)
    del model
    hardware.free_memory()
    return loss


def _prove(merge, weights, adapter, quantised, template, held_out, after_loss, losses) -> Merged:
    folder = merge.settings.folders.merged / merge.base
    shown = held_out[:PROMPTS]
    limit = merge.settings.max_new_tokens
    changed = changed_tensors(merge, weights, Weights(folder), quantised)
    unmerged = unmerged_model(merge, weights, quantised)
    expected = logits(unmerged, shown)
    expected_answers = scoreboard.answers(unmerged, shown, template, limit)
    del unmerged
    hardware.free_memory()
    model = models.load_strict(folder, merge.save_dtype, merge.device)
    found = logits(model, shown)
    found_answers = scoreboard.answers(model, shown, template, limit)
    del model
    hardware.free_memory()
    table = verification_table(changed, set(adapter.factors), expected, found, merge, losses[merge.base], after_loss)
    answers = pd.DataFrame(
        {
            "prompt": [row["pair"]["prompt"] for row in shown],
            "unmerged": [reply.text for reply in expected_answers],
            "merged": [reply.text for reply in found_answers],
        }
    )
    if not table.passed.all():
        raise ValueError(
            f"the merged model in {folder} is not the trained one, so nothing is published:\n"
            f"{table[~table.passed].to_string(index=False)}\n"
            "The adapter and the checkpoints are untouched; run the cell again, or set merge_base to the other base"
        )
    return Merged(folder, merge.base, losses, table, answers)


def verification_table(changed, intended, expected, found, merge: Merge, loss, after_loss) -> pd.DataFrame:
    """Each check with what was found, what is allowed, and whether it holds. NaN never passes."""
    difference = relative_difference(expected, found)
    tolerance = logit_tolerance(merge.save_dtype, len(intended))
    extra, missing = sorted(changed - intended), sorted(intended - changed)
    rows = [
        ("intended tensors changed", f"{len(intended & changed)} of {len(intended)}", "all", not missing),
        ("other tensors changed", ", ".join(extra[:3]) or "none", "none", not extra),
        ("keys missing or unexpected on reload", "none", "none", True),
        ("logits, relative difference", f"{difference:.2e}", f"{tolerance:.2e}", bool(difference <= tolerance)),
        (
            "held-out loss over the trained model's",
            f"{loss:.4f} / {after_loss:.4f} = {loss / after_loss:.4f}",
            f"{LOSS_TOLERANCE:g}",
            bool(loss <= after_loss * LOSS_TOLERANCE),
        ),
    ]
    return pd.DataFrame(rows, columns=["check", "found", "allowed", "passed"])


def logit_tolerance(dtype: torch.dtype, tensors: int) -> float:
    """The relative difference of logits that rounding may leave: half a step of `dtype` for each changed tensor.

    Roundings are independent, so they add up like a random walk: 2^-(mantissa + 1) · √tensors.
    """
    return 2.0 ** -(merging.MANTISSA_BITS[dtype] + 1) * tensors**0.5


def changed_tensors(merge: Merge, weights: Weights, merged: Weights, quantised: set[str]) -> set[str]:
    """Names of the tensors that differ from the base, as read back from disk. Raises ValueError for other names."""
    if set(weights.names()) != set(merged.names()):
        raise ValueError(
            f"{merged.folder} holds other tensors than its base:"
            f" {sorted(set(weights.names()) ^ set(merged.names()))[:5]}"
        )
    return {name for name in merged.names() if not _same(merge, weights, merged, quantised, name)}


def _same(merge, weights, merged, quantised, name) -> bool:
    before = merge.start(weights, name, quantised).to(merge.save_dtype).cpu()
    return torch.equal(before, merged.read(name))


def unmerged_model(merge: Merge, weights: Weights, quantised: set[str]):
    """The same 16-bit base with the adapter beside it, as PEFT runs it."""
    from peft import PeftModel

    model = models.load_strict(weights.folder, merge.save_dtype, merge.device)
    if merge.base == "dequantized":
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in quantised:
                parameters[name].copy_(merge.start(weights, name, quantised))
    return PeftModel.from_pretrained(model, merge.settings.folders.adapter).eval()


def logits(model, held_out: list[dict]) -> list[torch.Tensor]:
    """Logits (T, V) of each row in float32 on the CPU."""
    device = next(model.parameters()).device
    with mode.evaluating(model):
        return [
            model(input_ids=torch.tensor([row["input_ids"]], device=device), use_cache=False).logits[0].float().cpu()
            for row in held_out
        ]


def relative_difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all logits together."""
    a, b = torch.cat(expected), torch.cat(found)
    return float((a - b).norm() / a.norm())
