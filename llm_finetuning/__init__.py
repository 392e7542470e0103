"""Finetune an open model into a chat assistant on OpenAssistant conversations, with 4-bit QLoRA."""

import logging
import warnings

from llm_finetuning import tracebacks

__version__ = "1.0.0"

# Remarks of libraries to one another, which nobody who runs a notebook can act on: transformers 5.23 has renamed a
# setting that TRL 1.16 and PEFT 0.21 still use, and bitsandbytes looks for a kernel package that is optional.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

tracebacks.shorten()
