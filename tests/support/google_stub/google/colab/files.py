"""Downloads land in COLAB_STUB/downloads."""

import shutil
from pathlib import Path

from google.colab import folder, note


def download(filename: str) -> None:
    if not Path(filename).exists():
        raise FileNotFoundError(f"Cannot find file: {filename}")
    note(f"files.download {Path(filename).name}")
    (folder() / "downloads").mkdir(exist_ok=True)
    shutil.copy(filename, folder() / "downloads")
