"""This process as on Colab: google.colab is the stand-in in google_stub, and its Drive lies in a temporary folder."""

import sys
from pathlib import Path

import pytest

from llm_finetuning.files import drive as files_drive

STUB = Path(__file__).parent / "google_stub"


@pytest.fixture
def on_colab(tmp_path, monkeypatch):
    """google.colab can be imported and works on the returned folder (COLAB_STUB); Drive is not mounted yet."""
    _forget()
    folder = tmp_path / "colab"
    folder.mkdir()
    monkeypatch.syspath_prepend(STUB)
    monkeypatch.setenv("COLAB_STUB", str(folder))
    monkeypatch.setattr(files_drive, "MOUNT", folder / "drive")
    monkeypatch.setattr(files_drive, "CACHE", folder)
    import google.colab  # noqa: F401

    yield folder
    if drive := sys.modules.get("google.colab.drive"):
        drive.Kernel.hooked = None
    _forget()


@pytest.fixture
def google_drive(on_colab):
    """The stand-in's Drive, mounted: `view()` is what this machine sees, and tests do it harm."""
    from google.colab import drive

    drive.mount(str(files_drive.MOUNT))
    return drive


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "google"]:
        del sys.modules[name]
