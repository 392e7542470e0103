"""Engines: what computes the logits. The interface is described in `generation`."""

import torch


class TorchEngine:
    """A transformers model on a GPU or CPU, in whatever precision it was loaded."""

    max_rows = 64
    """Rows computed side by side, at most."""

    def __init__(self, model, name: str = "torch"):
        self.model = model.eval()
        self.name = name

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.max_position_embeddings

    @property
    def vocabulary_rows(self) -> int:
        return self.model.config.vocab_size

    def session(self, rows: list[list[int]]) -> "TorchSession":
        return TorchSession(self.model, rows)


class TorchSession:
    """Rows of one batch, padded on the left, and their keys and values so far."""

    def __init__(self, model, rows: list[list[int]]):
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.config)
        ids, mask = pad_left(rows)
        self.mask = None if mask is None else mask.to(model.device)
        self._forward(ids.to(model.device))

    def push(self, ids: list[int]) -> None:
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self._forward(torch.tensor(ids, device=self.model.device)[:, None])

    def keep(self, indices: list[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(indices, device=self.model.device))
        if self.mask is not None:
            self.mask = self.mask[indices]

    def close(self) -> None:
        """Nothing to give back."""

    def _forward(self, ids: torch.Tensor) -> None:
        """Feeds ids (B, T); leaves `logits` (B, V) of the last position."""
        padded = {}
        if self.mask is not None:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            padded = {"attention_mask": self.mask, "position_ids": positions}
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **padded)
        self.logits = output.logits[:, -1]


def pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids, mask), both (B, T); the mask is 0 on padding, and None where no row needs any."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    if all(len(row) == longest for row in rows):
        return ids, None
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
