"""The bases that are measured: Phi-2's configuration with random weights, at its true size and in small."""

from pathlib import Path

from llm_finetuning import models
from llm_finetuning.sample import rehearsal

SMALLER = {
    "true": {},
    "small": {
        "vocab_size": 4096,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
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
"""Size → what differs from Phi-2's configuration; heads of 80 everywhere.

small: 109 million parameters, enough that the CPU runs it as it would Phi-2, on all cores (`hardware.SMALL`).
"""


def config(size: str, tokenizer_folder: str = ""):
    """Phi-2's configuration with the changes of `size`."""
    found = rehearsal.phi2_config(models.tokenizer(models.REHEARSAL, tokenizer_folder))
    found.update(SMALLER[size])
    return found


def base(folder: Path, size: str, tokenizer_folder: str = "") -> Path:
    """The base in `folder`/base-<size>, made there unless it is there; with the sample's tokenizer or another."""
    return rehearsal.make_rehearsal(
        folder / f"base-{size}", models.tokenizer(models.REHEARSAL, tokenizer_folder), config(size, tokenizer_folder)
    )
