"""The settings behind the notebooks' parameters cells: one dataclass a notebook, validated as a whole.

A parameters cell holds literals; the cell after it calls `from_cell(Finetuning, globals())`. Nothing of the
package and no heavy library is imported here, so a typing mistake is answered at once.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

AUTO = "auto"


def from_cell(settings_class: type, namespace: dict):
    """The settings of a notebook from the names its parameters cell defined.

    Every field of `settings_class` must be a name in `namespace`. Whole numbers are accepted for floats.
    Raises ValueError that lists every missing name, wrong type and impossible value at once.
    """
    fields = {field.name: field.type for field in dataclasses.fields(settings_class)}
    missing = [name for name in fields if name not in namespace]
    if missing:
        raise ValueError("\n".join(f"{name} is missing: the parameters cell has to define it" for name in missing))
    values = {name: namespace[name] for name in fields}
    values |= {name: float(v) for name, v in values.items() if fields[name] is float and type(v) is int}
    return settings_class(**values)


def from_file(settings_class: type, path: str | Path):
    """The settings that `save` wrote. Raises FileNotFoundError, or ValueError like `from_cell`."""
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


def _wrong_types(settings) -> list[str]:
    return [
        f"{field.name} = {value!r}: expected {field.type.__name__}, found {type(value).__name__}"
        for field in dataclasses.fields(settings)
        if type(value := getattr(settings, field.name)) is not field.type
    ]


def _raise_all(settings, rules: list[tuple[bool, str]]) -> None:
    """Raises one ValueError with all problems; `rules` pairs what must hold with what to say when it does not."""
    problems = [message for holds, message in rules if not holds]
    if problems:
        raise ValueError(f"{type(settings).__name__} settings:\n" + "\n".join(problems))


def sampling_rules(options) -> list[tuple[bool, str]]:
    """The ranges of the sampling parameters, as (holds, what to say when it does not)."""
    return [
        (options.max_new_tokens >= 1, f"max_new_tokens = {options.max_new_tokens}: at least 1"),
        (options.max_seconds >= 0, f"max_seconds = {options.max_seconds}: 0 (no limit) or more"),
        (0 <= options.temperature <= 5, f"temperature = {options.temperature}: from 0 (greedy) to 5"),
        (0 < options.top_p <= 1, f"top_p = {options.top_p}: above 0, at most 1"),
        (options.top_k >= 0, f"top_k = {options.top_k}: 0 (all) or more"),
        (options.repetition_penalty > 0, f"repetition_penalty = {options.repetition_penalty}: above 0"),
        (options.seed >= -1, f"seed = {options.seed}: -1 (another each time), 0 or more"),
    ]


def split_names(text: str) -> list[str]:
    """'en, de' → ['en', 'de']; an empty text → []."""
    return [name for name in re.split(r"[,\s]+", text) if name]


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


@dataclass(frozen=True)
class DataPrep:
    """Parameters of both data preparation notebooks. A filter at "auto" (-1 for a number) follows `replies`."""

    drive_folder: str
    """Where the results live: the pairs and their report go to data/, the plots to figures/."""
    source: str
    """Dataset id on the Hub, "sample", or a file of message trees, of messages, or of pairs of your own."""
    source_revision: str
    """Branch, tag or commit of the dataset on the Hub; resolved to a commit and recorded."""
    model_name: str
    """Its tokenizer counts the tokens."""
    tokenizer_folder: str
    """Local folder with the tokenizer; "" = that of model_name."""
    system_message: str
    """Stands before every conversation that has none of its own, and counts in its length; "" = none."""
    replies: str
    """"best" reply to each prompt, "all" replies, or "joined" as in the original notebooks."""
    max_seq_length: int
    """Longest conversation in tokens, as in the finetuning notebook."""
    validation_share: float
    """Share of the trees that are validation, for a source without splits of its own."""
    on_error: str
    """"raise": a broken tree stops the run; "skip": it is left out, counted and named."""
    languages: str
    """Codes separated by commas; "" = all."""
    tree_states: str
    """States separated by commas; "" = all."""
    drop_deleted: str
    """"yes" | "no" | "auto"; a deleted message takes along what was said after it."""
    drop_unreviewed: str
    """"yes" | "no" | "auto"; a message rejected in review (review_result false) does so too."""
    drop_synthetic: str
    """"yes" | "no" | "auto"; replies written by a model."""
    min_quality: float
    """Lowest quality label of a reply, 0 to 1; 0 = off."""
    max_toxicity: float
    """Highest toxicity label of a reply, 0 to 1; 1 = off."""
    max_detoxify: float
    """Highest toxicity of a reply by the detoxify model, 0 to 1; 1 = off."""
    min_response_chars: int
    """Shortest reply in characters; 0 = off."""
    drop_too_long: str
    """"yes" | "no" | "auto"; cut the oldest turns to max_seq_length, leave out what is longer without any."""
    drop_duplicates: str
    """"yes" | "no" | "auto"; of equal prompts with equal history the first stays."""
    near_duplicates: float
    """Similarity from which on two prompts count as equal, 0 to 1; 0 = off."""
    remove_leaks: bool
    """Take out of the training file what also stands in the validation file."""
    leak_similarity: float
    """Similarity from which on a prompt in both files is a leak, 0 to 1; 0 = equal prompts only."""

    def __post_init__(self):
        problems = _wrong_types(self)
        if problems:
            raise ValueError("DataPrep settings:\n" + "\n".join(problems))
        shares = ("min_quality", "max_toxicity", "max_detoxify", "near_duplicates")
        switches = [name for name, off in NO_FILTERS.items() if off == "no"]
        choices = {"replies": ("best", "all", "joined"), "on_error": ("raise", "skip")}
        choices |= dict.fromkeys(switches, (AUTO, "yes", "no"))
        values = vars(self)
        _raise_all(
            self,
            [
                *[
                    (values[name].strip() != "", f"{name} is empty")
                    for name in ("drive_folder", "source", "source_revision", "model_name")
                ],
                *[
                    (values[name] in allowed, f"{name} = {values[name]!r}: one of {', '.join(allowed)}")
                    for name, allowed in choices.items()
                ],
                *[
                    (
                        values[name] == -1 or 0 <= values[name] <= 1,
                        f"{name} = {values[name]}: 0 to 1, or -1 for auto",
                    )
                    for name in shares
                ],
                (self.max_seq_length >= 16, f"max_seq_length = {self.max_seq_length}: at least 16 tokens"),
                (
                    0 < self.validation_share < 1,
                    f"validation_share = {self.validation_share}: between 0 and 1",
                ),
                (
                    self.min_response_chars >= -1,
                    f"min_response_chars = {self.min_response_chars}: -1 or more",
                ),
                (0 <= self.leak_similarity <= 1, f"leak_similarity = {self.leak_similarity}: 0 to 1"),
            ],
        )

    @property
    def filters(self) -> dict:
        """The filters as they act, "auto" and -1 replaced."""
        defaults = NO_FILTERS if self.replies == "joined" else PHI2_FILTERS
        return {
            name: default if getattr(self, name) in (AUTO, -1) else getattr(self, name)
            for name, default in defaults.items()
        }

    @property
    def folders(self) -> "Folders":
        return Folders(Path(self.drive_folder), Path(self.drive_folder))


@dataclass(frozen=True)
class Finetuning:
    """Parameters of the finetuning notebook. Lengths are in tokens, rates per optimizer step."""

    drive_folder: str
    """Where the run's results live: data/ is read from it; checkpoints, adapter and merged model go to it."""
    work_folder: str
    """Fast local disk that is written first; the same as drive_folder when there is no Drive."""
    model_name: str
    """Hub id, local folder, or "sample" / "rehearsal" (made on the spot)."""
    model_revision: str
    """Branch, tag or commit of the base on the Hub; resolved to a commit and recorded."""
    tokenizer_folder: str
    """Tokenizer for model_name = "rehearsal"; "" = the sample's."""
    system_message: str
    """Stands before every conversation that has none of its own; "" = none."""
    max_seq_length: int
    """Longest conversation in tokens; older turns are cut first, then the pair is left out and counted."""
    packing: bool
    """Fill each row of a micro-batch with several conversations, isolated from one another."""
    use_4bit: bool
    """Load the base in 4 bits (QLoRA); False trains LoRA on the 16-bit base."""
    bnb_4bit_quant_type: str
    """"nf4" (arXiv 2305.14314) or "fp4"."""
    bnb_4bit_use_double_quant: bool
    """Quantise the quantisation constants too: 0.37 bits per weight less (arXiv 2305.14314, section 3)."""
    dtype: str
    """"auto" | "bfloat16" | "float16" | "float32": what the computation runs in."""
    lora_r: int
    """Rank of the adapters."""
    lora_alpha: int
    """The adapters' product is scaled by lora_alpha / lora_r (arXiv 2106.09685, section 4.1)."""
    lora_dropout: float
    """Dropout before the adapters; 0 saves a fifth of the elementwise traffic."""
    lora_target_modules: str
    """"all-linear" or names separated by commas; a name that matches nothing stops the run."""
    num_train_epochs: float
    """Passes over the pairs; max_steps > 0 overrides it."""
    max_steps: int
    """Number of optimizer steps; -1 = num_train_epochs decides."""
    learning_rate: float
    """Per optimizer step; 2e-4 as in arXiv 2305.14314."""
    lr_scheduler_type: str
    """A name of transformers.SchedulerType, such as "constant_with_warmup", "cosine", "linear"."""
    warmup_ratio: float
    """Share of the steps over which the learning rate rises."""
    weight_decay: float
    """AdamW's decoupled weight decay."""
    max_grad_norm: float
    """Gradients are clipped to this norm; 0.3 as in arXiv 2305.14314."""
    optim: str
    """"auto" or a name of transformers.OptimizerNames."""
    seed: int
    """Of the adapters' start, the order of rows and dropout."""
    tokens_per_step: int
    """Tokens per optimizer step; the plan divides it into micro-batches that fit in memory."""
    micro_batch_tokens: int
    """Tokens per forward and backward; 0 = as many as the plan finds room for."""
    gradient_checkpointing: str
    """"auto" | "on" | "off"."""
    attention: str
    """"auto" | "varlen" | "sdpa" | "eager"."""
    compile_layers: bool
    """torch.compile each decoder layer: pays on long runs on a fast GPU."""
    logging_steps: int
    """Steps between two entries in the metrics."""
    save_steps: int
    """Steps between two checkpoints."""
    save_total_limit: int
    """Checkpoints that are kept."""
    eval_steps: int
    """Steps between two evaluations on the held-out set; 0 = none while training."""
    eval_pairs: int
    """Pairs of the fixed held-out set whose loss is measured."""
    eval_answers: int
    """Prompts of the fixed held-out set that are answered for the scoreboard."""
    max_new_tokens: int
    """Longest answer on the scoreboard."""
    judge_exact_match: bool
    """Also count answers equal to the reference; means something only where one answer is right."""
    early_stopping_patience: int
    """Stop after this many evaluations without a better held-out loss, and keep the best; 0 = off."""
    resume: bool
    """Go on from the newest complete checkpoint; False starts afresh and moves old ones aside, here and on Drive."""
    report_to: str
    """"tensorboard", "wandb", …, or "none"."""
    merge_base: str
    """"best" (measure both) | "dequantized" (what was trained on) | "original" (the 16-bit weights)."""
    publish_to: str
    """"folder" (drive_folder) or "hub" (drive_folder, then hub_repository)."""
    hub_repository: str
    """User/name on the Hub, for publish_to = "hub"."""
    rate_per_hour: float
    """What an hour of this machine costs; 0 = not known."""

    def __post_init__(self):
        problems = _wrong_types(self)
        if problems:
            raise ValueError("Finetuning settings:\n" + "\n".join(problems))
        choice = self._one_of
        _raise_all(
            self,
            [
                (self.model_name.strip() != "", "model_name is empty: a hub id, a folder, or sample"),
                (self.drive_folder != "", "drive_folder is empty: name the folder for the results"),
                (self.work_folder != "", "work_folder is empty: name a folder on the local disk"),
                (self.max_seq_length >= 16, f"max_seq_length = {self.max_seq_length}: at least 16 tokens"),
                (self.lora_r >= 1, f"lora_r = {self.lora_r}: at least 1"),
                (self.lora_alpha >= 1, f"lora_alpha = {self.lora_alpha}: at least 1"),
                (0 <= self.lora_dropout < 1, f"lora_dropout = {self.lora_dropout}: from 0 to below 1"),
                (self.lora_target_modules.strip() != "", "lora_target_modules is empty: all-linear"),
                (
                    self.num_train_epochs > 0 or self.max_steps > 0,
                    f"num_train_epochs = {self.num_train_epochs}: above 0, or set max_steps",
                ),
                (self.max_steps == -1 or self.max_steps > 0, f"max_steps = {self.max_steps}: -1 or above 0"),
                (self.learning_rate > 0, f"learning_rate = {self.learning_rate}: above 0"),
                (0 <= self.warmup_ratio < 1, f"warmup_ratio = {self.warmup_ratio}: from 0 to below 1"),
                (self.weight_decay >= 0, f"weight_decay = {self.weight_decay}: 0 or more"),
                (self.max_grad_norm >= 0, f"max_grad_norm = {self.max_grad_norm}: 0 or more"),
                (
                    self.tokens_per_step >= self.max_seq_length,
                    f"tokens_per_step = {self.tokens_per_step}: at least max_seq_length ({self.max_seq_length})",
                ),
                (
                    self.micro_batch_tokens == 0 or self.micro_batch_tokens >= self.max_seq_length,
                    f"micro_batch_tokens = {self.micro_batch_tokens}: 0 or at least max_seq_length"
                    + f" ({self.max_seq_length})",
                ),
                *[
                    (getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: at least 1")
                    for name in ("logging_steps", "save_steps", "save_total_limit", "eval_pairs")
                ],
                *[
                    (getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: 0 or more")
                    for name in ("eval_steps", "eval_answers", "early_stopping_patience", "rate_per_hour")
                ],
                (self.max_new_tokens >= 1, f"max_new_tokens = {self.max_new_tokens}: at least 1"),
                (
                    self.early_stopping_patience == 0 or self.eval_steps > 0,
                    "early_stopping_patience needs eval_steps above 0",
                ),
                choice("bnb_4bit_quant_type", "nf4", "fp4"),
                choice("dtype", AUTO, "bfloat16", "float16", "float32"),
                choice("gradient_checkpointing", AUTO, "on", "off"),
                choice("attention", AUTO, "varlen", "sdpa", "eager"),
                choice("merge_base", "best", "dequantized", "original"),
                choice("publish_to", "folder", "hub"),
                (
                    self.publish_to != "hub" or "/" in self.hub_repository,
                    f"hub_repository = {self.hub_repository!r}: publish_to = 'hub' needs user/name",
                ),
            ],
        )

    def _one_of(self, name: str, *allowed: str) -> tuple[bool, str]:
        value = getattr(self, name)
        return value in allowed, f"{name} = {value!r}: one of {', '.join(allowed)}"

    def save(self, path: Path) -> Path:
        """Writes the settings as JSON, beside and renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        return partial.replace(path)

    @property
    def folders(self) -> "Folders":
        return Folders(Path(self.drive_folder), Path(self.work_folder))


@dataclass(frozen=True)
class Folders:
    """The layout of a run; the same on Drive and on a disk."""

    drive: Path
    work: Path

    train_file = property(lambda self: self.drive / "data" / "finetuning_data_train.jsonl")
    val_file = property(lambda self: self.drive / "data" / "finetuning_data_val.jsonl")
    checkpoints = property(lambda self: self.work / "checkpoints")
    adapter = property(lambda self: self.work / "adapter")
    merged = property(lambda self: self.work / "merged")
    base = property(lambda self: self.drive / "base")
    published = property(lambda self: self.drive / "finetuned_phi2")
    figures = property(lambda self: self.drive / "figures")
    settings = property(lambda self: self.drive / "settings.json")
    scoreboard = property(lambda self: self.drive / "scoreboard.json")
    metrics = property(lambda self: self.drive / "metrics.jsonl")


@dataclass(frozen=True)
class Inference:
    """Parameters of the inference notebook."""

    drive_folder: str
    """Where the run's results live; answers.jsonl is written to it."""
    model_folder: str
    """The published folder; "" = finetuned_phi2 in drive_folder."""
    model_name: str
    """The base to compare with: hub id, local folder, "sample" or "rehearsal"; "" = no comparison."""
    tokenizer_folder: str
    """As in the finetuning notebook: the tokenizer that model_name = "rehearsal" was made with."""
    backend: str
    """"auto" (the fastest here, measured once) or a name of `backends.NAMES`."""
    questions: list
    """Questions to ask; [] = the first prompts of the validation file, or general ones without a file."""
    conversation: list
    """What the user says, turn by turn; [] = a conversation of the validation file, or a general one."""
    prompts_file: str
    """JSONL to answer, one {"prompt": …} a line, optionally with "history"; "" = the questions above."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    max_seconds: float
    """Longest time for one answer; 0 = no limit."""
    temperature: float
    """0 = always the likeliest token; sampling above it."""
    top_p: float
    """Sample from the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    top_k: int
    """Sample from this many of the likeliest tokens; 0 = all."""
    repetition_penalty: float
    """Makes tokens that were there already less likely; 1 = off."""
    seed: int
    """Of the sampling; -1 = another one each time."""
    batch_size: int
    """Prompts of the file that are answered side by side."""
    chat_box: bool
    """Show a box to chat in at the end of the notebook."""

    def __post_init__(self):
        problems = _wrong_types(self)
        if problems:
            raise ValueError("Inference settings:\n" + "\n".join(problems))
        texts = [*self.questions, *self.conversation]
        _raise_all(
            self,
            [
                (self.drive_folder != "", "drive_folder is empty: name the folder with the results"),
                (
                    all(type(t) is str and t.strip() for t in texts),
                    "questions, conversation: texts, none empty",
                ),
                *sampling_rules(self),
                (self.batch_size >= 1, f"batch_size = {self.batch_size}: at least 1"),
            ],
        )

    folder = property(
        lambda self: Path(self.model_folder) if self.model_folder else Path(self.drive_folder) / "finetuned_phi2"
    )
    prompts = property(
        lambda self: Path(self.prompts_file) if self.prompts_file else Path(self.drive_folder) / "prompts.jsonl"
    )
    answers = property(lambda self: Path(self.drive_folder) / "answers.jsonl")
