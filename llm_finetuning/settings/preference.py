"""The settings of the preference tuning notebook: those of the finetuning, with other defaults, and what pairs need."""

from typing import Annotated, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from llm_finetuning.settings.checks import (
    Count,
    CountOrZero,
    Fraction,
    Must,
    NotNegative,
    Positive,
    Share,
    Switch,
    validated,
)
from llm_finetuning.settings.finetuning import Finetuning
from llm_finetuning.settings.folders import Folders, PreferenceFolders

LOSSES = {
    "sigmoid": ["sigmoid"],
    "sigmoid + sft": ["sigmoid", "sft"],
    "robust": ["robust"],
    "sigmoid_norm": ["sigmoid_norm"],
    "ipo": ["ipo"],
}
"""Losses by the names that the notebook takes, as TRL's terms of a sum."""


@validated
class PreferenceTuning(Finetuning):
    """Parameters of the preference tuning notebook. Lengths are in tokens, rates per optimizer step."""

    without_line: ClassVar[tuple[str, ...]] = (
        *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        *("use_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
        *("train_on", "packing", "tokens_per_step", "compile_layers"),
    )
    """Settings of the finetuning that its adapter decides (`preference_start`), or that pairs do not use."""
    patience_on: ClassVar[str] = "disagreement"
    layout: ClassVar[type[Folders]] = PreferenceFolders
    patience_words: ClassVar[str] = "share of held-out pairs in which the rejected response is the more probable one"

    adapter_folder: str = ""
    """Folder of the adapter to start from; "" = that of the finetuning notebook, in drive_folder."""
    loss: Literal["sigmoid", "sigmoid + sft", "robust", "sigmoid_norm", "ipo"] = "sigmoid"
    """"sigmoid" (arXiv 2305.18290) | "sigmoid + sft" | "robust" to noisy ranks | "sigmoid_norm" (per token) | "ipo"."""
    beta: Positive = 0.1
    """How strongly the model is held to what it was before: smaller lets it go further."""
    sft_weight: NotNegative = 1.0
    """With "sigmoid + sft": weight of the negative log-likelihood per token of the chosen responses."""
    label_smoothing: Annotated[float, Must(lambda value: 0 <= value < 0.5, "from 0 to below 0.5")] = 0.1
    """With "robust": the share of the ranks that are taken to be wrong (arXiv 2403.00409)."""
    ld_alpha: Share = 1.0
    """Weight of the tokens by which a response is longer than the other one (arXiv 2409.06411); 1 = as all others."""
    pairs_per_step: Count = 32
    """Preference pairs per optimizer step; the plan divides them into micro-batches that fit in memory."""
    learning_rate: Positive = 5e-6
    """Per optimizer step; far below the finetuning's: the model is to stay close to what it was."""
    num_train_epochs: float = 1.0
    """Passes over the pairs; max_steps > 0 overrides it."""
    lr_scheduler_type: str = "cosine"
    """A name of transformers.SchedulerType, such as "constant_with_warmup", "cosine", "linear"."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm."""
    packing: bool = False
    """Not for pairs: both responses stand in one batch, padded to the longest of it."""
    compile_layers: Switch = "no"
    """Not for pairs, whose batches have many lengths."""
    save_steps: Count = 50
    """Steps between two checkpoints."""
    eval_steps: CountOrZero = 50
    """Steps between two evaluations on the held-out set; 0 = none while training."""
    early_stopping_patience: CountOrZero = 0
    """Stop after this many evaluations without a better held-out accuracy, and keep the best; 0 = off."""

    @field_validator("micro_batch_tokens")
    def _holds_the_longest_conversation(cls, value: int, info: ValidationInfo) -> int:
        longest = 2 * info.data.get("max_seq_length", 0)
        if value and value < longest:
            raise ValueError(f"= {value}: 0 or at least twice max_seq_length ({longest}), a pair's two responses")
        return value

    @field_validator("neftune_noise_alpha")
    def _is_not_for_pairs(cls, value: float, info: ValidationInfo) -> float:
        if value:
            raise ValueError(f"= {value!r}: in the finetuning notebook alone")
        return value

    @property
    def unit_tokens(self) -> int:
        """Tokens of the longest pair, chosen and rejected."""
        return 2 * self.max_seq_length
