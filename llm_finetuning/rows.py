"""From pairs to encoded rows, with an account of what became of every pair."""

from dataclasses import dataclass

import pandas as pd

from llm_finetuning import prompts
from llm_finetuning.prompts import Template

CUT_LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True)
class Rows:
    """Encoded pairs: `rows` = [{"input_ids", "labels"}], and what became of the pairs that were read."""

    rows: list[dict]
    read: int
    shortened: int
    dropped: int
    too_long: dict[int, float]
    """Share of the pairs that would not fit, whole, in 512, 1,024 and 2,048 tokens."""

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self.rows]

    @property
    def trained_tokens(self) -> int:
        return sum(label != prompts.IGNORED for row in self.rows for label in row["labels"])

    def table(self) -> pd.DataFrame:
        """What became of the pairs, and how many of their tokens are trained."""
        tokens = sum(self.lengths)
        lines = [
            ("pairs read", f"{self.read:,}"),
            ("oldest turns cut from the history", f"{self.shortened:,}"),
            ("left out: prompt and response alone are too long", f"{self.dropped:,}"),
            ("pairs to train on", f"{len(self.rows):,}"),
            ("tokens", f"{tokens:,}"),
            (
                "trained tokens (answers and their EOS)",
                f"{self.trained_tokens:,} = {self.trained_tokens / tokens:.0%}",
            ),
            *[(f"longer than {cut:,} tokens", f"{share:.1%}") for cut, share in self.too_long.items()],
        ]
        return pd.DataFrame(lines, columns=["what", "count"])


def rows_from(pairs: list[dict], template: Template, max_seq_length: int) -> Rows:
    """Encodes pairs for training: histories cut to fit, responses never.

    Raises ValueError when no pair fits.
    """
    fitted = prompts.fit_all(pairs, template, max_seq_length)
    rows = [fit.row for fit in fitted if fit.row is not None]
    whole = [fit.whole for fit in fitted]
    if not rows:
        raise ValueError(
            f"none of the {len(pairs)} pairs fits in max_seq_length = {max_seq_length} tokens (the shortest has"
            f" {min(whole, default=0)}): raise max_seq_length"
        )
    return Rows(
        rows=rows,
        read=len(pairs),
        shortened=sum(fit.shortened for fit in fitted),
        dropped=len(pairs) - len(rows),
        too_long={cut: sum(n > cut for n in whole) / len(whole) for cut in CUT_LENGTHS},
    )
