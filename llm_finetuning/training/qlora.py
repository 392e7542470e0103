"""The frozen base in 4 bits, and the LoRA adapters on it, which alone are trained."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from llm_finetuning import hardware, models
from llm_finetuning.settings import EXPERTS, Finetuning, split_names
from llm_finetuning.training import attention, experts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from llm_finetuning.training.planning import Plan


BEYOND_LORA = (
    *("fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication"),
    *("trainable_token_indices", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
"""Entries of an adapter's configuration by which it is another function than scaled products beside the base."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""First weights of an adapter that PEFT takes out of the base: the adapter belongs to what was left of it."""


def beyond_lora(config: dict) -> list[str]:
    """What in an adapter_config.json makes of an adapter more than LoRA or DoRA on an unchanged base."""
    start = str(config.get("init_lora_weights")).lower().partition("_niter")[0]  # 'pissa_niter_16' is 'pissa'
    found = [name for name in BEYOND_LORA if config.get(name)]
    found += [f"bias = {config.get('bias')}"] * (config.get("bias") not in (None, "none"))
    return found + [f"init_lora_weights = {start}"] * (start in CHANGE_THE_BASE)


def load_base(settings: Finetuning, plan: "Plan") -> "PreTrainedModel":
    """Loads the frozen base to the plan's device, in 4 bits where the plan says so, without cache and router logits.

    On a CPU it also sets the threads that suit the model's size.
    """
    from transformers import AutoModelForCausalLM

    if plan.device == "cpu":
        torch.set_num_threads(hardware.threads_for(plan.size.total, plan.machine.cores))
        if plan.size.total >= hardware.LARGE:
            hardware.return_large_blocks()
    config = models.one_kernel_gelu(models.configuration(str(plan.model_path)))
    if plan.attention == attention.NAME:
        attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        plan.model_path,
        config=config,
        dtype=plan.dtype,
        attn_implementation=plan.attention,
        quantization_config=quantization(settings, plan) if plan.four_bit else None,
        device_map={"": plan.device},
        use_safetensors=True,
        trust_remote_code=False,
    )
    model.config.use_cache = model.config.get_text_config().output_router_logits = False
    return prepare_cpu_kernels(unmap_weights(model)) if plan.device == "cpu" else model


def unmap_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """Copies weights that still lie in the mapped checkpoint file, so that the file can be closed."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    hardware.free_memory()
    return model


def quantization(settings: Finetuning, plan: "Plan") -> "BitsAndBytesConfig":
    """The 4-bit configuration of a run.

    FSDP shards floating tensors alone: for shards the 4-bit weights are stored under the name of the plan's dtype.
    """
    return models.four_bit(
        plan.dtype,
        settings.bnb_4bit_quant_type,
        settings.bnb_4bit_use_double_quant,
        plan.dtype if plan.shards > 1 else None,
    )


def prepare_cpu_kernels(model: "PreTrainedModel") -> "PreTrainedModel":
    """Keeps bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    The repacked form serves inference only: after it a training step fails and `dequantize()` returns garbage
    (bitsandbytes#2078).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


class MasterWeightLinear(torch.nn.Linear):
    """A linear layer whose float32 weight is copied to the dtype of its input each time it computes.

    An optimizer step is often smaller than half a step of bfloat16 and would be lost in a 16-bit weight; in the
    master weight it is kept (arXiv 1710.03740, section 3.1).
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(values, self.weight.to(values.dtype))


def add_adapters(model: "PreTrainedModel", settings: Finetuning) -> "PeftModel":
    """Adds LoRA adapters to the intended modules of every layer; the base stays frozen.

    The adapters compute in the dtype of their input (`MasterWeightLinear`). Raises ValueError when a target name
    matches no module.
    """
    from peft import LoraConfig, get_peft_model

    targets = target_names(model, settings.lora_target_modules)
    experts.check_linears(model, targets)
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init_lora_weights == "default" else settings.init_lora_weights,
        target_modules=targets,
        target_parameters=experts.names(model) if settings.adapts_experts else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    return use_master_weights(get_peft_model(model, config))


def use_master_weights(model: "PeftModel") -> "PeftModel":
    """Has every adapter of the model compute in the dtype of its input, and in one operation with its base."""
    from peft.tuners.lora import LoraLayer

    from llm_finetuning.training.fused_lora import fuse

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # PEFT would cast the input to the weight's dtype instead
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.__class__ = MasterWeightLinear
    return model if model.dtype == torch.float16 else fuse(model)  # float16 trains under autocast


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear module by its full name, the output embedding left out."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def adapted_modules(model: torch.nn.Module, settings: Finetuning) -> dict[str, torch.nn.Linear]:
    """The linear modules that get an adapter, by their full name."""
    targets = target_names(model, settings.lora_target_modules)
    return {name: m for name, m in linear_modules(model).items() if name.rsplit(".", 1)[-1] in targets}


def target_names(model: torch.nn.Module, wanted: str) -> list[str]:
    """'all-linear' or 'q_proj, v_proj' → the sorted last names of the modules that get an adapter."""
    known = Counter(name.rsplit(".", 1)[-1] for name in linear_modules(model))
    if not known:
        raise ValueError(
            f"{model.config.model_type} has no linear layers that can be quantised and adapted (GPT-2's are Conv1D):"
            " set model_name to another base"
        )
    names, head = [name for name in split_names(wanted) if name != EXPERTS], model.get_output_embeddings()
    if names == ["all-linear"]:
        return sorted(known)
    if refused := [
        name for name, module in model.named_modules() if module is head and name.rsplit(".", 1)[-1] in names
    ]:
        raise ValueError(
            f"lora_target_modules: {refused[0]} is the output layer, which gets no adapter here: leave it out"
        )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"lora_target_modules: {', '.join(unknown)} match no linear module of this model; it has"
            f" {', '.join(sorted(known))}"
        )
    return sorted(set(names))


def coverage(model: "PeftModel") -> pd.DataFrame:
    """Tabulates the adapters by target name: modules with an adapter, modules of that name, layers, trained parameters.

    Raises ValueError when a target is missing in some layer.
    """
    from peft.tuners.lora import LoraLayer

    rows: dict[str, dict] = {}
    targets = model.peft_config["default"].target_modules
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in targets and isinstance(module, (LoraLayer, torch.nn.Linear)) and ".base_layer" not in name:
            row = rows.setdefault(last, {"module": last, "adapted": 0, "of": 0, "parameters": 0})
            row["of"] += 1
            row["adapted"] += isinstance(module, LoraLayer)
            row["parameters"] += sum(p.numel() for n, p in module.named_parameters() if "lora_" in n)
    table = pd.DataFrame([*sorted(rows.values(), key=lambda row: row["module"]), *experts.coverage(model)])
    short = table[table.adapted != table.of]
    if len(short):
        raise ValueError(f"adapters are missing on:\n{short.to_string(index=False)}")
    return table


def cast_trainable(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Casts the parameters that are trained to `dtype`: SFTTrainer leaves the adapters of a 4-bit model in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def gather_adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, gathered where the model is sharded (FSDP): every rank must call it together."""
    from torch.distributed.tensor import DTensor

    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}


def on_cpu(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy in main memory of what `gather_adapter` gave; later steps leave it as it is."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in whole.items()}


def save_adapter_weights(model: "PeftModel", whole: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes what `gather_adapter` gave as PEFT does; the base is not looked for on the Hub."""
    config = model.peft_config["default"]
    if isinstance(config.target_modules, set):  # which has another order in each process
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, state_dict=whole, save_embedding_layers=False)


def saved_name(name: str) -> str:
    """The name of a trained parameter → its key in the file that PEFT saves."""
    return name.replace(".default.", ".").replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def set_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Copies the adapter that PEFT saved in `folder` into the model's, which may be sharded.

    Raises ValueError when a tensor is missing there, has another shape, or has no place in the model.
    """
    from peft import load_peft_weights

    saved = load_peft_weights(str(folder), device="cpu")
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    keys = {name: saved_name(name) for name in shapes}
    if missing := [key for key in keys.values() if key not in saved]:
        raise ValueError(f"{folder} lacks {missing[0]}: it is not an adapter of this run")
    if foreign := saved.keys() - keys.values():
        raise ValueError(f"{folder} has {min(foreign)} too, which this model does not train: it is of another run")
    if wrong := [name for name, key in keys.items() if saved[key].shape != shapes[name]]:
        found, expected = (tuple(shape) for shape in (saved[keys[wrong[0]]].shape, shapes[wrong[0]]))
        raise ValueError(f"{keys[wrong[0]]} in {folder} is {found}, and {expected} here: it is of another model")
    set_trained(model, {name: saved[key] for name, key in keys.items()})


def set_trained(model: torch.nn.Module, whole: dict[str, torch.Tensor]) -> None:
    """Copies what `gather_adapter` gave back into the trained parameters, which may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = whole[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(value)


@contextmanager
def holding(model: torch.nn.Module, whole: dict[str, torch.Tensor]) -> Iterator[torch.nn.Module]:
    """Runs the block with the trained parameters `whole`; those before come back to the bit."""
    before = {name: tensor.clone() for name, tensor in gather_adapter(model).items()}
    set_trained(model, whole)
    try:
        yield model
    finally:
        set_trained(model, before)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a 4-bit tensor counts the weights it holds, not its bytes."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(_numel(p) for p in model.parameters())
    return trained, every


def _numel(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
