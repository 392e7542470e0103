"""The funnel counts what each step of the preparation kept and dropped."""

import pandas as pd


class Funnel:
    """Counts per unit ("tree", "message" or "pair"); dropped = kept of the step before minus kept."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def step(self, name: str, unit: str, kept: int) -> None:
        """Adds a step. The first one of a unit drops nothing."""
        before = [row["kept"] for row in self.rows if row["unit"] == unit]
        self.rows.append({"step": name, "unit": unit, "kept": kept, "dropped": before[-1] - kept if before else 0})

    def frame(self) -> pd.DataFrame:
        """Returns the steps as a table with the columns step, unit, kept, dropped."""
        return pd.DataFrame(self.rows, columns=["step", "unit", "kept", "dropped"])
