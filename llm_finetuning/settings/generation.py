"""The settings of the task data generation notebook."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import ValidationInfo, field_validator

from llm_finetuning.settings.checks import (
    DRIVE_FOLDER,
    Count,
    CountOrZero,
    Folder,
    Fraction,
    Length,
    Model,
    Must,
    NotNegative,
    Positive,
    Share,
    TemplateFile,
    Texts,
    split_names,
    validated,
)
from llm_finetuning.settings.folders import Folders


def _are_pairs(examples: list) -> bool:
    """Whether all are pairs of a prompt and a response, and texts."""
    names = ("prompt", "response")
    return all(
        isinstance(one, dict) and one.keys() == {*names} and all(type(one[n]) is str and one[n].strip() for n in names)
        for one in examples
    )


@validated
class Generation:
    """Parameters of the task data generation notebook. A price is per million tokens, in the currency of the budget."""

    drive_folder: Folder = DRIVE_FOLDER
    """Where everything lives, the same in every notebook: data/, checkpoints, the adapter, the finished model."""
    task: Annotated[str, Must(str.strip, "describe in a few sentences what the assistant does")] = (
        "Explain a word or a term of science to a ten-year-old in one or two plain sentences."
    )
    """What the finetuned model is to do, in a few sentences."""
    examples: Annotated[list, Must(_are_pairs, 'pairs such as {"prompt": "…", "response": "…"}')] = dataclasses.field(
        default_factory=list
    )
    """A few pairs of one's own that show what is wanted; [] = none."""
    documents: str = ""
    """A text file, or a folder of them, that the prompts ask about; "" = none."""
    pairs_wanted: Count = 500
    """Pairs in both files together."""
    languages: Annotated[str, Must(split_names, "codes separated by commas, such as en, de")] = "en"
    """Codes of the languages that are asked for, separated by commas."""
    style: str = ""
    """How the assistant writes; "" = as the task says."""
    topics: Texts = dataclasses.field(default_factory=list)
    """Topics of the prompts; [] = the generator proposes them from the task."""
    topics_wanted: Count = 20
    """Topics that the generator proposes."""
    difficulties: Annotated[Texts, Must(len, "at least one")] = dataclasses.field(
        default_factory=lambda: ["easy", "medium", "hard"]
    )
    """How hard prompts are."""
    forms: Annotated[Texts, Must(len, "at least one")] = dataclasses.field(
        default_factory=lambda: ["question", "instruction", "request with details"]
    )
    """The forms of prompts."""
    review_taxonomy: bool = True
    """Stop once when the taxonomy is written, so that it can be read and changed before money is spent."""
    endpoint: str = "https://api.openai.com/v1"
    """Address of an OpenAI-compatible server: OpenAI, vLLM, Ollama, llama.cpp, transformers serve."""
    generator_model: Model = "gpt-4.1-mini"
    """The model that writes the pairs, by the server's name."""
    generator_folder: str = ""
    """A published model folder that writes the pairs on this machine, in place of the endpoint; "" = the endpoint."""
    key_name: str = "OPENAI_API_KEY"
    """Name of the secret in Colab, or of the environment variable, that holds the key; never the key itself."""
    temperature: Annotated[float, Must(lambda value: 0 <= value <= 2, "0 to 2")] = 0.8
    """Of the generator's sampling; 0 = greedy."""
    max_answer_tokens: Length = 1024
    """Longest answer of the generator in tokens."""
    max_parallel: Annotated[int, Must(lambda value: 1 <= value <= 256, "1 to 256")] = 8
    """Requests side by side."""
    timeout_seconds: Positive = 120.0
    """Longest wait for one answer."""
    prompt_price: NotNegative = 0.0
    """Price of a million tokens that are sent; 0 = not known, or free."""
    answer_price: NotNegative = 0.0
    """Price of a million tokens that are written."""
    budget_money: NotNegative = 0.0
    """Most money for the whole data set; 0 = no limit."""
    budget_tokens: CountOrZero = 2000000
    """Most tokens for the whole data set, sent and written; 0 = no limit."""
    second_answer: bool = False
    """Write two answers to each prompt; a judge ranks them, and the ranks also make preference pairs."""
    min_score: Annotated[int, Must(lambda value: 0 <= value <= 10, "0 to 10")] = 0
    """Lowest score from a judge, 1 to 10; 0 = off."""
    judge_model: str = ""
    """The judge, by the server's name; "" = generator_model."""
    system_message: str = ""
    """System message of the finetuned model; "" = the generator writes it from the task."""
    model_name: Model = "microsoft/phi-2"
    """Base model whose tokenizer counts the tokens."""
    tokenizer_folder: str = ""
    """Local folder with the tokenizer; "" = that of model_name."""
    chat_template: TemplateFile = ""
    """A file with a Jinja chat template, as in the finetuning notebook; "" = the tokenizer's own."""
    max_seq_length: Length = 1024
    """Longest conversation in tokens, as in the finetuning notebook."""
    min_response_chars: CountOrZero = 0
    """Shortest response in characters; 0 = no limit."""
    max_response_chars: CountOrZero = 0
    """Longest response in characters; 0 = no limit."""
    near_duplicates: Share = 0.9
    """Similarity from which on two prompts count as equal, 0 to 1; 0 = equal prompts only."""
    validation_share: Fraction = 0.1
    """Share of the topics that are validation; 0 = all are training."""

    # An error must not repeat what could be a key, so these checks do not quote what they found.
    @field_validator("endpoint")
    def _is_an_address(cls, value: str) -> str:
        address = urlsplit(value)
        if address.scheme not in ("http", "https") or not address.hostname or value != value.strip():
            raise ValueError("is no address: it begins with http:// or https://, such as http://localhost:8000/v1")
        if address.username or address.password or address.query or address.fragment:
            raise ValueError("holds more than an address: the key belongs in a secret or the environment (key_name)")
        return value

    @field_validator("key_name")
    def _is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w{0,63}", value, re.ASCII):
            raise ValueError("is no name of a variable: put the key itself into a secret or the environment")
        return value

    @field_validator("budget_money")
    def _is_computable(cls, value: float, info: ValidationInfo) -> float:
        if value and not (info.data.get("prompt_price") or info.data.get("answer_price")):
            raise ValueError("needs prompt_price and answer_price")
        return value

    @property
    def folders(self) -> Folders:
        """The layout of `drive_folder`; the generation needs no fast disk of its own."""
        return Folders.in_one(self.drive_folder)

    generation_folder = property(lambda self: Path(self.drive_folder) / "generation")
