"""The chat page: `python "Inference/app.py" --model FOLDER`, or a Hugging Face Space (variable MODEL)."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without installation

from llm_finetuning.inference import page
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.inference.page import loading

EXAMPLES = [
    "What should I think about before adopting a dog?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a polite e-mail that moves a meeting to Wednesday.",
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="published folder, or repository on the Hub")
    parser.add_argument("--host", default="0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    parser.add_argument("--backend", default=os.environ.get("BACKEND", "auto"), help="auto, nf4, bfloat16, …")
    parser.add_argument("--title", default=os.environ.get("TITLE", "Finetuned Phi-2"))
    parser.add_argument("--example", action="append", help="a question to offer; can be given several times")
    given = parser.parse_args()
    if not given.model:
        parser.error("no model: --model FOLDER, or the variable MODEL (user/name of a model on the Hub)")
    return given


def load(model: str, backend: str) -> Chat:
    """Loads a published folder, which a Space downloads from the Hub first."""
    if not Path(model).is_dir() and "SPACE_ID" in os.environ:
        from huggingface_hub import snapshot_download

        model = snapshot_download(model)
    return Chat.load(model, backend)


def main() -> None:
    given = arguments()
    name = Path(given.model).name
    waiting = loading.in_background(lambda: load(given.model, given.backend), f"Loading {name} …")
    blocks = page.build(waiting, given.title, given.example or EXAMPLES, SamplingParameters(max_new_tokens=512))
    print(f"http://{given.host}:{given.port}", flush=True)
    page.launch(blocks, given.host, given.port)


if __name__ == "__main__":
    main()
