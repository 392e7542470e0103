"""What the tests of task data generation share: a small task, a template that counts letters, all steps in one call."""

from pathlib import Path

from scripted_generator import Server
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_finetuning import prompts
from llm_finetuning.data.generation import generate
from llm_finetuning.settings import Generation

KEY = "sk-very-secret-1234567890"
TASK = "Answer travellers' questions about the Lantern Isles in one sentence."


def letters_template() -> prompts.Template:
    """A tokenizer of single characters."""
    letters = {chr(code): number for number, code in enumerate(range(32, 127))} | {"<eos>": 95, "\n": 96, "?!": 97}
    core = Tokenizer(models.WordLevel(letters, unk_token="?!"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return prompts.template_for(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>"), "Be brief.")


def settings_for(address: str | Server, folder: Path, **changed) -> Generation:
    """The settings of a small data set from a scripted server."""
    values = {
        "drive_folder": str(folder),
        "task": TASK,
        "endpoint": address if isinstance(address, str) else f"{address.address}/v1",
        "generator_model": "scripted",
        "pairs_wanted": 30,
        "difficulties": ["easy"],
        "forms": ["question"],
        "review_taxonomy": False,
        "near_duplicates": 0.0,
        "timeout_seconds": 20.0,
        "max_seq_length": 400,
    }
    return Generation(**values | changed)


def run(settings: Generation, engine=None, template=None):
    """All steps of the notebook; returns (task, drafts, prepared splits)."""
    template = template or letters_template()
    task = generate.start(settings, engine)
    made = generate.start_drafts(task, template)
    generate.estimate(task, made)
    generate.generate(task, made)
    splits = generate.prepared_splits(task, made, template)
    generate.write(task, made, splits, template)
    return task, made, splits


def every_file(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def files_with(folder: Path, text: str) -> list[str]:
    """The files below a folder in whose bytes a text stands."""
    return [name for name, content in every_file(folder).items() if text.encode() in content]
