"""What must not leave this machine: pickles, which run code when they are loaded, and access tokens."""

import re
from pathlib import Path

from llm_finetuning.files import checksums

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
TEXTS = {".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".ipynb", ".html", ".csv", ".log"}
TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|github_pat_\w{20,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,})")


def check_no_pickles(folder: Path) -> None:
    """Raises ValueError if `folder` holds a file that is unpickled when it is loaded."""
    pickles = [name for name in checksums.files_below(folder) if Path(name).suffix in PICKLES]
    if pickles:
        raise ValueError(f"{folder} holds {', '.join(pickles)}: pickles are not published. Save as safetensors.")


def check_no_tokens(folder: Path) -> None:
    """Raises ValueError naming file and line if a text in `folder` holds what looks like an access token."""
    for name in checksums.files_below(folder):
        if Path(name).suffix in TEXTS:
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            if match := TOKEN.search(text):
                line = text.count("\n", 0, match.start()) + 1
                raise ValueError(
                    f"{folder / name}, line {line} holds what looks like an access token. Take it out, "
                    "revoke it where it was made, and keep tokens in Colab's secrets or in HF_TOKEN."
                )


def without_tokens(text: str) -> str:
    """Returns `text` with every access token struck out."""
    return TOKEN.sub("(token)", text)
