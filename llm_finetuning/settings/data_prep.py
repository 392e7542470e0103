"""The settings of the two data preparation notebooks."""

from typing import Annotated, Literal

from llm_finetuning.settings.checks import (
    AUTO,
    DRIVE_FOLDER,
    SYSTEM_MESSAGE,
    Folder,
    Fraction,
    Length,
    Model,
    Must,
    Share,
    Switch,
    TemplateFile,
    Threshold,
    validated,
)
from llm_finetuning.settings.folders import Folders

PHI2_FILTERS = {
    "languages": "en",
    "tree_states": "ready_for_export",
    "drop_deleted": "yes",
    "drop_unreviewed": "yes",
    "drop_synthetic": "yes",
    "min_quality": 0.25,
    "max_toxicity": 0.5,
    "max_detoxify": 0.5,
    "min_response_chars": 2,
    "drop_too_long": "yes",
    "drop_duplicates": "yes",
    "near_duplicates": 0.9,
}
"""What "auto" (-1 for a number) means with "best" and "all": Phi-2 reads English, and learns what it is shown."""

NO_FILTERS = {
    "languages": "",
    "tree_states": "",
    "drop_deleted": "no",
    "drop_unreviewed": "no",
    "drop_synthetic": "no",
    "min_quality": 0.0,
    "max_toxicity": 1.0,
    "max_detoxify": 1.0,
    "min_response_chars": 0,
    "drop_too_long": "no",
    "drop_duplicates": "no",
    "near_duplicates": 0.0,
}
"""What "auto" (-1 for a number) means with "joined"."""


@validated
class DataPrep:
    """Parameters of both data preparation notebooks. A filter at "auto" (-1 for a number) follows `replies`."""

    drive_folder: Folder = DRIVE_FOLDER
    """Where everything lives, the same in every notebook: data/, checkpoints, the adapter, the finished model."""
    source: Annotated[str, Must(str.strip, "a dataset id, a file, or sample")] = "OpenAssistant/oasst1"
    """Dataset id on the Hub, "sample", or a file or folder of trees, of messages, or of pairs or chats of your own."""
    source_revision: Annotated[str, Must(str.strip, "a branch such as main, a tag or a commit")] = "main"
    """Branch, tag or commit of the dataset on the Hub; resolved to a commit and recorded."""
    train_split: str = ""
    """The source's own split for training; "" = found by its name, such as train or train_sft."""
    validation_split: str = ""
    """The source's own split for validation; "" = found by its name, test where there is no validation."""
    prompt_column: str = ""
    """Column of the prompt in data of your own; "" = that of a known shape, such as prompt or instruction."""
    response_column: str = ""
    """Column of the response in data of your own; "" = that of a known shape, such as response or output."""
    system_column: str = ""
    """Column of the system message in data of your own; "" = system."""
    model_name: Model = "microsoft/phi-2"
    """Base model whose tokenizer counts the tokens."""
    tokenizer_folder: str = ""
    """Local folder with the tokenizer; "" = that of model_name."""
    system_message: str = SYSTEM_MESSAGE
    """Stands before every conversation that has none of its own, and counts in its length; "" = none."""
    chat_template: TemplateFile = ""
    """A file with a Jinja chat template, as in the finetuning notebook; "" = the tokenizer's own."""
    replies: Literal["best", "all", "joined"] = "best"
    """"best" reply to each prompt, "all" replies, or "joined" as in the original notebooks."""
    preference_pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"
    """Of replies with ranks: "best-worst" of each prompt, "adjacent" ranks, or "all" better against worse ones."""
    max_seq_length: Length = 1024
    """Longest conversation in tokens, as in the finetuning notebook."""
    validation_share: Fraction = 0.1
    """Share of the trees that are validation, for a source without splits of its own; 0 = all are training."""
    on_error: Literal["raise", "skip"] = "raise"
    """"raise": a broken tree or record stops the run; "skip": what cannot be used is left out, counted and named."""
    languages: str = AUTO
    """Codes separated by commas; "" = all."""
    tree_states: str = AUTO
    """States separated by commas; "" = all."""
    drop_deleted: Switch = AUTO
    """"yes" | "no" | "auto"; a deleted message takes along what was said after it."""
    drop_unreviewed: Switch = AUTO
    """"yes" | "no" | "auto"; a message rejected in review (review_result false) does so too."""
    drop_synthetic: Switch = AUTO
    """"yes" | "no" | "auto"; replies written by a model."""
    min_quality: Threshold = -1.0
    """Lowest quality label of a reply, 0 to 1; 0 = off."""
    max_toxicity: Threshold = -1.0
    """Highest toxicity label of a reply, 0 to 1; 1 = off."""
    max_detoxify: Threshold = -1.0
    """Highest toxicity of a reply by the detoxify model, 0 to 1; 1 = off."""
    min_response_chars: Annotated[int, Must(lambda value: value >= -1, "-1 or more")] = -1
    """Shortest reply in characters; 0 = off."""
    drop_too_long: Switch = AUTO
    """"yes" | "no" | "auto"; cut the oldest turns to max_seq_length, leave out what is longer without any."""
    drop_duplicates: Switch = AUTO
    """"yes" | "no" | "auto"; of equal prompts with equal history the first stays."""
    near_duplicates: Threshold = -1.0
    """Similarity from which on two prompts count as equal, 0 to 1; 0 = off."""
    remove_leaks: bool = True
    """Take out of the training file what also stands in the validation file."""
    leak_similarity: Share = 0.9
    """Similarity from which on a prompt in both files is a leak, 0 to 1; 0 = equal prompts only."""

    @property
    def filters(self) -> dict:
        """The filters that act, with "auto" and -1 replaced by what they mean."""
        defaults = NO_FILTERS if self.replies == "joined" else PHI2_FILTERS
        return {
            name: default if getattr(self, name) in (AUTO, -1) else getattr(self, name)
            for name, default in defaults.items()
        }

    @property
    def folders(self) -> Folders:
        """The layout of `drive_folder`; data preparation needs no fast disk of its own."""
        return Folders.in_one(self.drive_folder)
