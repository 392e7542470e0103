"""The settings behind the notebooks' parameters cells: one dataclass a notebook, validated as a whole.

A parameters cell holds literals; the cell after it calls `from_cell(Finetuning, globals())`. Nothing of the
package and no heavy library is imported here, so a typing mistake is answered at once.
"""

import dataclasses
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
        raise ValueError(
            "\n".join(f"{name} is missing: the parameters cell has to define it" for name in missing)
        )
    values = {name: namespace[name] for name in fields}
    values |= {name: float(v) for name, v in values.items() if fields[name] is float and type(v) is int}
    return settings_class(**values)


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


def split_names(text: str) -> list[str]:
    """'en, de' → ['en', 'de']; an empty text → []."""
    return [name for name in re.split(r"[,\s]+", text) if name]


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
    """Go on from the newest complete checkpoint; False starts afresh and leaves old ones where they are."""
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
                    f"micro_batch_tokens = {self.micro_batch_tokens}: 0 or at least {self.max_seq_length} (max_seq_length)",
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
    scoreboard = property(lambda self: self.drive / "scoreboard.json")
    metrics = property(lambda self: self.drive / "metrics.jsonl")
