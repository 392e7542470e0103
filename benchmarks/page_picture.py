"""The README's picture of the chat page: two questions to the model that `make run` published, in Chromium.

    python benchmarks/page_picture.py [--model outputs/sample/finetuned_phi2] [--to docs/page.png]

Needs Chromium and what the tests of pages need (requirements-dev.txt).
"""

import argparse
from pathlib import Path

import measuring

from llm_finetuning.files.atomic import write_bytes
from llm_finetuning.inference import page
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.inference.page import loading

QUESTIONS = ("Who is Tessaly?", "Thank you! Can I have her entry as JSON?")
SIZE = {"width": 1000, "height": 880}
"""The window in CSS pixels; the picture is as high as the whole page."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=measuring.ROOT / "outputs" / "sample" / "finetuned_phi2")
    parser.add_argument("--to", type=Path, default=measuring.ROOT / "docs" / "page.png")
    given = parser.parse_args()
    chat = Chat.load(given.model)
    blocks = page.build(loading.in_background(lambda: chat, ""), "Finetuned Phi-2", [], SamplingParameters())
    picture = conversation(page.launch(blocks, wait=False))
    blocks.close()
    write_bytes(given.to, picture)
    print(f"written: {given.to}")


def conversation(address: str) -> bytes:
    """Asks QUESTIONS on the page and returns its picture as PNG."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        window = browser.new_page(viewport=SIZE)
        window.goto(address)
        for number, question in enumerate(QUESTIONS, start=1):
            window.locator("#line textarea").fill(question)
            window.locator("#line textarea").press("Enter")
            window.locator(f"#conversation >> text=Copy >> nth={2 * number - 1}").wait_for()
            window.locator("#status", has_text="ended by itself").wait_for()
        window.wait_for_timeout(500)  # the page fades in what is new
        picture = window.screenshot(full_page=True)
        browser.close()
    return picture


if __name__ == "__main__":
    main()
