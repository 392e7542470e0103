"""What a search came to: its combinations, the best first, with 95% intervals."""

from dataclasses import dataclass

import pandas as pd

from llm_finetuning.evaluation import intervals
from llm_finetuning.evaluation.intervals import Sample


@dataclass(frozen=True)
class Row:
    """A combination of values and what its trainings came to, by seed; None where the loss was not finite."""

    values: dict[str, str]
    losses: dict[int, Sample | None]

    @property
    def named(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.values.items())

    @property
    def finite(self) -> bool:
        return bool(self.losses) and None not in self.losses.values()

    def pooled(self, seeds: list[int]) -> Sample:
        """The loss over these seeds together. Its units are the held-out pairs: more seeds are not more pairs."""
        values = zip(*(self.losses[seed].values for seed in seeds), strict=True)
        weights = zip(*(self.losses[seed].weights for seed in seeds), strict=True)
        return Sample(list(map(sum, values)), list(map(sum, weights)))


def _ranked(rows: list[Row]) -> list[Row]:
    """The best first: complete ones by their loss, then those that were pruned, then those that are not finite."""
    most = max(len(row.losses) for row in rows)
    complete = [row for row in rows if row.finite and len(row.losses) == most]
    pruned = [row for row in rows if row.finite and len(row.losses) < most]
    return [*sorted(complete, key=_loss), *sorted(pruned, key=_loss), *(row for row in rows if not row.finite)]


def _loss(row: Row) -> float:
    return row.pooled(list(row.losses)).value


def difference(best: Row, row: Row) -> dict:
    """A combination's loss less the best one's over the seeds that both have, by a bootstrap over the pairs."""
    seeds = [seed for seed in row.losses if seed in best.losses]
    found = intervals.difference(best.pooled(seeds), row.pooled(seeds))
    worse = sum(row.losses[seed].value > best.losses[seed].value for seed in seeds)
    return found | {"seeds": len(seeds), "worse": worse}


def record(rows: list[Row]) -> list[dict]:
    """search.json: each combination's values, loss, losses by seed and difference to the best, the best first."""
    best, *others = _ranked(rows)
    return [
        {
            "values": row.values,
            "loss": row.pooled(list(row.losses)).figure() if row.finite else None,
            "by seed": {seed: None if sample is None else sample.value for seed, sample in row.losses.items()},
            "difference": difference(best, row) if row.finite and row in others else None,
        }
        for row in [best, *others]
    ]


def table(rows: list[Row]) -> pd.DataFrame:
    """Each combination, the best first: its held-out loss, its difference to the best, and their 95% intervals."""
    lines = []
    for each in record(rows):
        loss, found = each["loss"], each["difference"]
        lines.append(
            each["values"]
            | {
                "held-out loss": intervals.shown(loss) if loss else "not finite",
                "seeds": len(each["by seed"]),
                "less the best": intervals.shown(found) if found else "",
                "worse with": f"{found['worse']} of {found['seeds']} seeds" if found else "",
                "": _told_apart(found) if found else "",
            }
        )
    return pd.DataFrame(lines)


def _told_apart(found: dict) -> str:
    return "worse" if intervals.is_apart(found) and found["value"] > 0 else "no difference shown"


def verdict(rows: list[Row]) -> str:
    """The best combination, and whether its difference to the next one excludes zero."""
    best, *others = _ranked(rows)
    if not best.finite:
        return "the loss was finite nowhere: lower learning_rate"
    said = f"best: {best.named}"
    if not others or not others[0].finite:
        return said
    found = difference(best, others[0])
    return f"{said}; the loss of the next one less its own: {intervals.against_zero(found)}"
