"""Splits a source without splits of its own by tree: by a hash of the tree's id, the same way in both notebooks."""

import hashlib
from collections.abc import Iterable


def in_split(tree_ids: Iterable[str], split: str, validation_share: float) -> set[str]:
    """Returns the ids of the trees that are in "train" or "validation".

    0 puts everything into training. Any other share gives each side at least one tree: raises ValueError for a
    source with a single one.
    """
    hashes = {tree: int(hashlib.sha256(tree.encode("utf-8")).hexdigest()[:8], 16) for tree in set(tree_ids)}
    if validation_share == 0:
        return set(hashes) if split == "train" else set()
    if len(hashes) == 1:
        raise ValueError(
            f"validation_share = {validation_share}, but the source has a single tree or conversation, which cannot be"
            " split: set validation_share = 0, which puts everything into training"
        )
    by_hash = sorted(hashes, key=lambda tree: (hashes[tree], tree))
    number = sum(value < validation_share * 2**32 for value in hashes.values())
    number = min(max(number, 1), len(by_hash) - 1)
    return set(by_hash[:number] if split == "validation" else by_hash[number:])
