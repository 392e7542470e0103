"""Puts a model into evaluation and back, and says what did not fit into the memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from llm_finetuning import models

NO_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What libraries beside torch's allocator say of a full GPU."""


@contextmanager
def within_memory(said: Callable[[], str]) -> Iterator[None]:
    """Raises MemoryError where the GPU runs out of memory in the block; as a decorator, in the function.

    said: its sentence, asked for afterwards. The innermost of such blocks is the one that speaks.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in NO_MEMORY):
            raise
        raise MemoryError(said()) from error


def while_measuring() -> str:
    """The sentence for a measurement outside of training."""
    return (
        "the GPU ran out of memory while the model was measured: end what else uses it (in Colab Runtime > Restart"
        " session, then run all cells again), or lower eval_answers or max_new_tokens, before the training also"
        " max_seq_length"
    )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Runs the block in evaluation mode, with attention for padded batches; the mode before is restored."""
    was_training = model.training
    model.eval()
    try:
        with attention_for(model), torch.no_grad(), uncompiled(model):
            yield model
    finally:
        model.train(was_training)


@contextmanager
def attention_for(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Runs the block with the attention for padded batches and generation."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(models.padded_attention(base.config))
    try:
        yield model
    finally:
        base.set_attn_implementation(before)


def uncompiled(model: torch.nn.Module) -> AbstractContextManager:
    """Runs compiled layers eagerly: each length of an answer would be compiled anew, until torch's limit is reached."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
