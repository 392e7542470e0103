"""Finetune an open model into a chat assistant on OpenAssistant conversations, with 4-bit QLoRA."""

__version__ = "1.0.0"
