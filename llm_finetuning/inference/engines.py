"""The engine of transformers models, on a GPU or a CPU; `generation` has the interface of engines."""

import torch
import transformers


class TorchEngine:
    """A transformers model in whatever precision it was loaded."""

    max_batch_size = 64

    def __init__(self, model: "transformers.PreTrainedModel", name: str = "torch"):
        self.model = model.eval()
        self.name = name
        self.context = model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.prefix: tuple[list[int], transformers.DynamicCache] | None = None
        """Ids and cache of the last single sequence: the next turn of a conversation begins with the same ids."""

    def session(self, sequences: list[list[int]]) -> "TorchSession":
        """Raises ValueError for an id without an embedding, which on a GPU would end every later session too."""
        if (largest := max(map(max, sequences))) >= self.vocab_size:
            raise ValueError(f"the tokenizer gives id {largest}, and the model has {self.vocab_size} embeddings")
        return TorchSession(self, sequences)

    def take_cache(self, ids: list[int]) -> "tuple[transformers.DynamicCache, int]":
        """Returns the last sequence's cache, cut to the prefix that it shares with `ids`, and the prefix's length.

        The last id stays outside the prefix, as its logits have to be computed. A cache that has forgotten earlier
        tokens cannot be cut.
        """
        prefix, self.prefix = self.prefix, None
        length = common_prefix(prefix[0], ids[:-1]) if prefix else 0
        beyond = len(prefix[0]) - length if prefix else 0
        if not length or (beyond and not all(map(remembers_all, prefix[1].layers))):
            return transformers.DynamicCache(config=self.model.config), 0
        if beyond:
            prefix[1].crop(-beyond)  # negative: so many tokens are taken off the end
        return prefix[1], length


class TorchSession:
    """The sequences of one batch, padded on the left, and their keys and values so far."""

    def __init__(self, engine: TorchEngine, sequences: list[list[int]]):
        self.engine, self.model = engine, engine.model
        ids, mask = pad_left(sequences)
        self.mask = None if mask is None else mask.to(self.model.device)
        self.single = list(sequences[0]) if len(sequences) == 1 else None
        self.cache, length = engine.take_cache(self.single or [])
        self._forward(ids[:, length:].to(self.model.device))

    def push(self, ids: list[int]) -> None:
        if self.single is not None:
            self.single += ids
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self._forward(torch.tensor(ids, device=self.model.device)[:, None])

    def keep(self, indices: list[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(indices, device=self.model.device))
        if self.mask is not None:
            self.mask = self.mask[indices]

    def close(self) -> None:
        """Hands a single sequence's cache to the next session."""
        if self.single is not None:
            self.engine.prefix = (self.single, self.cache)

    def _forward(self, ids: torch.Tensor) -> None:
        """Feeds ids (B, T); sets `logits` (B, V) of the last position."""
        padded = {}
        if self.mask is not None:
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            padded = {"attention_mask": self.mask, "position_ids": positions}
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **padded)
        self.logits = output.logits[:, -1]


def remembers_all(layer: "transformers.cache_utils.CacheLayerMixin") -> bool:
    """Whether a layer of a cache holds every token: no state that runs along, no window that is full."""
    kinds = transformers.cache_utils
    if isinstance(layer, kinds.DynamicSlidingWindowLayer):
        return type(layer) is kinds.DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window
    return type(layer) is kinds.DynamicLayer


def common_prefix(first: list[int], second: list[int]) -> int:
    """Returns how many ids two sequences begin with in common."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def pad_left(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (ids, attention mask), both (B, T); the mask is None where no sequence needs padding."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    if all(len(s) == longest for s in sequences):
        return ids, None
    return ids, torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
