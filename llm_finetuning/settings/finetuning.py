"""The settings of the finetuning notebook."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from llm_finetuning.files.atomic import write_json
from llm_finetuning.settings.checks import (
    AUTO,
    DRIVE_FOLDER,
    MOST,
    SYSTEM_MESSAGE,
    Count,
    CountOrZero,
    Folder,
    Fraction,
    Length,
    Model,
    Must,
    NotNegative,
    Positive,
    Seed,
    Switch,
    TemplateFile,
    Texts,
    split_names,
    validated,
)
from llm_finetuning.settings.folders import Folders

TRIAL = "quick_trial"
TRIAL_PAIRS = 200
EXPERTS = "experts"
"""Among lora_target_modules: the tensors of a mixture of experts that hold all experts of a layer."""

GGUF_TYPES = {
    "f16": 16, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q4_0": 4.7, "Q3_K_M": 3.9, "Q2_K": 3.4
}  # fmt: skip
"""Types of GGUF files, with about how many bits a weight takes."""


def gguf_types(text: str) -> list[str]:
    """Splits a list of GGUF types, each once and the smallest last. Raises ValueError for one that is not known."""
    names = {name.casefold(): name for name in GGUF_TYPES}
    if unknown := [name for name in split_names(text) if name.casefold() not in names]:
        raise ValueError(f"{unknown[0]!r} is no type of GGUF file: {', '.join(GGUF_TYPES)}, separated by commas")
    asked = {names[name.casefold()] for name in split_names(text)}
    return [name for name in GGUF_TYPES if name in asked]


@validated
class Finetuning:
    """Parameters of the finetuning notebook. Lengths are in tokens, rates per optimizer step."""

    patience_on: ClassVar[str] = "held_out_loss"
    """The figure of an evaluation that early stopping goes by, the smaller the better; in words:"""
    patience_words: ClassVar[str] = "held-out loss"
    layout: ClassVar[type[Folders]] = Folders

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
    use_4bit: Switch = "yes"
    """"yes": the base in 4 bits (QLoRA) | "no": in 16 bits | "auto": in 16 bits where that costs a step nothing."""
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
    use_rslora: bool = False
    """Scale the adapters' product by lora_alpha / √lora_r instead (rsLoRA, arXiv 2312.03732)."""
    lora_dropout: Fraction = 0.0
    """Dropout before the adapters; 0 saves a fifth of the elementwise traffic."""
    use_dora: bool = False
    """Train the length of each row of a weight beside its direction (DoRA, arXiv 2402.09353); slower."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa"] = "default"
    """Of A, with B at 0: "default" | "gaussian"; "orthogonal" (of both, on 16 bits alone)."""
    lora_target_modules: Annotated[str, Must(split_names, "all-linear, or names of modules")] = "all-linear"
    """"all-linear" or names separated by commas, "experts" among them for a mixture's; no match stops the run."""
    max_steps: Annotated[int, Must(lambda value: value == -1 or 0 < value <= MOST, "-1 or above 0")] = -1
    """Number of optimizer steps; -1 = num_train_epochs decides."""
    num_train_epochs: Annotated[float, Must(math.isfinite, "above 0, and finite")] = 2.0
    """Passes over the pairs; max_steps > 0 overrides it."""
    learning_rate: Positive = 2e-4
    """Per optimizer step; 2e-4 as in arXiv 2305.14314."""
    find_learning_rate: bool = False
    """Train shortly at five rates around learning_rate first, and go on with the one of the lowest held-out loss."""
    loraplus_lr_ratio: Annotated[float, Must(lambda value: 1 <= value < float("inf"), "1 (off) or more")] = 1.0
    """The adapters' B learns at this many times the rate of A (LoRA+, arXiv 2402.12354); 1 = at the same rate."""
    neftune_noise_alpha: NotNegative = 0.0
    """Noise on the embeddings while training (NEFTune, arXiv 2310.05914, where it is 5 to 15); 0 = none."""
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
    seed: Seed = 42
    """Seed of the adapters' initial weights, of the order of the examples and of dropout."""
    tokens_per_step: CountOrZero = 8192
    """Tokens per optimizer step; the plan divides it into micro-batches that fit in memory."""
    micro_batch_tokens: CountOrZero = 0
    """Tokens per forward and backward; 0 = as many as the plan finds room for."""
    gradient_checkpointing: Literal["auto", "on", "off"] = AUTO
    """Recompute activations in the backward pass: "auto" (where memory needs it) | "on" | "off"."""
    attention: Literal["auto", "varlen", "sdpa", "eager"] = AUTO
    """Attention implementation: "auto" | "varlen" (flash attention on packed sequences) | "sdpa" | "eager"."""
    compile_layers: Switch = AUTO
    """torch.compile each decoder layer: "auto" (where the self-check measures that it pays) | "yes" | "no"."""
    allow_slow: bool = False
    """Train without a GPU even if it takes more than two hours."""
    logging_steps: Count = 1
    """Steps between two entries in the metrics."""
    save_steps: Count = 100
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
    early_stopping_patience: CountOrZero = 3
    """Keep the adapter with the best held-out loss, and stop after so many evaluations without a better; 0 = off."""
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

    @field_validator("use_dora")
    def _keeps_no_second_base(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("lora_dropout"):
            raise ValueError("= True: needs lora_dropout = 0, for with dropout every weight is kept in 16 bits too")
        return value

    @field_validator("lora_target_modules")
    def _adapts_experts_as_peft_can(cls, value: str, info: ValidationInfo) -> str:
        given = info.data
        cures = ["lora_dropout = 0"] * bool(given.get("lora_dropout")) + ["use_dora = False"] * given.get("use_dora", 0)
        cures += ["init_lora_weights = 'default'"] * (given.get("init_lora_weights") == "orthogonal")
        if EXPERTS in split_names(value) and cures:
            raise ValueError(f"= {value!r}: experts get plain LoRA alone; set {' and '.join(cures)}")
        return value

    @field_validator("compile_layers")
    def _compiles_no_adapted_experts(cls, value: str, info: ValidationInfo) -> str:
        if value == "yes" and EXPERTS in split_names(info.data.get("lora_target_modules", "")):
            raise ValueError("= 'yes': PEFT's adapters of experts cannot be compiled; set compile_layers = 'no'")
        return value

    @field_validator("init_lora_weights")
    def _can_be_merged(cls, value: str, info: ValidationInfo) -> str:
        if value == "pissa":
            raise ValueError(
                "= 'pissa': PEFT takes the adapters out of 16-bit weights and leaves a base without them, which is"
                " neither the one in 4 bits nor the one that is merged into; set 'default' or 'gaussian'"
            )
        if value == "orthogonal" and (info.data.get("use_4bit") != "no" or info.data.get("lora_r", 0) % 2):
            raise ValueError("= 'orthogonal': needs use_4bit = 'no' and an even lora_r; else set 'default'")
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

    @property
    def adapts_experts(self) -> bool:
        """Whether the tensors of a mixture's experts get adapters."""
        return EXPERTS in split_names(self.lora_target_modules)

    @property
    def patience(self) -> int:
        """Evaluations without a better held-out loss after which training stops; 0 where none is measured."""
        return self.early_stopping_patience if self.eval_steps else 0

    @property
    def unit_tokens(self) -> int:
        """Tokens of the longest thing that a micro-batch holds whole: a conversation."""
        return self.max_seq_length

    def save(self, path: Path) -> Path:
        """Writes the settings as JSON, atomically; returns its path."""
        return write_json(path, dataclasses.asdict(self))

    @property
    def folders(self) -> Folders:
        """The layout of the run's two folders; a quick trial reads the same data, and writes to folders of its own."""
        drive, work = Path(self.drive_folder), Path(self.work_folder)
        return self.layout(*(drive / TRIAL, work / TRIAL, drive / "data") if self.quick_trial else (drive, work))
