"""The trainer of the preference tuning notebook: TRL's DPOTrainer on encoded pairs, from a finetuned adapter.

Batches are padded. TRL 1.16 takes `padding_free=True` and pads all the same: its losses sum the log-probabilities of
each row, chosen above and rejected below. Unpadded for `attention.NAME`, the outputs would have to be padded again for
that, which saves what the plan prints as padding: little, for pairs of like length share a batch (`ByLength`).
Losses without a reference (ORPO) are TRL's experimental ones; KTO learns from responses by themselves, and would give
up that these stand in pairs.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from peft import PeftModel
from torch.utils.data import Sampler
from trl import DPOConfig, DPOTrainer

from llm_finetuning.data import preferences
from llm_finetuning.evaluation import mode, preference
from llm_finetuning.evaluation.intervals import Sample
from llm_finetuning.files import checksums, drive
from llm_finetuning.files.atomic import building
from llm_finetuning.settings import LOSSES, PreferenceTuning
from llm_finetuning.training import qlora
from llm_finetuning.training.arguments import on_one_gpu, shared_arguments
from llm_finetuning.training.identity import digest, identity
from llm_finetuning.training.planning import count_steps
from llm_finetuning.training.preference_data import ByLength, PreferenceData, PreferenceInputs
from llm_finetuning.training.preference_plan import PreferencePlan
from llm_finetuning.training.resumable import ResumableTrainer, less_at_once

SAME_RUN = ("loss", "beta", "sft_weight", "label_smoothing", "ld_alpha", "pairs_per_step")
"""Settings that two runs must share for one to resume the checkpoints of the other, beside those of the finetuning."""


def arguments(settings: PreferenceTuning, plan: PreferencePlan, steps: int) -> DPOConfig:
    """The trainer's configuration; derived from the settings and the plan, nothing else."""
    terms = LOSSES[settings.loss]
    return on_one_gpu(
        DPOConfig(
            max_length=None,
            loss_type=terms,
            loss_weights=[settings.sft_weight if term == "sft" else 1.0 for term in terms],
            beta=settings.beta,
            label_smoothing=settings.label_smoothing if settings.loss == "robust" else 0.0,
            ld_alpha=settings.ld_alpha if settings.ld_alpha < 1 else None,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=plan.pairs,
            **shared_arguments(settings, plan, steps, plan.pairs),
        )
    )


def stored_pairs(data: PreferenceData, ld_alpha: float, folder: Path) -> Dataset:
    """The pairs as DPOTrainer takes them, in a file below `folder`: beside it the reference's log-probabilities lie.

    Pairs of earlier runs go, and those of another `ld_alpha`: log-probabilities are weighted by it, and TRL tells them
    apart by pairs and weights alone.
    """
    rows = list(data.rows())
    place = folder / digest([json.dumps(rows), str(ld_alpha)])[:16]
    if not place.is_dir():
        drive.remove(folder, ignore_errors=True)
        with building(place) as partial:
            Dataset.from_list(rows).save_to_disk(str(partial))
    return load_from_disk(str(place))


def check_finite(rows: Dataset, folder: Path) -> None:
    """Raises FloatingPointError where the reference holds a response for impossible, and clears what is kept of it."""
    sums = zip(*(rows[f"ref_{side}_logps"] for side in preferences.SIDES), strict=True)
    if broken := [number for number, two in enumerate(sums) if not all(map(math.isfinite, two))]:
        drive.remove(folder, ignore_errors=True)
        raise FloatingPointError(
            f"the reference's log-probabilities of {len(broken)} of {len(rows)} pairs are not finite: in float16 a"
            " model can overflow (train on a GPU with bfloat16, or set dtype = 'float32'); else the base is damaged"
        )


def _no_room(plan: PreferencePlan) -> str:
    """The sentence for a pass of the reference that did not fit into the GPU's memory."""
    tokens = min(plan.micro_batch_tokens, plan.pairs * plan.settings.unit_tokens)
    fits = less_at_once(plan.settings, tokens)
    return f"the GPU ran out of memory in the reference's pass, {plan.pairs} pairs at a time. Set {fits}"


class PreferenceTrainer(ResumableTrainer, DPOTrainer):
    """DPOTrainer whose reference is the finetuned adapter that it starts from, with checkpoints written atomically.

    run_inputs: `PreferenceInputs`. The reference's log-probabilities are computed once, before the training, and kept
    on the disk and for later trainers of the same inputs; from then on the model holds one adapter alone.
    """

    loss_unit = "loss of a pair"

    def __init__(self, model: PeftModel, settings: PreferenceTuning, plan: PreferencePlan, inputs: PreferenceInputs):
        self.settings, self.plan, self.run_inputs = settings, plan, inputs
        self.steps = count_steps(-(-len(inputs.data.pairs) // plan.pairs), settings, plan.accumulation * plan.processes)
        self.identity = run_identity(settings, plan, inputs, self.steps)
        self.reference = qlora.on_cpu(qlora.gather_adapter(model))
        args = arguments(settings, plan, self.steps)
        with args.main_process_first():  # one writes the pairs, the others find them
            rows, compared = self._pairs()
        with mode.within_memory(lambda: _no_room(plan)):
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                eval_dataset=compared,
                processing_class=inputs.template.tokenizer,
            )
        model.delete_adapter("ref")
        for known in filter(None, (self.train_dataset, self.eval_dataset)):
            check_finite(known, settings.folders.reference)
        self.run_inputs = replace(inputs, rows=self.train_dataset, compared=self.eval_dataset)
        self.watch()

    def _pairs(self) -> tuple[Dataset, Dataset | None]:
        """The pairs, and the held-out ones where learning rates are compared."""
        inputs, alpha, folder = self.run_inputs, self.settings.ld_alpha, self.settings.folders.reference
        if inputs.rows is not None:
            return inputs.rows, inputs.compared
        held_out = PreferenceData(inputs.ranked, len(inputs.ranked))
        compared = stored_pairs(held_out, alpha, folder / "held_out") if self.settings.find_learning_rate else None
        return stored_pairs(inputs.data, alpha, folder / "pairs"), compared

    def _prepare_dataset(self, dataset: Dataset, *others: object) -> Dataset:
        """The rows as they are: they are encoded already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Has the reference compute as the finetuned model does, unless its log-probabilities are known.

        TRL has rounded the adapter that is trained to bfloat16 by now: it gets its float32 values back.
        """
        qlora.set_trained(qlora.cast_trainable(qlora.use_master_weights(self.model)), self.reference)
        if "ref_chosen_logps" in dataset.column_names:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return ByLength(self.run_inputs.data.padded, self.plan.pairs, self.settings.seed)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple:
        """TRL's loss of a micro-batch of pairs."""
        self.note(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def row_tokens(self, row: dict) -> int:
        """Tokens of a pair in a batch of its own."""
        return 2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))

    def forget(self) -> None:
        """Forgets what was counted before the training, TRL's averages too."""
        super().forget()
        self._metrics["train"].clear()

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds what TRL counted of the pairs since the entry before: rewards, margins, log-likelihoods."""
        means = {name: sum(values) / len(values) for name, values in self._metrics["train"].items() if values}
        self._metrics["train"].clear()
        super().log(logs | means, start_time)

    @mode.within_memory(mode.while_measuring)
    def held_out_losses(self) -> Sample:
        """The loss that is minimised, of each held-out pair: finer than the accuracy, which counts whole pairs."""
        with mode.evaluating(self.model):
            losses = [self._loss_of(row) for row in self.run_inputs.compared]
        self._metrics["eval"].clear()
        return Sample(losses, [1.0] * len(losses))

    def _loss_of(self, row: dict) -> float:
        inputs = self._prepare_inputs(self.data_collator([row]))
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return DPOTrainer.compute_loss(self, self.model, inputs).item()

    def figures(self) -> dict:
        """Accuracy, margin, log-likelihoods and the divergence from the reference on held-out pairs."""
        ranked, template = self.run_inputs.ranked, self.run_inputs.template
        found = preference.likelihoods(self.model, ranked, template) | {"kl": self.divergence()}
        values = {name: found[name].value for name in preference.WATCHED}
        return values | {"disagreement": 1 - values["accuracy"]}

    def divergence(self) -> preference.Sample:
        """The divergence from the reference on held-out responses (`preference.divergence`)."""
        examples = [pair["chosen"] for pair in self.run_inputs.ranked[: preference.COMPARED]]
        return preference.divergence(self.model, lambda: qlora.holding(self.model, self.reference), examples)


def run_identity(settings: PreferenceTuning, plan: PreferencePlan, inputs: PreferenceInputs, steps: int) -> dict:
    """What two runs must share for one to resume the other's checkpoints; written to run.json in each of them."""
    shared = identity(settings, plan, inputs, steps)
    measured = (json.dumps(pair[side]["input_ids"]) for pair in inputs.ranked for side in preferences.SIDES)
    return (
        shared
        | {name: getattr(settings, name) for name in SAME_RUN}
        | {
            "held_out": digest([shared["held_out"], *measured]),
            "adapter": checksums.hash_together(sorted(Path(settings.adapter_folder).glob("*.safetensors"))),
        }
    )
