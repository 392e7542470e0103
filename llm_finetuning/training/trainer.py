"""The trainer of the finetuning notebook: TRL's SFTTrainer on packed examples."""

import math

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer, pack_dataset

from llm_finetuning.settings import Finetuning
from llm_finetuning.training import qlora
from llm_finetuning.training.arguments import on_one_gpu, shared_arguments
from llm_finetuning.training.dataset import RunInputs
from llm_finetuning.training.identity import identity
from llm_finetuning.training.planning import Plan, count_steps
from llm_finetuning.training.resumable import ResumableTrainer


def pack(examples: list[dict], settings: Finetuning, plan: Plan) -> Dataset:
    """Examples as SFTTrainer takes them; packed, a sequence holds up to `plan.micro_batch_tokens` tokens.

    Packing is best-fit decreasing (arXiv 2404.10830) over examples shuffled with the seed, and never splits one.
    """
    columns = [{"input_ids": example["input_ids"], "labels": example["labels"]} for example in examples]
    data = Dataset.from_list(columns).shuffle(seed=settings.seed)
    return pack_dataset(data, plan.micro_batch_tokens, "bfd") if settings.packing else data


def batch_size(settings: Finetuning, plan: Plan) -> int:
    """Sequences per micro-batch: one that is packed, or as many of the longest examples as the tokens allow."""
    return 1 if settings.packing else max(1, plan.micro_batch_tokens // settings.max_seq_length)


def arguments(settings: Finetuning, plan: Plan, steps: int) -> SFTConfig:
    """The trainer's configuration; derived from the settings and the plan, nothing else."""
    return on_one_gpu(
        SFTConfig(
            max_length=None,
            packing=settings.packing,
            neftune_noise_alpha=noise(settings, plan),
            dataset_kwargs={"skip_prepare_dataset": True},
            **shared_arguments(settings, plan, steps, batch_size(settings, plan)),
        )
    )


class AssistantTrainer(ResumableTrainer, SFTTrainer):
    """SFTTrainer without its per-step host synchronisations, with checkpoints that are written atomically."""

    def __init__(self, model: PeftModel, settings: Finetuning, plan: Plan, inputs: RunInputs):
        packed = pack(inputs.data.examples, settings, plan)
        self.settings, self.plan, self.run_inputs = settings, plan, inputs
        batches = -(-len(packed) // batch_size(settings, plan))
        self.steps = count_steps(batches, settings, plan.accumulation * plan.processes)
        self.identity = identity(settings, plan, inputs, self.steps)
        super().__init__(
            model=model,
            args=arguments(settings, plan, self.steps),
            train_dataset=packed,
            processing_class=inputs.template.tokenizer,
        )
        qlora.cast_trainable(self.model)
        if settings.compile_layers == "yes":
            compile_layers(self.model)
        self.watch()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple:
        """Mean negative log-likelihood of the step's tokens in the loss, through TRL's fused head.

        Equal to SFTTrainer's own; its entropy and accuracy, three reads from the GPU a step, are left out.
        """
        self.note(inputs)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def noise(settings: Finetuning, plan: Plan) -> float | None:
    """NEFTune's alpha for the library, which divides it by the root of a sequence's length; None = no noise.

    arXiv 2310.05914 divides by an example's: so that packing does not weaken it, by that of an example of mean length.
    """
    examples = plan.micro_batch_tokens * plan.examples / plan.tokens if settings.packing else 1
    return settings.neftune_noise_alpha * math.sqrt(max(1, examples)) or None


def compile_layers(model: torch.nn.Module, on: bool = True) -> None:
    """Compiles each decoder layer by itself: quick to build, and adapters and 4-bit layers trace whole.

    Layers of one kind share what is compiled, for any number of tokens: once for a first layer, whose input has no
    gradient, once for the others, and both again for a micro-batch that needs no mask.
    on: False has them run as they are again.
    """
    for module in model.get_base_model().modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                if on:
                    layer.compile(dynamic=True)
                else:
                    layer._compiled_call_impl = None
