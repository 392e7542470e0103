"""The engine of transformers models, on a GPU or a CPU; `generation` has the interface of engines."""

from copy import deepcopy

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
        self.kept: list[tuple[list[int], transformers.DynamicCache]] = []
        """Ids and caches of the last single sequences, the latest first: of a conversation each, with context tokens
        together, or more for the latest alone."""

    def session(self, sequences: list[list[int]]) -> "TorchSession":
        """Raises ValueError for an id without an embedding, which on a GPU would end every later session too."""
        if (largest := max(map(max, sequences))) >= self.vocab_size:
            raise ValueError(f"the tokenizer gives id {largest}, and the model has {self.vocab_size} embeddings")
        return TorchSession(self, sequences)

    def take_cache(self, ids: list[int]) -> "tuple[transformers.DynamicCache, int]":
        """Returns a cache of the longest prefix that `ids` share with a kept sequence, and the prefix's length.

        The last id stays outside the prefix, as its logits have to be computed. A sequence that shares less than its
        half is another conversation with the same system message, and stays kept. A cache that has forgotten earlier
        tokens cannot be cut.
        """
        lengths = [common_prefix(kept, ids[:-1]) for kept, _ in self.kept]
        length = max(lengths, default=0)
        kept, cache = self.kept[lengths.index(length)] if length else ([], None)
        beyond = len(kept) - length
        if not length or (beyond and not all(map(remembers_all, cache.layers))):
            return transformers.DynamicCache(config=self.model.config), 0
        if 2 * length < len(kept):
            cache = deepcopy(cache)
        else:
            self.kept.pop(lengths.index(length))
        if beyond:
            cache.crop(-beyond)  # negative: so many tokens are taken off the end
        return cache, length

    def keep_cache(self, ids: list[int], cache: "transformers.DynamicCache") -> None:
        """Keeps the cache of a sequence for the next turn, and frees those of the oldest that are too many."""
        self.kept.insert(0, (ids, cache))
        while len(self.kept) > 1 and sum(len(kept) for kept, _ in self.kept) > self.context:
            self.kept.pop()


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
        single, self.single = self.single, None  # a step that is interrupted leaves a cache that nobody can use
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self._forward(torch.tensor(ids, device=self.model.device)[:, None])
        self.single = None if single is None else single + ids

    def keep(self, indices: list[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(indices, device=self.model.device))
        if self.mask is not None:
            self.mask = self.mask[indices]

    def close(self) -> None:
        """Hands a single sequence's cache to the session of its conversation's next turn."""
        if self.single is not None:
            self.engine.keep_cache(self.single, self.cache)

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
