"""Puts a model into evaluation and back."""

from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def evaluating(model):
    """Evaluation mode with sdpa attention and the cache allowed; training mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with attention_for(model, "sdpa"), torch.no_grad(), _uncompiled(model):
            yield model
    finally:
        model.train(was_training)


@contextmanager
def attention_for(model, implementation: str):
    """Runs the block with another attention, such as sdpa for padded batches and generation."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(implementation)
    try:
        yield model
    finally:
        base.set_attn_implementation(before)


def _uncompiled(model):
    """Compiled layers run as they are: each length of an answer would take one of the few graphs that they may have."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
