"""The settings of the evaluation notebook."""

import dataclasses
from typing import Annotated, Literal

from llm_finetuning.settings.checks import AUTO, DRIVE_FOLDER, Count, CountOrZero, Length, Model, Must, Texts, validated
from llm_finetuning.settings.folders import Folders


@validated
class Evaluation:
    """Parameters of the evaluation notebook."""

    drive_folder: Annotated[str, Must(str.strip, "name the folder with the results")] = DRIVE_FOLDER
    """Where everything lives, the same in every notebook: data/, checkpoints, the adapter, the finished model."""
    models: Texts = dataclasses.field(default_factory=list)
    """"base", "finetuned", "preferred", folders, hub ids, "BASE + ADAPTER"; [] = base and what was trained here."""
    model_name: Model = "microsoft/phi-2"
    """What "base" is: hub id, local folder, "sample" or "rehearsal"."""
    tokenizer_folder: str = ""
    """As in the finetuning notebook: the tokenizer that model_name = "rehearsal" was made with."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = AUTO
    """"auto" | "bfloat16" | "float16" | "float32": what every model computes in."""
    max_seq_length: Length = 1024
    """Longest conversation in tokens, as in the finetuning notebook."""
    eval_pairs: Count = 200
    """Held-out pairs and passages that likelihoods are measured on, at most so many; of ranked pairs 200 or more."""
    eval_answers: CountOrZero = 64
    """Held-out prompts that are answered."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    judge_exact_match: bool = False
    """Count the answers that are the held-out response to the letter: for data with one right answer."""
    generic_text: str = "sample"
    """Text that finetuning does not teach, to see what is forgotten: a file, a dataset id, "sample", "" = none."""
    source: str = "OpenAssistant/oasst1"
    """As in the data notebooks: of its trees the languages that they left out show what is forgotten; "" = none."""
    follow_rules: bool = True
    """Ask for answers under a dozen rules that a program can check."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness separated by commas, such as arc_easy,hellaswag; installed when they are set."""
    task_limit: CountOrZero = 200
    """Questions of each task; 0 = all."""
    task_folder: str = ""
    """Folder with task files (YAML) of your own for tasks; "" = the harness's own tasks alone."""
    seed: CountOrZero = 42
    """Draws the held-out pairs; the finetuning notebook's gives the same ones."""

    folders = property(lambda self: Folders.in_one(self.drive_folder))
