"""The plan of preference tuning: pairs in a micro-batch, their padding, and the reference's log-probabilities."""

import math
from dataclasses import dataclass

import pandas as pd

from llm_finetuning.hardware import readable_seconds
from llm_finetuning.training.planning import EFFICIENCY, Plan, count_steps
from llm_finetuning.training.preference_data import PreferenceData, padded_tokens


@dataclass(frozen=True)
class PreferencePlan(Plan):
    """A plan whose examples are pairs, and whose tokens are those of both responses with their padding."""

    pairs: int = 1
    """Pairs in a micro-batch."""
    padding: float = 0.0
    """Share of the tokens that is padding."""

    @property
    def pairs_per_step(self) -> int:
        """Pairs of an optimizer step over all processes."""
        return self.pairs * self.accumulation * self.processes

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step over all processes, on average."""
        return round(self.tokens / self.examples * self.pairs_per_step)

    @property
    def attended_length(self) -> float:
        """Tokens that attention is computed over: those of one response, not of the pair."""
        return self.tokens / self.examples / 2

    @property
    def reference_seconds(self) -> float:
        """Of the one forward pass that gives the reference's log-probabilities, predicted."""
        flops = 2 * (self.size.multiplied + self.size.adapter)
        return self.tokens * flops / (self.machine.flops * EFFICIENCY * self.processes)

    def table(self) -> pd.DataFrame:
        """What was decided and what it will cost, one line each of at most 50 characters."""
        lines = dict(super().table().itertuples(index=False))
        batches, each = self.accumulation * self.processes, self.tokens / self.examples
        lines |= {
            "an epoch": f"{self.examples:,} pairs × {each:,.0f} tokens on average = {self.tokens:,}",
            "optimizer step": f"{batches} × {self.pairs} = {self.pairs_per_step} pairs, chosen and rejected",
            "padding": f"{self.padding:.1%} of the tokens",
            "reference": f"one forward pass, {readable_seconds(self.reference_seconds)}; then none",
        }
        return pd.DataFrame(lines.items(), columns=["what", "plan"])


def in_pairs(plan: Plan, data: PreferenceData) -> PreferencePlan:
    """The plan with as many pairs in a micro-batch as fit where all are as long as the longest.

    Raises ValueError where the model is sharded: the reference's pass takes it whole.
    """
    settings = plan.settings
    if plan.shards > 1:
        raise ValueError(
            "preference tuning shares its pairs among GPUs, and does not shard the model: start it with torchrun in"
            " place of accelerate launch"
        )
    wanted = math.ceil(settings.pairs_per_step / plan.processes)
    pairs = max(1, min(plan.micro_batch_tokens // max(data.padded), wanted, len(data.pairs)))
    accumulation = max(1, round(wanted / pairs))
    tokens = padded_tokens(data, pairs, settings.seed)
    changed = {
        "accumulation": accumulation,
        "examples": len(data.pairs),
        "tokens": tokens,
        "steps": count_steps(-(-len(data.pairs) // pairs), settings, accumulation * plan.processes),
    }
    return PreferencePlan(**vars(plan) | changed, pairs=pairs, padding=1 - sum(data.lengths) / tokens)
