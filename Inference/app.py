"""The chat page: `python "Inference/app.py" --model FOLDER`, or a Hugging Face Space (variable MODEL).

With `--against OTHER` both models answer, without their names and in random order, and visitors vote.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without installation

import huggingface_hub

from llm_finetuning import models
from llm_finetuning.evaluation import votes
from llm_finetuning.files import checksums
from llm_finetuning.inference import page
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.inference.page import loading
from llm_finetuning.inference.page.voting import Vote
from llm_finetuning.inference.votes import BallotBox

EXAMPLES = [
    "What should I think about before adopting a dog?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a polite e-mail that moves a meeting to Wednesday.",
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="published folder, or repository on the Hub")
    parser.add_argument("--against", default=os.environ.get("AGAINST"), help="another one, or the base, to vote on")
    parser.add_argument("--votes", type=Path, default=os.environ.get("VOTES", "votes.jsonl"), help="file of the votes")
    parser.add_argument("--host", default="0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    parser.add_argument("--backend", default=os.environ.get("BACKEND", "auto"), help="auto, nf4, bfloat16, …")
    parser.add_argument("--title", default=os.environ.get("TITLE", "Finetuned Phi-2"))
    parser.add_argument("--example", action="append", help="a question to offer; can be given several times")
    given = parser.parse_args()
    if not given.model:
        parser.error("no model: --model FOLDER, or the variable MODEL (user/name of a model on the Hub)")
    if given.against and names(given)[0] == names(given)[1]:
        parser.error(f"--against is the model itself: {given.against}")
    return given


def names(given: argparse.Namespace) -> list[str]:
    """The last parts of both models' names, or where these are the same, all of them."""
    short = [Path(name).resolve().name for name in (given.model, given.against)]
    return short if short[0] != short[1] else [given.model, given.against]


def downloaded(model: str) -> str:
    """A published folder, downloaded first where it is a repository on the Hub: whole, as SHA256SUMS lists it."""
    if not on_the_hub(model):
        return model
    with models.asking_the_hub("MODEL", model):
        return huggingface_hub.snapshot_download(model)


def on_the_hub(model: str) -> bool:
    """Whether this can only be the name of a repository on the Hub (owner/name)."""
    return not Path(model).is_dir() and model.count("/") == 1 and models.is_hub_id(model)


def is_published(model: str) -> bool:
    """Whether a folder, or a repository on the Hub, is one that the finetuning notebook published."""
    if not on_the_hub(model):
        return (Path(model) / checksums.NAME).is_file()
    try:
        huggingface_hub.hf_hub_download(model, checksums.NAME)
    except (OSError, huggingface_hub.errors.EntryNotFoundError):  # what else is wrong is said where it is fetched
        return False
    return True


def load_against(model: str, chat: Chat, backend: str) -> Chat:
    """Another published folder, or a base without a chat template, which is asked as the first model is."""
    if is_published(model):
        return Chat.load(downloaded(model), backend)
    base = models.locate(model, Path("base"))
    if not models.tokenizer(str(base)).get_vocab().items() <= chat.template.tokenizer.get_vocab().items():
        raise ValueError(f"--against {model} has other tokens, and no folder that was published: its prompt is unknown")
    return chat.base(base, backend)


def main() -> None:
    given = arguments()
    load, against, vote = lambda: Chat.load(downloaded(given.model), given.backend), None, None
    if given.against:
        both = names(given)
        vote = Vote(both, BallotBox(given.votes), lambda: votes.so_far(given.votes, both[::-1]))
        against = lambda chat: load_against(given.against, chat, given.backend)  # noqa: E731
    name = " and ".join(vote.models if vote else [Path(given.model).name])
    waiting = loading.in_background(load, f"Loading {name} …", against)
    sampling = SamplingParameters(max_new_tokens=512)
    blocks = page.build(waiting, given.title, given.example or EXAMPLES, sampling, vote=vote)
    print(f"http://{given.host}:{given.port}", flush=True)
    page.launch(blocks, given.host, given.port)


if __name__ == "__main__":
    main()
