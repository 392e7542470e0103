"""A training step at a model's true size that takes no memory: fake tensors have a shape, a dtype and no contents.

The modules, the adapters, TRL's head and autograd are the real ones; every storage that an operator makes is counted
while it lives, every matrix product when it is called. On a machine without a GPU the operators are told to do what
they do on one (`monkeypatch`).
"""

import math
import weakref

import bitsandbytes as bnb
import torch
import trl.kernels.chunked_logprob as head
import trl.trainer.utils as trl_utils
from bitsandbytes import functional as quantizing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from llm_finetuning import models
from llm_finetuning.training import activations, attention, qlora

BLOCK = 512
"""Bytes to which torch's CUDA allocator rounds up."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were at any time."""

    def __init__(self):
        super().__init__()
        self.storages: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage) -> None:
        if storage._cdata not in self.storages:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.storages.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, storage: int, size: int) -> None:
        self.storages.remove(storage)
        self.now -= size


def peak_bytes(chosen, plan, config, monkeypatch) -> int:
    """The most that is alive in a step of `plan`, weights, gradients and the optimizer's moments included."""
    model = without_weights(chosen, plan, config, monkeypatch)
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        give_weights(model, plan)
        trained = [p for p in model.parameters() if p.requires_grad]
        moments = [torch.zeros(p.shape) for p in trained for _ in range(2)]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        step(model, plan)
    del moments
    return live.peak


def matrix_operations(chosen, plan, config, monkeypatch) -> int:
    """Operations of all matrix products in one step of `plan`, as torch counts them; attention's own are left out."""
    model = without_weights(chosen, plan, config, monkeypatch)
    uncounted = {torch.ops.bitsandbytes.gemm_4bit: _gemm_operations, torch.ops.aten.addmm_: _addmm_operations}
    counter = FlopCounterMode(display=False, custom_mapping=uncounted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_weights(model, plan)
        with counter:
            step(model, plan)
    counted = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counted.items() if "attn" not in str(operator))


class MovedBytes(TorchDispatchMode):
    """Bytes that all operators read and write, those that only look at a storage in another way left out."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view and not any(part in str(operator) for part in ("empty", "_view", "prim.")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return out


def moved_bytes(chosen, plan, config, monkeypatch) -> int:
    """Bytes that the operators of one step of `plan` read and write."""
    model = without_weights(chosen, plan, config, monkeypatch)
    moved = MovedBytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_weights(model, plan)
        with moved:
            step(model, plan)
    return moved.bytes


def _gemm_operations(values, packed, weight_shape, *others, out_shape=None, **more) -> int:
    rows, (out, inner) = math.prod(values[:-1]), weight_shape
    return 2 * rows * out * inner


def _addmm_operations(into, left, right, *others, out_shape=None, **more) -> int:
    (rows, inner), (_, out) = left, right
    return 2 * rows * out * inner


def without_weights(chosen, plan, config, monkeypatch):
    """The model with 4-bit layers where the plan has them, TRL's head and adapters, on the meta device."""
    if plan.attention == attention.NAME:
        attention.register()
    if plan.machine.on_gpu:
        as_on_a_gpu(monkeypatch)
    monkeypatch.setitem(quantizing.name2qmap, "dynamic", quantizing.create_dynamic_map())
    config = models.one_kernel_gelu(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=plan.dtype, attn_implementation=plan.attention)
        if plan.four_bit:
            model = replace_with_bnb_linear(model, ["lm_head"], qlora.quantization(chosen, plan))
    model.is_loaded_in_4bit = model.is_quantized = plan.four_bit
    for module in four_bit_layers(model):
        module.weight.quant_type, module.weight.compress_statistics = "nf4", True
    trl_utils.add_fused_lm_head(model)
    model = qlora.add_adapters(model, chosen).train()
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def four_bit_layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def give_weights(model, plan) -> None:
    """Puts fake tensors in the place of all parameters and buffers, and quantises the 4-bit layers."""
    qlora.prepare_cpu_kernels(model)
    packed = {id(module.weight) for module in four_bit_layers(model)}
    given = {}
    for old in model.parameters():  # each once: a head that is tied to the embeddings stays so
        if id(old) not in packed:
            dtype = torch.float32 if old.requires_grad else plan.dtype
            given[old] = torch.nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old in given:
                module._parameters[name] = given[old]
        for name, old in list(module._buffers.items()):
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    for module in four_bit_layers(model):
        whole = torch.empty(module.out_features, module.in_features, dtype=plan.dtype)
        values, state = quantizing.quantize_4bit(whole, quant_type="nf4", compress_statistics=True)
        weight = torch.nn.Parameter(values, requires_grad=False)
        weight.quant_state = module.quant_state = state
        weight.bnb_quantized = True
        module._parameters["weight"] = weight


def step(model, plan) -> None:
    """Forward and backward of one packed micro-batch, as `AssistantTrainer.compute_loss` calls the model."""
    tokens = plan.micro_batch_tokens
    ids, positions = torch.zeros(2, 1, tokens, dtype=torch.long)
    packed = {}
    if plan.attention == attention.NAME:
        borders = torch.zeros(1 + tokens // 512, dtype=torch.int32)
        packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 512, "max_length_k": 512}
    out = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False, fused_lm_head=True, **packed)
    (-out.log_probs.sum() / tokens).backward()


class InPlace:
    """Stands for a Triton kernel, which writes into what it is given and allocates nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)


def as_on_a_gpu(monkeypatch) -> None:
    """The fused operators of a GPU: dropout, attention under a mask, and the head's kernels."""
    monkeypatch.setattr(functional, "dropout", activations.fused_dropout)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", _efficient_attention)
    monkeypatch.setattr(head, "_use_triton", lambda device: True)
    monkeypatch.setattr(head, "_addmm_fp32", lambda into, a, b: None)
    for name in ("_forward_kernel", "_backward_kernel", "triton"):
        monkeypatch.setattr(head, name, InPlace(), raising=False)


def _efficient_attention(query, key, value, attn_mask=None, is_causal=False, scale=None, **others):
    if attn_mask is not None:  # sdpa makes numbers of booleans
        shape = (*query.shape[:2], *attn_mask.shape[-2:])
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype).expand(shape)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, 0.0, is_causal, scale=scale)[0]
