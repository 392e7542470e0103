"""The settings of the inference notebook."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from llm_finetuning.settings.checks import AUTO, DRIVE_FOLDER, Count, Must, Positive, Texts, validated


def sampling_rules(options: Any) -> list[tuple[bool, str]]:
    """Returns the checks of `Inference` on sampling parameters, as (holds, what to say when it does not)."""
    hints = get_type_hints(Inference, include_extras=True)
    checks = [(name, value, hints[name].__metadata__[0]) for name, value in vars(options).items()]
    return [(check.holds(value), f"{name} = {value}: {check.expected}") for name, value, check in checks]


@validated
class Inference:
    """Parameters of the inference notebook."""

    drive_folder: Annotated[str, Must(str.strip, "name the folder with the results")] = DRIVE_FOLDER
    """Where everything lives, the same in every notebook: data/, checkpoints, the adapter, the finished model."""
    model_folder: str = ""
    """The published folder: finetuned_phi2 ("") or preferred_phi2 in drive_folder, or a path."""
    model_name: str = "microsoft/phi-2"
    """The base to compare with: hub id, local folder, "sample" or "rehearsal"; "" = no comparison."""
    tokenizer_folder: str = ""
    """As in the finetuning notebook: the tokenizer that model_name = "rehearsal" was made with."""
    backend: str = AUTO
    """"auto" (the fastest here, measured once) or a name of `backends.NAMES`."""
    questions: Texts = dataclasses.field(default_factory=list)
    """Questions to ask; [] = the first prompts of the validation file, or general ones without a file."""
    conversation: Texts = dataclasses.field(default_factory=list)
    """What the user says, turn by turn; [] = a conversation of the validation file, or a general one."""
    prompts_file: str = ""
    """JSONL to answer, one {"prompt": …} a line, optionally with "history"; "" = the questions above."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    max_seconds: Annotated[float, Must(lambda value: value >= 0, "0 (no limit) or more")] = 0.0
    """Longest time for one answer; 0 = no limit."""
    temperature: Annotated[float, Must(lambda value: 0 <= value <= 5, "from 0 (greedy) to 5")] = 0.0
    """0 = greedy: always the token of the highest probability; sampling above it."""
    top_p: Annotated[float, Must(lambda value: 0 < value <= 1, "above 0, at most 1")] = 1.0
    """Nucleus sampling: only the most probable tokens that together reach this probability (arXiv 1904.09751)."""
    top_k: Annotated[int, Must(lambda value: value >= 0, "0 (all) or more")] = 0
    """Sample from this many tokens, the most probable ones; 0 = all."""
    repetition_penalty: Positive = 1.0
    """Above 1, tokens that the prompt or the answer holds already become less probable; 1 = off."""
    seed: Annotated[int, Must(lambda value: value >= -1, "-1 (another each time), 0 or more")] = 0
    """Seed of the sampling; -1 = another one each time."""
    batch_size: Count = 8
    """Prompts of the file that are answered side by side."""
    chat_box: bool = True
    """Show a box to chat in at the end of the notebook."""

    @property
    def folder(self) -> Path:
        """The published folder: one of drive_folder by its name, or any other by its path."""
        beside = Path(self.drive_folder) / (self.model_folder or "finetuned_phi2")
        return beside if beside.is_dir() or not self.model_folder else Path(self.model_folder)

    prompts = property(
        lambda self: Path(self.prompts_file) if self.prompts_file else Path(self.drive_folder) / "prompts.jsonl"
    )
    answers = property(lambda self: Path(self.drive_folder) / "answers.jsonl")
