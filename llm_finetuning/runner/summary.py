"""What a headless run ends with: the scoreboard and a short conversation with the merged model."""

from pathlib import Path

from transformers.utils import logging

from llm_finetuning.evaluation import scoreboard
from llm_finetuning.files.atomic import read_json
from llm_finetuning.inference import examples, tables
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.generation import SamplingParameters
from llm_finetuning.runner.steps import NAMED
from llm_finetuning.settings import Inference

TURNS = 3
SHORT = SamplingParameters(max_new_tokens=64)


def show(output: Path) -> None:
    """Prints what a run left in `output`: the scoreboard, what its model answers, and where the notebooks lie."""
    if (output / "scoreboard.json").is_file():
        _show_model(output)
    if (output / "preference_scoreboard.json").is_file():
        _show_figures(output / "preference_scoreboard.json", "Preference tuning\n")
    print("\nThe notebooks as they ran:")
    for step in NAMED.values():
        page = output / "notebooks" / f"{step.notebook.stem}.html"
        if page.is_file():
            print(page.resolve().as_uri())  # a path with blanks is no link
    print(f"Everything else: {output.resolve().as_uri()}")


def _show_model(output: Path) -> None:
    logging.disable_progress_bar()
    _show_figures(output / "scoreboard.json")
    turns = tables.dialogue(Chat.load(output / "finetuned_phi2"), user_turns(output), SHORT)
    for turn in turns.itertuples():
        print(f"user: {turn.user}\nassistant: {turn.assistant}")


def _show_figures(path: Path, title: str = "") -> None:
    table = scoreboard.figures(read_json(path))
    print(f"\n{title}{table.to_string(float_format='{:.4g}'.format, na_rep='–')}\n")


def user_turns(output: Path) -> list[str]:
    """Returns the user's turns of the first held-out conversation of several turns, or else the first prompts."""
    settings = Inference(drive_folder=str(output))
    turns = examples.dialogue(settings)
    if turns == examples.GENERAL_CONVERSATION:  # no held-out pair has a history
        turns = [messages[-1]["content"] for messages in examples.conversations(settings)]
    return turns[:TURNS]
