"""Where a run's results lie: the layout that all notebooks share."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Folders:
    """The layout of a run's results, the same on Drive and on a local disk."""

    drive: Path
    work: Path
    read_from: Path | None = None
    """The folder of the data, where it is not data/ in `drive`."""

    @classmethod
    def in_one(cls, folder: str) -> "Folders":
        """The layout of a notebook whose work needs no folder of its own."""
        return cls(Path(folder), Path(folder))

    data = property(lambda self: self.read_from or self.drive / "data")
    train_file = property(lambda self: self.data / "finetuning_data_train.jsonl")
    val_file = property(lambda self: self.data / "finetuning_data_val.jsonl")
    train_preferences = property(lambda self: self.data / "preferences_train.jsonl")
    val_preferences = property(lambda self: self.data / "preferences_val.jsonl")
    checkpoints = property(lambda self: self.work / "checkpoints")
    adapter = property(lambda self: self.work / "adapter")
    merged = property(lambda self: self.work / "merged")
    base = property(lambda self: self.data.parent / "base")
    published = property(lambda self: self.drive / "finetuned_phi2")
    preferred = property(lambda self: self.drive / "preferred_phi2")
    figures = property(lambda self: self.drive / "figures")
    settings = property(lambda self: self.drive / "settings.json")
    scoreboard = property(lambda self: self.drive / "scoreboard.json")
    metrics = property(lambda self: self.work / "metrics.jsonl")
    rate_search = property(lambda self: self.drive / "rate_search.json")
    evaluation = property(lambda self: self.drive / "evaluation.json")
    evaluated = property(lambda self: self.drive / "evaluated")
    votes = property(lambda self: self.drive / "votes.jsonl")
    vote_preferences = property(lambda self: self.drive / "votes_preferences.jsonl")
    adapter_zip = property(lambda self: self.drive / f"{self.adapter.name}.zip")
    mirrored = property(lambda self: self.drive / self.checkpoints.name)
    """Where copies of the checkpoints go."""
    published_adapter = property(lambda self: self.drive / self.adapter.name)


class PreferenceFolders(Folders):
    """The same layout for preference tuning, which begins where the finetuning ended and leaves that as it is."""

    checkpoints = property(lambda self: self.work / "preference_checkpoints")
    reference = property(lambda self: self.work / "preference_reference")
    """Pairs as the trainer takes them, and the reference's log-probabilities of them."""
    adapter = property(lambda self: self.work / "preference_adapter")
    merged = property(lambda self: self.work / "preference_merged")
    published = property(lambda self: self.preferred)
    settings = property(lambda self: self.drive / "preference_settings.json")
    scoreboard = property(lambda self: self.drive / "preference_scoreboard.json")
    metrics = property(lambda self: self.work / "preference_metrics.jsonl")
    rate_search = property(lambda self: self.drive / "preference_rate_search.json")
