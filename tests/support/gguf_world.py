"""Small models of several families as a merge leaves them, and tokenizers, for GGUF files."""

import shutil
from pathlib import Path

import torch
from published_bases import published
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llm_finetuning.files import checksums
from llm_finetuning.inference.llama import LlamaEngine

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPES = {
    "phi": {"hidden_size": 160, "intermediate_size": 640, "partial_rotary_factor": 0.4},
    "llama": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32},
}


def merged(folder: Path, family: str, tokenizer_files: Path, system: str = "Answer in one sentence.") -> Path:
    """A small model of the family as a merge leaves it; its weights are large enough that no two words come close."""
    base = folder.with_name(f"{folder.name}-base")
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_files / name, base)
    bare = AutoTokenizer.from_pretrained(tokenizer_files)
    values = SIZES | SHAPES[family] | {"vocab_size": (len(bare) // 64 + 1) * 64, "max_position_embeddings": 1024}
    ends = {"bos_token_id": bare.bos_token_id, "eos_token_id": bare.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(family, **values, **ends, initializer_range=0.1)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).to(torch.float16).save_pretrained(base)
    checksums.write_checksums(published(base, folder, system, torch.float16))
    return folder


def saved(folder: Path, tokenizer) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece_like(prepend: str) -> PreTrainedTokenizerFast:
    """Words begin with U+2581 and what is unknown falls back to bytes; no tokenizer.model."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend == "always" else replace
    if prepend == "first":
        bpe.normalizer, bpe.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    )
    bpe.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, two by two, in the house by the lake"], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def log_probabilities(file: Path, prompt: list[int], following: list[int]) -> torch.Tensor:
    """llama.cpp's, of what comes after the prompt and after each of the tokens that follow it: (1 + following, V)."""
    engine = LlamaEngine(file, 128, 1)
    session = engine.session([prompt])
    rows = [session.logits[0]]
    for token in following:
        session.push([token])
        rows.append(session.logits[0])
    session.close()
    engine.llama.close()
    return torch.log_softmax(torch.stack(rows), -1)
