"""The bases that are measured: Phi-2's configuration with random weights, at its true size and in small."""

from pathlib import Path

from llm_finetuning import bases

SMALLER = {
    "true": {},
    "small": {
        "vocab_size": 4096,
        "hidden_size": 640,
        "intermediate_size": 2560,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
"""Size → what differs from Phi-2's configuration. small: 25 million parameters; heads of 80 everywhere."""


def config(size: str, tokenizer_folder: str = ""):
    """Phi-2's configuration with the changes of `size`."""
    found = bases.phi2_config(bases.tokenizer(bases.REHEARSAL, tokenizer_folder))
    found.update(SMALLER[size])
    return found


def base(folder: Path, size: str, tokenizer_folder: str = "") -> Path:
    """The base in `folder`/base-<size>, made there unless it is there; with the sample's tokenizer or another."""
    return bases.make_rehearsal(folder / f"base-{size}", tokenizer_folder, config(size, tokenizer_folder))
