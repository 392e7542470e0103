"""Packed attention without flash-attn: torch's own variable-length kernel, registered with transformers.

A packed micro-batch is one sequence that holds several conversations. `cu_seq_lens_q` (int32, [documents + 1]) says
where each begins, and no token attends across a border. Needs a GPU of capability 8.0 or later and 16-bit values;
elsewhere, and for padded batches and generation, sdpa does the work.
"""

import inspect
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from llm_finetuning import models
from llm_finetuning.hardware import Machine
from llm_finetuning.settings import Finetuning
from llm_finetuning.training.on_meta import build_on_meta, with_layers

NAME, EAGER = "varlen", "eager"
WIDEST_HEAD, STEP = 256, 8
"""Largest width of a head that the kernel takes, and what each width is a multiple of."""
HARMLESS = {
    *("position_ids", "cache_position", "cu_seq_lens_k", "max_length_k", "seq_idx", "is_causal", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "cache"),
}
"""Arguments of transformers' attention that do not change what this one computes."""


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
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed document, over its last `sliding_window` tokens where a layer has one.

    query: (1, H, T, D), key and value: (1, Hkv, T, D), 16-bit, or cast to it under autocast; returns (1, T, H, D)
    and None. Raises ValueError for a batch that is not packed, and for what the kernel lacks: dropout, soft-capping,
    sinks, and any other argument that could change the result.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ValueError(
            "varlen attention serves packed training batches alone (cu_seq_lens_q is missing): use"
            " evaluation.mode.attention_for(model) around evaluation and generation"
        )
    if dropout:
        raise ValueError(f"varlen attention has no dropout ({dropout}): set attention = 'sdpa'")
    if lacking := [name for name, given in kwargs.items() if given is not None and name not in HARMLESS]:
        raise ValueError(f"varlen attention does not know {', '.join(lacking)} of this model: set attention = 'sdpa'")
    device = query.device.type
    if query.dtype == torch.float32 and torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    key, value = for_every_head(query, key, value)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = causal_varlen(q, k, v, cu_seq_lens_q, int(max_length_q), scaling, sliding_window)
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
    window: int | None = None,
) -> torch.Tensor:
    """q, k: (T, H, D), v: (T, H, Dv) → (T, H, Dv), over documents that end at `cu_seq_lens[1:]`; window: keys seen."""
    from torch.nn.attention.varlen import varlen_attn

    borders = cu_seq_lens.to(device=q.device, dtype=torch.int32)
    scale, width = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    q, k, v = one_width(q, k, v)
    # The output gets the strides of q, whose heads are to lie side by side; k and v may have any but in the last place.
    q, k, v = q.contiguous(), *(x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    lengths = (borders, borders, max_length, max_length)
    return varlen_attn(q, k, v, *lengths, scale=scale, **_causal_window(window))[..., :width]


def one_width(*heads: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values padded with zeros to one width, a multiple of `STEP`, as the kernel asks for.

    Zeros change no score, and only widen the output; multi-head latent attention has narrower values than keys.
    """
    width = -(-max(x.shape[-1] for x in heads) // STEP) * STEP
    return [x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in heads]


@cache  # every layer asks at every step
def _causal_window(window: int | None) -> dict:
    """How this torch spells a causal window: window_size=(keys before, 0), or is_causal in its first releases."""
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" in inspect.signature(varlen_attn).parameters:
        return {"window_size": (-1 if window is None else window - 1, 0)}
    if window is None:
        return {"is_causal": True}
    raise ValueError("this torch's varlen attention has no sliding window: set attention = 'sdpa'")


def choose_attention(settings: Finetuning, machine: Machine, dtype: torch.dtype, config: PretrainedConfig) -> str:
    """Chooses "varlen" where torch's kernel runs on packed sequences, else "sdpa", or "eager" for a model without it.

    config: of the model. Raises ValueError for an attention that the model or the machine does not have.
    """
    wanted, padded = settings.attention, models.padded_attention(config)
    kernel = settings.packing and dtype != torch.float32 and machine.varlen
    # What sdpa cannot serve, sinks and soft-capping, the kernel cannot either.
    possible = kernel and padded == "sdpa" and _is_served(config)
    if wanted == NAME and kernel and not possible or wanted == "sdpa" and padded != "sdpa":
        raise ValueError(f"attention = {wanted!r}: {config.model_type} does not support it; set attention = 'auto'")
    if wanted == NAME and not possible:
        raise ValueError(
            "attention = 'varlen' needs packing = True, 16-bit values and a GPU of capability 8.0 or later:"
            " set attention = 'auto'"
        )
    if wanted == "auto":
        return NAME if possible else padded
    return wanted


def _is_served(config: PretrainedConfig) -> bool:
    """Whether a model hands its attention to what is registered, without dropout, and none of its heads is too wide."""
    model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:  # it is refused when it is built
        return True
    if not model_class._can_set_attn_implementation():  # Falcon's layers have a table of their own
        return False
    layers = config.get_text_config().per_layer_config
    fit = all(_dropout(layer) == 0 and _widest_head(layer) <= WIDEST_HEAD for layer in layers)
    return fit and _hands_on_borders(config)


def _hands_on_borders(config: PretrainedConfig) -> bool:
    """Whether the borders of documents reach a model's attention, which StableLM's layers give no further arguments.

    Tried with one layer on the meta device, which takes no memory; True where it cannot be tried there.
    """
    arrived: list[bool] = []

    def note(
        module: Any, query: torch.Tensor, key: Any, value: torch.Tensor, attention_mask: Any, **given: Any
    ) -> tuple:
        arrived.append(given.get("cu_seq_lens_q") is not None)
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    transformers.AttentionInterface.register("note", note)
    transformers.AttentionMaskInterface.register("note", _no_mask)
    try:
        model = build_on_meta(with_layers(config, 1), torch.bfloat16, "note")
        with torch.device("meta"), torch.no_grad():
            ids, borders = torch.zeros(1, STEP, dtype=torch.long), torch.zeros(2, dtype=torch.int32)
            given = {"cu_seq_lens_q": borders, "max_length_q": STEP, "use_cache": False}
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    except Exception:  # of any library: not every model runs there
        return True
    return all(arrived)


def _dropout(layer: PretrainedConfig) -> float:
    """The largest dropout of a layer's attention weights, by the names that configurations have for it."""
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    places = (layer, getattr(layer, "attn_config", None))
    return max(getattr(place, name, None) or 0 for place in places for name in names)


def _widest_head(layer: PretrainedConfig) -> int:
    """The width of a layer's queries, keys or values in one head; 0 for a layer without attention."""
    latent = sum(getattr(layer, f"qk_{part}_head_dim", None) or 0 for part in ("nope", "rope"))
    given = [getattr(layer, name, None) or 0 for name in ("head_dim", "swa_head_dim", "v_head_dim")]
    heads = getattr(layer, "num_attention_heads", None)
    return max(latent, *given) or (layer.hidden_size // heads if heads else 0)
