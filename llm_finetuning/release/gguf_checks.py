"""What proves a GGUF file: llama.cpp reads the same tokens, and its logits are those of the merged model."""

import ctypes
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llm_finetuning import models, prompts
from llm_finetuning.files.atomic import write_json
from llm_finetuning.files.shards import stored_bytes
from llm_finetuning.prompts import IGNORE_INDEX, Template
from llm_finetuning.release import llama_cpp_tools

TEXTS = [
    "Hello, world!", "The quick brown fox jumps over the lazy dog.", " leading blank", "trailing blank ",
    "  two  blanks", "\ttab\tand\n\nblank lines\n\n\n", "a\r\nb\rc", "    indented:\n        return x  # code\n",
    "", " ", "\n", "   \n  ",
    "I'll say it's HE'S we've they'RE I'D don't", "3 33 333 3333 33333 1,234,567.89 0x1F 1e-5", "$5 and $10 (50%)",
    "snake_case camelCase kebab-case PascalCase", "https://example.org/a?b=c&d=%20#e", "a@b.example", "!!!???...;:",
    "----====____****", "{\"key\": [1, 2.5, null]}", "<b>bold</b> &amp; <!-- x -->", "```python\nprint('x')\n```",
    "Wie heißt „Zürich“? Straße, Größe.", "Où est l’élève ? « Là-bas »", "¿Qué? ¡Señor!", "Привет, как дела?",
    "你好，世界。这是一个测试", "日本語のテスト、カタカナ", "한국어 문장입니다", "مرحبا بالعالم", "שלום עולם",
    "हिन्दी पाठ", "ภาษาไทย", "Ελληνικά", "😀 👩‍👩‍👧 🇨🇭 ✅", "½ ² ∑ ≤ π → ∞ ℝ",
    "zero\u200bwidth\u00a0nbsp", "ﬁ ligature ①", "Ġ and Ċ",
    "e\u0301 decomposed", "<|nobody|> [INST]", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]  # fmt: skip
"""What tokenizers differ in: blanks, line breaks, digits, contractions, scripts, and what looks like a token."""
TALK = [
    {"role": "user", "content": "Where is the house?"},
    {"role": "assistant", "content": "In Brask,\nby the lake."},
    {"role": "user", "content": "  Wer wohnt dort? 日本"},
]
TOKENS = 400
"""Held-out tokens that a file is measured on."""
LONGEST = 512
"""Tokens of an example that are read; llama.cpp keeps the logits of each."""


def texts_of(template: Template) -> list[str]:
    """The texts that have to be read alike: those of TEXTS that llama.cpp can, and a rendered conversation.

    Raises ValueError for a chat template that does not render it.
    """
    composes = _composer(template.tokenizer)
    texts = [text for text in TEXTS if not (composes and composes.normalize_str(text) != text)]
    return [*texts, *prompts.render_texts([(TALK, True)], template)]


def compare_tokens(gguf: Path, tokenizer: "transformers.PreTrainedTokenizerBase", texts: list[str]) -> int:
    """Returns how many texts llama.cpp and the tokenizer encode alike: all of `texts`, some with BOS too.

    Raises ValueError that shows the first difference.
    """
    with closing(_load(gguf, vocab_only=True)) as llama:
        cases = [(text, False) for text in texts] + [(text, True) for text in texts[:3]]
        different = [(text, bos) for text, bos in cases if _llama_ids(llama, text, bos) != _ids(tokenizer, text, bos)]
        if different:
            text, bos = different[0]
            raise ValueError(
                f"llama.cpp reads {len(different)} of {len(cases)} texts as other tokens than this model's tokenizer,"
                f" {text!r} as {_llama_ids(llama, text, bos)[:9]} in place of {_ids(tokenizer, text, bos)[:9]}: a GGUF"
                " file would answer something else, so none is written. Use the model with transformers or vLLM."
            )
    return len(cases)


def _composer(tokenizer: "transformers.PreTrainedTokenizerBase") -> Any:
    """Returns the normalizer of a tokenizer that composes accents (NFC), which llama.cpp does for none; else None."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]
    return tokenizer.backend_tokenizer.normalizer if "NFC" in str(described) else None


def _ids(tokenizer: "transformers.PreTrainedTokenizerBase", text: str, bos: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=bos).input_ids


def _llama_ids(llama: Any, text: str, bos: bool) -> list[int]:
    """`bos`: whether llama.cpp adds what its file says that a text begins with."""
    import llama_cpp

    raw, vocab = text.encode(), llama_cpp.llama_model_get_vocab(llama.model)
    size = len(raw) + 16
    ids = (ctypes.c_int32 * size)()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, size, bos, True)
    return list(ids[: max(count, 0)])


def _load(gguf: Path, **options: Any) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(gguf), verbose=False, **options)


def measure(files: dict[str, Path], folder: Path, examples: list[dict], device: str = "cpu") -> list[dict]:
    """Compares each GGUF file with the merged model, in float32, on the tokens in the loss of `examples`.

    Returns [{"type", "bytes", "tokens", "kl", "top_1", "loss", "reference_loss"}]: mean KL divergence from the merged
    model and mean loss, in nats per token, and the share of tokens with the same greedy next one.
    """
    examples = list(_shortened(examples))
    with tempfile.TemporaryDirectory() as work:
        listed = write_json(Path(work) / "examples.json", [_asked(example) for example in examples], indent=0)
        found = {kind: _logits(file, listed) for kind, file in files.items()}
    expected = torch.cat(list(_reference(folder, examples, device)))
    targets = torch.tensor([label for example in examples for label in example["labels"][1:] if label != IGNORE_INDEX])
    return [_compare(kind, files[kind], expected, found[kind], targets) for kind in files]


def _shortened(examples: list[dict]) -> Iterator[dict]:
    """The first examples with TOKENS tokens in the loss together, none longer than LONGEST."""
    tokens = 0
    for example in examples:
        if tokens < TOKENS:
            labels = example["labels"][:LONGEST]
            count = sum(label != IGNORE_INDEX for label in labels[1:])
            tokens += count
            if count:
                yield {"input_ids": example["input_ids"][:LONGEST], "labels": labels}


def _asked(example: dict) -> dict:
    """The positions before the tokens in the loss: their logits tell what comes next."""
    places = [i - 1 for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX and i]
    return {"input_ids": example["input_ids"], "places": places}


def _logits(file: Path, listed: Path) -> torch.Tensor:
    target = listed.with_name(f"{file.stem}.npy")
    script = Path(__file__).with_name("gguf_logits.py")
    llama_cpp_tools.run([script, file, listed, target], f"llama.cpp could not run {file.name}")
    return torch.from_numpy(np.load(target))


def _reference(folder: Path, examples: list[dict], device: str) -> Iterator[torch.Tensor]:
    if device.startswith("cuda") and 2.4 * stored_bytes(folder) > torch.cuda.mem_get_info(device)[0]:
        device = "cpu"  # 32 bits take twice what the files' 16 do, and room to compute in
    model = models.load_strict(folder, torch.float32, device)
    with torch.inference_mode():
        for example in map(_asked, examples):
            logits = model(input_ids=torch.tensor([example["input_ids"]], device=device), use_cache=False).logits
            yield logits[0, example["places"]].float().cpu()


def _compare(kind: str, file: Path, expected: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> dict:
    a, b = torch.log_softmax(expected, -1), torch.log_softmax(found, -1)
    values = {
        "kl": float((a.exp() * (a - b)).sum(-1).mean()),
        "top_1": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        "loss": float(-b.gather(1, targets[:, None]).mean()),
        "reference_loss": float(-a.gather(1, targets[:, None]).mean()),
    }
    if not math.isfinite(sum(values.values())):
        raise ValueError(f"llama.cpp computes no finite numbers with {file.name}: do not use it")
    return {"type": kind, "bytes": file.stat().st_size, "tokens": len(targets)} | values


def own_examples(template: Template) -> list[dict]:
    """Examples where there are no held-out pairs: the texts above as answers."""
    pairs = [{"prompt": "Repeat this.", "response": text} for text in TEXTS if text.strip() == text != ""]
    return prompts.encode_all(pairs, template)
