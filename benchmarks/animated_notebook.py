"""The README's moving picture: the finetuning notebook as `make run` executed it, cell by cell, in Chromium.

    python benchmarks/animated_notebook.py [--run outputs/sample] [--to docs/finetuning.webp]

Needs Chromium and what the tests of pages need (requirements-dev.txt).
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import measuring
from PIL import Image

from llm_finetuning.files.atomic import write_bytes

NOTEBOOK = "Phi-2 QLoRA Finetuning.html"
WIDTH, HEIGHT, SHRINK = 960, 600, 0.75
"""The window in CSS pixels, and how much smaller the picture is."""
SECONDS = {"text": 0.7, "output": 1.3, "picture": 2.2}
"""How long a screen is shown, by the most that is in it."""
SCREENS = 60
"""A page of more screens is no notebook of the sample."""
SHORT_PATHS = """root => {
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(root, "") }"""
"""Shows paths from the checkout on, not from the root of somebody's disk."""
LARGEST = 1_500_000
"""Bytes that a README's picture may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=measuring.ROOT / "outputs" / "sample", help="folder of the run")
    parser.add_argument("--to", type=Path, default=measuring.ROOT / "docs" / "finetuning.webp")
    given = parser.parse_args()
    page = given.run / "notebooks" / NOTEBOOK
    if not page.is_file():
        raise SystemExit(f"{page} is not there. Say `make run` first.")
    size = write(list(screens(page)), given.to)
    print(f"written: {given.to}, {size / 1e6:.2f} MB")


def screens(page: Path) -> Iterator[tuple[Image.Image, float]]:
    """Yields (what is seen, seconds) while the page is read from top to bottom, from one cell to the next."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        window.goto(page.resolve().as_uri(), wait_until="load")
        window.evaluate(SHORT_PATHS, f"{page.resolve().parents[3]}/")
        tops = [*map(round, window.eval_on_selector_all(".jp-Cell", "cells => cells.map(c => c.offsetTop)"))]
        bottom = window.evaluate("document.documentElement.scrollHeight") - HEIGHT
        for top in stops(tops, bottom)[:SCREENS]:
            window.evaluate(f"window.scrollTo(0, {top})")
            yield Image.open(io.BytesIO(window.screenshot())).convert("RGB"), seconds(window)
        browser.close()


def stops(tops: list[int], bottom: int) -> list[int]:
    """Returns where to halt: at the cell that begins last within two thirds of the screen before, or at that mark."""
    found = [0]
    while found[-1] < bottom:
        furthest = found[-1] + HEIGHT * 2 // 3
        found.append(min(max((top for top in tops if found[-1] < top <= furthest), default=furthest), bottom))
    return found


def seconds(window) -> float:
    """How long the screen is shown that the window is at."""
    seen = """selector => [...document.querySelectorAll(selector)].some(one => {
        const box = one.getBoundingClientRect(); return box.bottom > 0 && box.top < innerHeight })"""
    for selector, kind in (("img, svg.figure", "picture"), (".jp-OutputArea-output", "output")):
        if window.evaluate(seen, selector):
            return SECONDS[kind]
    return SECONDS["text"]


def write(shown: list[tuple[Image.Image, float]], path: Path) -> int:
    """Writes an endless WebP; returns its bytes. Raises ValueError when it is larger than a README's may be."""
    small = [one.resize((round(WIDTH * SHRINK), round(HEIGHT * SHRINK)), Image.LANCZOS) for one, _ in shown]
    durations = [round(1000 * duration) for _, duration in shown]
    content = io.BytesIO()
    options = {"save_all": True, "append_images": small[1:], "duration": durations, "loop": 0}
    small[0].save(content, "WEBP", quality=60, method=4, **options)
    if content.tell() > LARGEST:
        raise ValueError(f"{path.name} would take {content.tell():,} bytes of {LARGEST:,}: show fewer screens")
    write_bytes(path, content.getvalue())
    return content.tell()


if __name__ == "__main__":
    main()
