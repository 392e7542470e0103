"""Engines: what computes the logits. The interface is described in `generation`."""

import torch


class TorchEngine:
    """A transformers model on a GPU or CPU, in whatever precision it was loaded."""

    max_batch_size = 64
    """Rows computed side by side, at most."""

    def __init__(self, model, name: str = "torch"):
        self.model = model.eval()
        self.name = name
        self.kept: tuple[list[int], object] | None = None
        """Ids and cache of the last single row: the next turn of a conversation begins with the same ids."""

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.max_position_embeddings

    @property
    def vocabulary_rows(self) -> int:
        return self.model.config.vocab_size

    def session(self, rows: list[list[int]]) -> "TorchSession":
        return TorchSession(self, rows)

    def take_cache(self, row: list[int]):
        """(cache, how many ids of the row it holds already): of the last row as far as the two agree, or empty."""
        from transformers import DynamicCache

        kept, self.kept = self.kept, None
        known = common_prefix(kept[0], row[:-1]) if kept else 0
        if not known:
            return DynamicCache(config=self.model.config), 0
        if known < len(kept[0]):
            kept[1].crop(known - len(kept[0]))  # negative: so many tokens are taken off the end
        return kept[1], known


class TorchSession:
    """Rows of one batch, padded on the left, and their keys and values so far."""

    def __init__(self, engine: TorchEngine, rows: list[list[int]]):
        self.engine, self.model = engine, engine.model
        ids, mask = pad_left(rows)
        self.mask = None if mask is None else mask.to(self.model.device)
        self.row = list(rows[0]) if len(rows) == 1 else None
        self.cache, known = engine.take_cache(self.row or [])
        self._forward(ids[:, known:].to(self.model.device))

    def push(self, ids: list[int]) -> None:
        if self.row is not None:
            self.row += ids
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self._forward(torch.tensor(ids, device=self.model.device)[:, None])

    def keep(self, indices: list[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(indices, device=self.model.device))
        if self.mask is not None:
            self.mask = self.mask[indices]

    def close(self) -> None:
        """Leaves a single row's cache to the next session."""
        if self.row is not None:
            self.engine.kept = (self.row, self.cache)

    def _forward(self, ids: torch.Tensor) -> None:
        """Feeds ids (B, T); leaves `logits` (B, V) of the last position."""
        padded = {}
        if self.mask is not None:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            padded = {"attention_mask": self.mask, "position_ids": positions}
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **padded)
        self.logits = output.logits[:, -1]


def common_prefix(first: list[int], second: list[int]) -> int:
    """How many ids two rows begin with in common."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids, mask), both (B, T); the mask is 0 on padding, and None where no row needs any."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    if all(len(row) == longest for row in rows):
        return ids, None
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
