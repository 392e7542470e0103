"""Packed attention without flash-attn: torch's own variable-length kernel, registered with transformers.

A packed micro-batch is one sequence that holds several conversations. `cu_seq_lens_q` (int32, [documents + 1]) says
where each begins, and no token attends across a border. Needs a GPU of capability 8.0 or later and 16-bit values;
elsewhere, and for padded batches and generation, sdpa does the work.
"""

from typing import Any

import torch

from llm_finetuning.hardware import Machine

NAME = "varlen"


def register() -> str:
    """Makes `attn_implementation="varlen"` known to transformers; returns that name. Idempotent.

    No mask is built for it: it isolates documents by `cu_seq_lens_q` alone, so a batch without it is refused.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The kernel takes document borders, not a mask."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed document.

    query: (1, H, T, D), key and value: (1, Hkv, T, D), 16-bit, or cast to it under autocast; returns (1, T, H, D)
    and None. Raises ValueError for a batch that is not packed, and for attention dropout, which the kernel lacks.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ValueError(
            "varlen attention serves packed training batches alone (cu_seq_lens_q is missing): use"
            " qlora.attention_for(model, 'sdpa') around evaluation and generation"
        )
    if dropout:
        raise ValueError(f"varlen attention has no dropout ({dropout}): set attention = 'sdpa'")
    device = query.device.type
    if query.dtype == torch.float32 and torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    key, value = for_every_head(query, key, value)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = causal_varlen(q, k, v, cu_seq_lens_q, int(max_length_q), scaling)
    return out.unsqueeze(0), None


def for_every_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (1, Hkv, T, D) repeated to the query's number of heads: (1, H, T, D)."""
    heads = query.shape[1] // key.shape[1]
    return (key, value) if heads == 1 else tuple(x.repeat_interleave(heads, dim=1) for x in (key, value))


def causal_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scale: float | None = None,
) -> torch.Tensor:
    """q, k, v: (T, H, D) → (T, H, D), over documents that end at `cu_seq_lens[1:]`."""
    from torch.nn.attention.varlen import varlen_attn

    borders = cu_seq_lens.to(device=q.device, dtype=torch.int32)
    return varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        borders,
        borders,
        max_length,
        max_length,
        scale=scale,
        **_CAUSAL,
    )


def _causal_argument() -> dict:
    """How this torch spells a causal window: window_size=(-1, 0), or is_causal=True in its first releases."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {}
    parameters = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}


_CAUSAL = _causal_argument()


def choose_attention(wanted: str, machine: Machine, dtype: torch.dtype, packing: bool) -> str:
    """Chooses "varlen" where torch's kernel runs on packed sequences, else "sdpa"; ValueError for what cannot be."""
    possible = packing and dtype != torch.float32 and machine.varlen
    if wanted == "varlen" and not possible:
        raise ValueError(
            "attention = 'varlen' needs packing = True, 16-bit values and a GPU of capability 8.0 or later:"
            " set attention = 'auto'"
        )
    if wanted == "auto":
        return NAME if possible else "sdpa"
    return wanted
