"""Model families in small: what a configuration needs beside the common sizes, and a base of it with random weights."""

from pathlib import Path

import torch
import transformers
from inference_fixtures import make_tokenizer
from packaging.version import Version
from training_fixtures import save_base

FAMILIES = {
    "llama": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt_neox": {},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 16},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 16},
    "bloom": {},
    "cohere": {"num_key_value_heads": 1},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 32},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16, "n_positions": 256},
    "granitemoe": {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"num_key_value_heads": 1},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 2},
    "olmo2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": {},
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
    "smollm3": {"num_key_value_heads": 1},
    "stablelm": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 1},
    "falcon": {},
    "gpt_oss": {"num_key_value_heads": 1, "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 4},
}


# Falcon isolates them from transformers 5.24 on.
MIX_PACKED_EXAMPLES = ("bloom", "gpt_oss", "opt", *["falcon"] * (Version(transformers.__version__) < Version("5.24")))


def tiny_base_of(family: str, folder: Path, **changed) -> Path:
    """A folder with an untrained model of the family, of two small layers, and a tokenizer with a chat template.

    changed: other entries of its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    entries = {
        "vocab_size": 448,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(family, **entries | FAMILIES.get(family, {}) | changed)
    torch.manual_seed(0)
    return save_base(folder, AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer)
