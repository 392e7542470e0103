"""A model in 4-bit NF4 for a CPU with AVX512-BF16, quantised tensor by tensor, so that loading needs little memory.

bitsandbytes itself loads the 16-bit model first (11 GB for Phi-2). Here each weight is read, quantised and put into
the order that bitsandbytes' kernel reads; the packed weights can be cached on disk and are then read in seconds.
That kernel is quick for one token, and takes as long again for each further one: where memory allows, each layer has
its weight in int8 as well, for the prefill.
"""

from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from llm_finetuning.files.atomic import writing
from llm_finetuning.files.shards import Weights
from llm_finetuning.inference import int8
from llm_finetuning.inference.int8 import Int8Linear
from llm_finetuning.models import padded_attention

BLOCK = 64
"""Weights that share a scale (arXiv 2305.14314, section 3)."""
ROWS = 32
"""Output features that the kernel computes together."""


def available() -> bool:
    """Whether this machine has the kernel: bitsandbytes on a CPU with AVX512-BF16."""
    try:
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        return False
    return bool(has_avx512bf16()) and not torch.cuda.is_available()


class PackedLinear(nn.Module):
    """A linear layer whose weight (N, K) is NF4: `packed` (N, K/2) uint8, `scales` (K/64, N) bfloat16.

    int8_prefill: hold the weight in int8 as well (`prefill`), which computes many tokens at once.
    """

    def __init__(self, out_features: int, in_features: int, bias: bool, int8_prefill: bool = False):
        super().__init__()
        self.shape = (out_features, in_features)
        with torch.device("meta"):
            self.register_buffer("packed", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
            self.register_buffer("scales", torch.empty(in_features // BLOCK, out_features, dtype=torch.bfloat16))
            self.register_buffer("bias", torch.empty(out_features, dtype=torch.bfloat16) if bias else None)
        self.code = code()
        self.prefill = Int8Linear(out_features, in_features, bias=False) if int8_prefill else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.prefill is not None and x.numel() >= int8.MANY * x.shape[-1]:
            y = self.prefill(x)
        else:
            y = torch.ops.bitsandbytes.gemv_4bit.default(x, self.packed, self.shape, self.scales, self.code, BLOCK)
        return y if self.bias is None else y.add_(self.bias)


def code() -> torch.Tensor:
    """Returns the sixteen values of NF4, ascending from -1 to 1."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu")


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a weight (N, K) to NF4; returns (packed, scales) as `PackedLinear` holds them."""
    values = code()
    bounds = ((values[1:] + values[:-1]) / 2).tolist()
    parts = [_pack_rows(rows.float(), bounds) for rows in weight.split(int8.CHUNK)]
    return torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts], dim=1).contiguous()


def _pack_rows(weight: torch.Tensor, bounds: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs rows, a multiple of 32, in the order of bitsandbytes.functional._convert_weight_packed_for_cpu."""
    rows, columns = weight.shape
    blocks = weight.view(rows, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(-1).to(torch.bfloat16)
    relative = blocks / scales.float().clamp(min=1e-30)[..., None]
    indices = torch.zeros(relative.shape, dtype=torch.uint8)
    for bound in bounds:
        indices += relative > bound
    pairs = indices.view(rows // ROWS, ROWS, columns // 2, 2).transpose(1, 2).reshape(-1, 2 * ROWS)
    packed = (pairs[:, ROWS:] << 4) | pairs[:, :ROWS]
    return packed.reshape(rows, columns // 2), scales.T


def convert(model: "transformers.PreTrainedModel", int8_prefill: bool = False) -> "transformers.PreTrainedModel":
    """Packs the linear layers of a model in memory whose shape the kernel takes, and its head in int8."""
    tensors = dict(model.state_dict())
    _replace_linears(model, int8_prefill)
    for name, tensor in tensors.items():
        _place(model, name, tensor)
    return model


def load(
    folder: Path,
    config: "transformers.PreTrainedConfig",
    packed_file: Path | None,
    int8_prefill: bool,
) -> "transformers.PreTrainedModel":
    """Loads the model of a folder in NF4. packed_file: caches the packed weights; written unless it is there."""
    model = empty_model(config, torch.bfloat16)
    _replace_linears(model, int8_prefill)
    if packed_file is not None and packed_file.is_file():
        _read_packed(model, packed_file)
    else:
        for name, tensor in Weights(folder):
            _place(model, name, tensor)
        if packed_file is not None:
            _write_packed(model, packed_file)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if missing:
        raise ValueError(f"{folder} lacks the weights {', '.join(missing[:5])}: publish it again")
    return model.eval()


def empty_model(config: "transformers.PreTrainedConfig", dtype: torch.dtype) -> "transformers.PreTrainedModel":
    """Makes the model of a configuration without its weights, which take no memory yet."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=padded_attention(config)
        )


def _replace_linears(model: nn.Module, int8_prefill: bool) -> None:
    packed = partial(PackedLinear, int8_prefill=int8_prefill)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        if module is head:
            new = None if model.config.tie_word_embeddings or columns % int8.COLUMNS else Int8Linear
        else:
            new = packed if rows % ROWS == 0 and columns % BLOCK == 0 else None
        if new is not None:
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, new(rows, columns, module.bias is not None))


def _place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a stored tensor into the model, and packs it where its layer is a packed one."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last == "weight" and isinstance(module, PackedLinear):
        module.packed, module.scales = pack(tensor)
        if module.prefill is not None:
            module.prefill.packed, module.prefill.scales = int8.quantise(tensor)
    elif last == "weight" and isinstance(module, Int8Linear):
        module.packed, module.scales = int8.quantise(tensor)
    else:
        _set(module, last, tensor.to(torch.bfloat16).clone())


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor, requires_grad=False) if name in module._parameters else tensor)


def _write_packed(model: nn.Module, path: Path) -> None:
    """Writes the packed weights to the user's cache; where that cannot be written, the next start packs them again."""
    tensors = {n: t for n, t in model.state_dict().items() if t.device.type != "meta"}
    try:
        with writing(path, shared=True) as unfinished:
            save_file(tensors, unfinished)
    except (OSError, SafetensorError) as error:
        print(f"{path} cannot be written ({error}): the weights are packed again next time.")


def _read_packed(model: nn.Module, path: Path) -> None:
    """Copies the packed weights out of their file; its mapped tensors are not aligned, and decode half as fast."""
    for name, tensor in Weights(path.parent, path.name):
        parent, _, last = name.rpartition(".")
        _set(model.get_submodule(parent), last, tensor.clone())
