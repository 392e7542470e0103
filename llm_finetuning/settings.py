"""The settings behind the notebooks' parameters cells: one class a notebook, validated as a whole.

Default, type, check and sentence of a setting stand together at its field. A parameters cell holds literals; the cell
after it calls `from_cell(Finetuning, globals())`. Nothing heavy is imported here, so a typing mistake is answered at
once.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_type_hints
from urllib.parse import urlsplit

import pydantic.dataclasses
from pydantic import ConfigDict, GetCoreSchemaHandler, ValidationError, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

from llm_finetuning.files import drive
from llm_finetuning.files.atomic import write_json

AUTO = "auto"
DRIVE_FOLDER = "/content/drive/MyDrive/llm_finetuning"
TRIAL = "quick_trial"
TRIAL_PAIRS = 200
SYSTEM_MESSAGE = "You are a helpful assistant."
Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Must:
    """A check at a field: what has to hold of its value, and what an error says where it does not."""

    holds: Callable[[Any], bool]
    expected: str

    def check(self, value: Any) -> Any:
        """Returns the value as it is. Raises ValueError that says what was expected."""
        if not self.holds(value):
            raise ValueError(f"is empty: {self.expected}" if value == "" else f"= {value!r}: {self.expected}")
        return value

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


Count = Annotated[int, Must(lambda value: value >= 1, "at least 1")]
CountOrZero = Annotated[int, Must(lambda value: value >= 0, "0 or more")]
NotNegative = Annotated[float, Must(lambda value: value >= 0, "0 or more")]
Positive = Annotated[float, Must(lambda value: 0 < value < float("inf"), "above 0")]
Fraction = Annotated[float, Must(lambda value: 0 <= value < 1, "from 0 to below 1")]
Threshold = Annotated[float, Must(lambda value: value == -1 or 0 <= value <= 1, "0 to 1, or -1 for auto")]
Length = Annotated[int, Must(lambda value: value >= 16, "at least 16 tokens")]
Switch = Literal["auto", "yes", "no"]
Folder = Annotated[str, Must(str.strip, "name the folder for the results")]
Model = Annotated[str, Must(str.strip, "a hub id, a folder, or sample")]
TemplateFile = Annotated[str, Must(lambda value: value == value.strip(), "a file with a Jinja chat template, or ''")]
Share = Annotated[float, Must(lambda value: 0 <= value <= 1, "0 to 1")]
Texts = Annotated[list, Must(lambda value: all(type(t) is str and t.strip() for t in value), "texts, none empty")]


NOT_IN_FORM = (
    *("model_revision", "source_revision", "tokenizer_folder", "tree_states", "drop_unreviewed"),
    *("packing", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "attention", "weight_decay"),
    *("logging_steps", "save_total_limit", "judge_exact_match", "task_folder"),
)
"""Settings without a line in a parameters cell; a line of that name, a profile or `-p` sets them too."""


@dataclass_transform(frozen_default=True)
def _validated(settings_class: type[Settings]) -> type[Settings]:
    """Makes a frozen dataclass whose constructor raises one ValueError that lists all problems of its values."""
    config = ConfigDict(strict=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)
    made = pydantic.dataclasses.dataclass(frozen=True, config=config)(settings_class)
    validate = made.__init__

    def __init__(self: Settings, *values: Any, **named: Any) -> None:
        try:
            validate(self, *values, **named)
        except ValidationError as error:
            problems = [_sentence(made, problem) for problem in error.errors()]
            raise ValueError(f"{made.__name__} settings:\n" + "\n".join(problems)) from None

    made.__init__ = __init__
    return made


def _sentence(settings_class: type, problem: dict) -> str:
    """Returns a problem that pydantic found as `name = value: what was expected`."""
    name, value, kind = problem["loc"][0], problem["input"], problem["type"]
    field_type = get_type_hints(settings_class).get(name)
    if kind == "value_error":
        return f"{name} {problem['ctx']['error']}"
    if kind == "literal_error":
        return f"{name} = {value!r}: one of {', '.join(get_args(field_type))}"
    if kind.endswith("_type"):
        return f"{name} = {value!r}: expected {field_type.__name__}, found {type(value).__name__}"
    return f"{name}: {problem['msg']}"


def from_cell(settings_class: type[Settings], namespace: dict) -> Settings:
    """Returns the settings of a notebook from the names its parameters cell defined.

    Every field of `settings_class` must be a name in `namespace`, but for those of NOT_IN_FORM, which may be: what
    hardly anybody changes keeps its default without a line in the form. Whole numbers are accepted for floats.
    Raises ValueError that lists every missing name, or else every wrong type and impossible value at once, and for
    folders of Colab's elsewhere; OSError where they lie on a Drive that is not mounted.
    """
    names = [field.name for field in dataclasses.fields(settings_class)]
    missing = [name for name in names if name not in namespace and name not in NOT_IN_FORM]
    if missing:
        raise ValueError("\n".join(f"{name} is missing: the parameters cell has to define it" for name in missing))
    made = settings_class(**{name: namespace[name] for name in names if name in namespace})
    drive.check_folders({name: getattr(made, name) for name in names if name.endswith("_folder")})
    return made


def from_file(settings_class: type[Settings], path: str | Path) -> Settings:
    """Returns the settings that `save` wrote. Raises FileNotFoundError, or ValueError like `from_cell`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: the finetuning notebook writes it as settings.json to drive_folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: no JSON ({error.msg}); run the notebook's settings cell again"
        ) from error
    return from_cell(settings_class, values)


def sampling_rules(options: Any) -> list[tuple[bool, str]]:
    """Returns the checks of `Inference` on sampling parameters, as (holds, what to say when it does not)."""
    hints = get_type_hints(Inference, include_extras=True)
    checks = [(name, value, hints[name].__metadata__[0]) for name, value in vars(options).items()]
    return [(check.holds(value), f"{name} = {value}: {check.expected}") for name, value, check in checks]


def split_names(text: str) -> list[str]:
    """Splits a text at its commas and spaces: 'en, de' → ['en', 'de'], an empty text → []."""
    return [name for name in re.split(r"[,\s]+", text) if name]


def _are_pairs(examples: list) -> bool:
    """Whether all are pairs of a prompt and a response, and texts."""
    names = ("prompt", "response")
    return all(
        isinstance(one, dict) and one.keys() == {*names} and all(type(one[n]) is str and one[n].strip() for n in names)
        for one in examples
    )


GGUF_TYPES = {"f16": 16, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 3.9, "Q2_K": 3.4}
"""Types of GGUF files, with about how many bits a weight takes."""


def gguf_types(text: str) -> list[str]:
    """Splits a list of GGUF types, each once and the smallest last. Raises ValueError for one that is not known."""
    names = {name.casefold(): name for name in GGUF_TYPES}
    if unknown := [name for name in split_names(text) if name.casefold() not in names]:
        raise ValueError(f"{unknown[0]!r} is no type of GGUF file: {', '.join(GGUF_TYPES)}, separated by commas")
    asked = {names[name.casefold()] for name in split_names(text)}
    return [name for name in GGUF_TYPES if name in asked]


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


@_validated
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
    leak_similarity: Annotated[float, Must(lambda value: 0 <= value <= 1, "0 to 1")] = 0.9
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
    def folders(self) -> "Folders":
        """The layout of `drive_folder`; data preparation needs no fast disk of its own."""
        return Folders(Path(self.drive_folder), Path(self.drive_folder))


@_validated
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
    min_response_chars: CountOrZero = 2
    """Shortest response in characters."""
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
    def folders(self) -> "Folders":
        """The layout of `drive_folder`; the generation needs no fast disk of its own."""
        return Folders(Path(self.drive_folder), Path(self.drive_folder))

    generation_folder = property(lambda self: Path(self.drive_folder) / "generation")


@_validated
class Finetuning:
    """Parameters of the finetuning notebook. Lengths are in tokens, rates per optimizer step."""

    drive_folder: Folder = DRIVE_FOLDER
    """Where everything lives, the same in every notebook: data/, checkpoints, the adapter, the finished model."""
    work_folder: Annotated[str, Must(str.strip, "name a folder on the local disk")] = "/content/llm_finetuning_work"
    """Fast local disk that is written first; the same as drive_folder when there is no Drive."""
    model_name: Model = "microsoft/phi-2"
    """Hub id, local folder, or "sample" / "rehearsal" (made on the spot)."""
    model_revision: str = "main"
    """Branch, tag or commit of the base on the Hub; resolved to a commit and recorded."""
    tokenizer_folder: str = ""
    """Tokenizer for model_name = "rehearsal"; "" = the sample's."""
    system_message: str = SYSTEM_MESSAGE
    """Stands before every conversation that has none of its own; "" = none."""
    chat_template: TemplateFile = ""
    """A file with a Jinja chat template; "" = the tokenizer's own, or Phi-2's format where it has none."""
    quick_trial: bool = False
    """Run everything on 200 pairs in a few minutes first, into a folder quick_trial of its own."""
    own_questions: Texts = dataclasses.field(default_factory=list)
    """Questions of your own, answered before and after training: ["What is a haiku?", …]."""
    max_seq_length: Length = 1024
    """Longest conversation in tokens; older turns are cut first, then the pair is left out and counted."""
    train_on: Literal["every response", "last response"] = "every response"
    """"every response" of a conversation in one example, or the "last response" alone, an example for each pair."""
    packing: bool = True
    """Fill each sequence of a micro-batch with several conversations, isolated from one another."""
    use_4bit: bool = True
    """Load the base in 4 bits (QLoRA); False trains LoRA on the 16-bit base."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """"nf4" (arXiv 2305.14314) or "fp4"."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants too: 0.37 bits per weight less (arXiv 2305.14314, section 3)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = AUTO
    """"auto" | "bfloat16" | "float16" | "float32": what the computation runs in."""
    lora_r: Count = 64
    """Rank of the adapters."""
    lora_alpha: Count = 16
    """The adapters' product is scaled by lora_alpha / lora_r (arXiv 2106.09685, section 4.1)."""
    lora_dropout: Fraction = 0.0
    """Dropout before the adapters; 0 saves a fifth of the elementwise traffic."""
    lora_target_modules: Annotated[str, Must(str.strip, "all-linear")] = "all-linear"
    """"all-linear" or names separated by commas; a name that matches nothing stops the run."""
    max_steps: Annotated[int, Must(lambda value: value == -1 or value > 0, "-1 or above 0")] = -1
    """Number of optimizer steps; -1 = num_train_epochs decides."""
    num_train_epochs: float = 1.0
    """Passes over the pairs; max_steps > 0 overrides it."""
    learning_rate: Positive = 2e-4
    """Per optimizer step; 2e-4 as in arXiv 2305.14314."""
    lr_scheduler_type: str = "constant_with_warmup"
    """A name of transformers.SchedulerType, such as "constant_with_warmup", "cosine", "linear"."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NotNegative = 0.3
    """Gradients are clipped to this norm; 0.3 as in arXiv 2305.14314."""
    optim: str = AUTO
    """"auto" or a name of transformers.OptimizerNames."""
    seed: CountOrZero = 42
    """Seed of the adapters' initial weights, of the order of the examples and of dropout."""
    tokens_per_step: int = 16384
    """Tokens per optimizer step; the plan divides it into micro-batches that fit in memory."""
    micro_batch_tokens: int = 0
    """Tokens per forward and backward; 0 = as many as the plan finds room for."""
    gradient_checkpointing: Literal["auto", "on", "off"] = AUTO
    """Recompute activations in the backward pass: "auto" (where memory needs it) | "on" | "off"."""
    attention: Literal["auto", "varlen", "sdpa", "eager"] = AUTO
    """Attention implementation: "auto" | "varlen" (flash attention on packed sequences) | "sdpa" | "eager"."""
    compile_layers: bool = False
    """torch.compile each decoder layer: pays on long runs on a fast GPU."""
    allow_slow: bool = False
    """Train without a GPU even if it takes more than two hours."""
    logging_steps: Count = 1
    """Steps between two entries in the metrics."""
    save_steps: Count = 50
    """Steps between two checkpoints."""
    save_total_limit: Count = 2
    """Checkpoints that are kept."""
    eval_steps: CountOrZero = 100
    """Steps between two evaluations on the held-out set; 0 = none while training."""
    eval_pairs: Count = 200
    """Pairs of the fixed held-out set whose loss is measured."""
    eval_answers: CountOrZero = 16
    """Prompts of the fixed held-out set that are answered for the scoreboard."""
    max_new_tokens: Count = 256
    """Longest answer on the scoreboard."""
    judge_exact_match: bool = False
    """Also count answers equal to the reference; means something only where one answer is right."""
    early_stopping_patience: CountOrZero = 0
    """Stop after this many evaluations without a better held-out loss, and keep the best; 0 = off."""
    resume: bool = True
    """Go on from the newest complete checkpoint; False starts afresh and moves old ones aside, here and on Drive."""
    report_to: str = "tensorboard"
    """"tensorboard", "wandb", …, or "none"."""
    merge_base: Literal["best", "dequantized", "original"] = "best"
    """"best" (measure both) | "dequantized" (what was trained on) | "original" (the 16-bit weights)."""
    publish_to: Literal["folder", "hub"] = "folder"
    """"folder" (drive_folder) or "hub" (drive_folder, then hub_repository)."""
    hub_repository: str = ""
    """User/name on the Hub, for publish_to = "hub"."""
    hub_private: bool = True
    """Make the Hub's repository private; False shows model, settings and model card to everybody."""
    gguf: str = ""
    """Types of GGUF files for llama.cpp and Ollama, such as "f16, Q8_0, Q5_K_M, Q4_K_M"; "" = none."""
    rate_per_hour: NotNegative = 0.0
    """What an hour of this machine costs; 0 = not known."""

    # What depends on another field stands below that one: `info.data` holds the fields above that are in order.
    @field_validator("num_train_epochs")
    def _trains_at_all(cls, value: float, info: ValidationInfo) -> float:
        if value <= 0 and info.data.get("max_steps") == -1:
            raise ValueError(f"= {value}: above 0, or set max_steps")
        return value

    @field_validator("tokens_per_step", "micro_batch_tokens")
    def _holds_the_longest_conversation(cls, value: int, info: ValidationInfo) -> int:
        longest, automatic = info.data.get("max_seq_length", value), info.field_name == "micro_batch_tokens"
        if value < longest and not (automatic and value == 0):
            raise ValueError(f"= {value}: {'0 or ' if automatic else ''}at least max_seq_length ({longest})")
        return value

    @field_validator("early_stopping_patience")
    def _evaluates_while_training(cls, value: int, info: ValidationInfo) -> int:
        if value > 0 and info.data.get("eval_steps") == 0:
            raise ValueError("needs eval_steps above 0")
        return value

    @field_validator("gguf")
    def _are_known_types(cls, value: str) -> str:
        try:
            gguf_types(value)
        except ValueError as error:
            raise ValueError(f"= {value!r}: {error}") from error
        return value

    @field_validator("publish_to")
    def _publishes_no_trial(cls, value: str, info: ValidationInfo) -> str:
        if value == "hub" and info.data.get("quick_trial"):
            raise ValueError(
                "= 'hub': a quick trial is not uploaded; set publish_to = 'folder', or quick_trial = False"
            )
        return value

    @field_validator("hub_repository")
    def _names_a_repository(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("publish_to") == "hub" and "/" not in value:
            raise ValueError(f"= {value!r}: publish_to = 'hub' needs user/name")
        return value

    def save(self, path: Path) -> Path:
        """Writes the settings as JSON, atomically; returns its path."""
        return write_json(path, dataclasses.asdict(self))

    @property
    def folders(self) -> "Folders":
        """The layout of the run's two folders; a quick trial reads the same data, and writes to folders of its own."""
        drive, work = Path(self.drive_folder), Path(self.work_folder)
        return Folders(drive / TRIAL, work / TRIAL, drive / "data") if self.quick_trial else Folders(drive, work)


@dataclasses.dataclass(frozen=True)
class Folders:
    """The layout of a run's results, the same on Drive and on a local disk."""

    drive: Path
    work: Path
    read_from: Path | None = None
    """The folder of the data, where it is not data/ in `drive`."""

    data = property(lambda self: self.read_from or self.drive / "data")
    train_file = property(lambda self: self.data / "finetuning_data_train.jsonl")
    val_file = property(lambda self: self.data / "finetuning_data_val.jsonl")
    train_preferences = property(lambda self: self.data / "preferences_train.jsonl")
    val_preferences = property(lambda self: self.data / "preferences_val.jsonl")
    checkpoints = property(lambda self: self.work / "checkpoints")
    adapter = property(lambda self: self.work / "adapter")
    merged = property(lambda self: self.work / "merged")
    base = property(lambda self: self.data.parent / "base")
    published = property(lambda self: self.drive / "finetuned_phi2")
    preferred = property(lambda self: self.drive / "preferred_phi2")
    figures = property(lambda self: self.drive / "figures")
    settings = property(lambda self: self.drive / "settings.json")
    scoreboard = property(lambda self: self.drive / "scoreboard.json")
    metrics = property(lambda self: self.work / "metrics.jsonl")
    evaluation = property(lambda self: self.drive / "evaluation.json")
    evaluated = property(lambda self: self.drive / "evaluated")


@_validated
class Inference:
    """Parameters of the inference notebook."""

    drive_folder: Annotated[str, Must(str.strip, "name the folder with the results")] = DRIVE_FOLDER
    """Where everything lives, the same in every notebook: data/, checkpoints, the adapter, the finished model."""
    model_folder: str = ""
    """The published folder; "" = finetuned_phi2 in drive_folder."""
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

    folder = property(
        lambda self: Path(self.model_folder) if self.model_folder else Path(self.drive_folder) / "finetuned_phi2"
    )
    prompts = property(
        lambda self: Path(self.prompts_file) if self.prompts_file else Path(self.drive_folder) / "prompts.jsonl"
    )
    answers = property(lambda self: Path(self.drive_folder) / "answers.jsonl")


@_validated
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
    follow_rules: bool = True
    """Ask for answers under a dozen rules that a program can check."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness separated by commas, such as arc_easy,hellaswag; installed when they are set."""
    task_limit: CountOrZero = 200
    """Questions of each task; 0 = all."""
    task_folder: str = ""
    """Folder with task files (YAML) of your own for tasks; "" = the harness's own tasks alone."""
    seed: Annotated[int, Must(lambda value: value >= 0, "0 or more")] = 42
    """Draws the held-out pairs; the finetuning notebook's gives the same ones."""

    folders = property(lambda self: Folders(Path(self.drive_folder), Path(self.drive_folder)))
