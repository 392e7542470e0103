"""Runs one of llama.cpp's converters, with a vocabulary read from the structure of tokenizer.json. A script of its own.

    python gguf_vocabulary.py path/to/convert_hf_to_gguf.py MODEL --outfile FILE …

The converter knows byte-level tokenizers by a hash of what they return, which names those of published models only, and
SentencePiece-like ones by a `tokenizer.model`, which tokenizer.json alone does not have. Here both come from
tokenizer.json. Whether llama.cpp then tokenizes alike is proved afterwards, by `gguf_checks.compare_tokens`.
"""

import json
import re
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

SPLITS = {
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "dbrx",
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
}
"""llama.cpp's name of the pre-tokenizer that splits by this pattern, after English contractions."""
CONTRACTIONS = re.compile(r"^\(\?(i:'s\|'t\||:'\[sS\]\|'\[tT\]\|)[^)]*\)\|")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens (gguf.TokenType)."""


def pre_tokenizer(tokenizer: dict) -> str | None:
    """Returns llama.cpp's name of a byte-level tokenizer.json's pre-tokenizer; None for one that is not known."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in steps):
        return None
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if not patterns:
        digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps)
        return "starcoder" if digits else "gpt-2"
    name = SPLITS.get(CONTRACTIONS.sub("", patterns[0])) if len(patterns) == 1 else None
    return "llama-bpe" if name == "dbrx" and tokenizer["model"].get("ignore_merges") else name


def _steps(part: dict | None, name: str) -> list[dict]:
    """The parts of a normalizer or pre-tokenizer, in order, whether it is a sequence or not."""
    if part is None:
        return []
    return part[name] if part["type"] == "Sequence" else [part]


def is_sentencepiece_like(tokenizer: dict) -> bool:
    """Whether words begin with U+2581 and unknown characters fall back to bytes, as in a SentencePiece model."""
    return tokenizer["model"].get("type") == "BPE" and bool(tokenizer["model"].get("byte_fallback"))


def adds_space(tokenizer: dict) -> bool:
    """Whether a text gets a blank before its first word."""
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    words = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    scheme = next((step.get("prepend_scheme", "always") for step in words if step["type"] == "Metaspace"), "never")
    return any(step["type"] == "Prepend" for step in normalizers) or scheme != "never"


def adds_bos(tokenizer: dict) -> bool:
    """Whether a text begins with a special token; where a file does not say it, llama.cpp adds BOS to some."""
    steps = _steps(tokenizer.get("post_processor"), "processors")
    return any(step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0] for step in steps)


def pieces(tokenizer: dict, rows: int) -> tuple[list[bytes], list[float], list[int]]:
    """Returns text, score and kind of each of the model's `rows` tokens, from a SentencePiece-like tokenizer.json.

    SentencePiece merges the pair with the best score, BPE the one that stands first among its merges.
    """
    model = tokenizer["model"]
    tokens = [f"[PAD{i}]".encode() for i in range(rows)]
    scores, kinds = [-10000.0] * rows, [UNUSED] * rows
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    for text, i in model["vocab"].items():
        byte = re.fullmatch("<0x[0-9A-F]{2}>", text)
        tokens[i], scores[i] = text.encode(), -float(ranks.get(text, len(ranks)))
        kinds[i] = BYTE if byte else UNKNOWN if text == model.get("unk_token") else NORMAL
    for added in tokenizer.get("added_tokens", []):
        i, text = added["id"], added["content"]
        if kinds[i] == UNKNOWN:
            continue
        # llama.cpp looks for these in the text as it was typed.
        tokens[i], scores[i] = text.replace("▁", " ").encode(), -1000.0
        kinds[i] = CONTROL if added["special"] else USER_DEFINED
    return tokens, scores, kinds


@cache
def _content(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"model": {}}


def teach(text_model: Any) -> None:
    """Replaces how llama.cpp's converter finds a vocabulary, where tokenizer.json says it."""
    from_model, from_bytes = text_model._create_vocab_sentencepiece, text_model._set_vocab_gpt2
    write, by_hash = text_model._set_vocab_sentencepiece, text_model.get_vocab_base_pre

    def read(self: Any) -> dict:
        return _content(self.dir_model / "tokenizer.json")

    def create(self: Any) -> tuple:
        rows = self.hparams.get("vocab_size") or self.find_hparam(["vocab_size"])
        return pieces(read(self), rows) if is_sentencepiece_like(read(self)) else from_model(self)

    def write_sentencepiece(self: Any, *arguments: Any, **named: Any) -> None:
        write(self, *arguments, **named)
        if is_sentencepiece_like(read(self)):
            self.gguf_writer.add_add_space_prefix(adds_space(read(self)))
            self.gguf_writer.add_add_bos_token(adds_bos(read(self)))

    def write_bytes(self: Any) -> None:
        return self._set_vocab_sentencepiece() if is_sentencepiece_like(read(self)) else from_bytes(self)

    def name(self: Any, tokenizer: Any) -> str:
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            if found := pre_tokenizer(read(self)):
                return found
            raise

    text_model._create_vocab_sentencepiece, text_model._set_vocab_gpt2 = create, write_bytes
    text_model._set_vocab_sentencepiece, text_model.get_vocab_base_pre = write_sentencepiece, name


if __name__ == "__main__":
    script = Path(sys.argv[1])
    sys.path[:1] = [str(script.parent), str(script.parent / "gguf-py")]  # in place of this file's folder
    sys.argv = sys.argv[1:]
    from conversion.base import TextModel

    teach(TextModel)
    runpy.run_path(str(script), run_name="__main__")
