"""The funnel counts what each step of the preparation kept and dropped, and keeps examples of the latter."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice

import pandas as pd

UNITS = ("tree", "message", "preference pair", "pair")
EXAMPLES = 3
LARGE = 0.3
"""Share of what came to a step from which on its loss is large."""
UNDECIDED = "first where no rank or quality decides"
"""The step at which replies go for their order alone."""
LARGE_OF = {UNDECIDED: 0.02}
"""Where another share than LARGE is worth a sentence: nothing says that what stays is better than what goes."""


class Funnel:
    """Counts per unit ("tree", "message", "pair" or "preference pair"); dropped = kept of the step before - kept.

    examples: step → a few of the texts it dropped, with what they were like where that is why. notes: step → more
    about what it did. cures: step → the parameter that turns it off. without_reply: step → prompts that lost their
    last reply there. replies_left: how many replies the filters left to a prompt → number of such prompts.
    """

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.examples: dict[str, list[dict]] = {}
        self.notes: dict[str, str] = {}
        self.cures: dict[str, str] = {}
        self.without_reply: Counter[str] = Counter()
        self.replies_left: Counter[int] = Counter()

    def step(self, name: str, unit: str, kept: int, cure: str = "", dropped: Iterable[dict] = ()) -> None:
        """Adds a step, with the first few of the records it dropped. The first step of a unit drops nothing."""
        before = [row["kept"] for row in self.rows if row["unit"] == unit]
        self.rows.append({"step": name, "unit": unit, "kept": kept, "dropped": before[-1] - kept if before else 0})
        if examples := list(islice(dropped, EXAMPLES)):
            self.examples[name] = examples
        self.cures |= {name: cure} if cure else {}

    def frame(self) -> pd.DataFrame:
        """Returns the steps as a table with the columns step, unit, kept, dropped; attrs holds what else is known."""
        rows = sorted(self.rows, key=lambda row: UNITS.index(row["unit"]))
        table = pd.DataFrame(rows, columns=["step", "unit", "kept", "dropped"])
        names = ("examples", "notes", "cures", "without_reply", "replies_left")
        table.attrs = {name: dict(getattr(self, name)) for name in names}
        return table


def check_left(funnel: pd.DataFrame) -> None:
    """Raises ValueError that names the step which left nothing, and the parameter that turns it off."""
    empty = funnel[(funnel["unit"] != "preference pair") & (funnel["kept"] == 0)]
    if funnel["kept"].iloc[-1] or not len(empty):
        return
    cures, place = funnel.attrs["cures"], empty.index[0]
    filters = funnel.loc[:place][funnel.loc[:place, "step"].isin(cures) & (funnel.loc[:place, "dropped"] > 0)]
    if empty.loc[place, "step"] in cures or not len(filters):
        row = empty.loc[place]
    else:  # a step that only counts: the filter before it that took most
        row = filters.loc[filters["dropped"].idxmax()]
    loss = f"{row['step']} dropped {row['dropped']:,} of {row['kept'] + row['dropped']:,} {row['unit']}s"
    cure = cures.get(row["step"], "check the source: it has no prompt with a reply")
    raise ValueError(f"nothing is left: {loss}: {cure}")


def large_losses(funnel: pd.DataFrame) -> str:
    """Says which filters took a large share of what came to them, or chose without a reason, with examples."""
    lines = []
    for row in funnel.to_dict("records"):
        came = row["kept"] + row["dropped"]
        large = LARGE_OF.get(row["step"], LARGE)
        if row["step"] in funnel.attrs["cures"] and came and row["dropped"] / came > large:
            cure = funnel.attrs["cures"][row["step"]]
            share = row["dropped"] / came
            lines.append(f"{row['step']} dropped {row['dropped']:,} of {came:,} {row['unit']}s ({share:.0%}); {cure}")
            lines += [f"    {_sentence(example)}" for example in funnel.attrs["examples"].get(row["step"], [])]
    return "\n".join(lines) or f"No filter took more than {LARGE:.0%} of what came to it."


def _sentence(example: dict) -> str:
    return "; ".join(f"{name}: {' '.join(str(text).split())[:100]!r}" for name, text in example.items())
