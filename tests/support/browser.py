"""A real browser for the tests that look at pages."""

from pathlib import Path

import pytest

CHROMIUM = [Path("/usr/bin/chromium"), Path("/usr/bin/chromium-browser"), Path("/usr/bin/google-chrome")]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window; the test is skipped without it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need: pip install playwright")
    path = next((path for path in CHROMIUM if path.exists()), None)
    if path is None:
        pytest.skip("no Chromium here (apt-get install chromium): the page is not tested in a browser")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=str(path), args=FLAGS)
        yield opened
        opened.close()
