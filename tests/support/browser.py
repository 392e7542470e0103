"""A real browser for the tests that look at pages."""

from pathlib import Path

import pytest

CHROMIUM = [Path("/usr/bin/chromium"), Path("/usr/bin/chromium-browser"), Path("/usr/bin/google-chrome")]
PATIENT = 60_000
"""Milliseconds that a test waits for anything in a browser: machines are busy."""
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
    playwright.expect.set_options(timeout=PATIENT)
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=str(path), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def new_window(browser):
    """new_window(width, …) → an empty page that waits patiently, until the test is over."""
    windows = []

    def open_window(width: int = 1280, **options):
        windows.append(browser.new_page(viewport={"width": width, "height": 800}, **options))
        windows[-1].set_default_timeout(PATIENT)
        return windows[-1]

    yield open_window
    for window in windows:
        window.close()
