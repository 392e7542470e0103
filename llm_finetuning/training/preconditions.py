"""What late stages need, checked before the base is loaded: a mistake costs seconds, not a download or a training."""

import difflib
import netrc
import os
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import PretrainedConfig, SchedulerType, Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from llm_finetuning import colab, models
from llm_finetuning.hardware import as_gib, readable_seconds
from llm_finetuning.prompts import IGNORE_INDEX
from llm_finetuning.settings import AUTO, Finetuning
from llm_finetuning.training.dataset import RunInputs
from llm_finetuning.training.memory import verification_memory

if TYPE_CHECKING:
    from llm_finetuning.training.planning import Plan

SLOW = 2 * 3600
"""Seconds of training from which on a machine without a GPU needs `allow_slow`."""
LOGINS = {"wandb": ("WANDB_API_KEY", "WANDB_MODE", "api.wandb.ai"), "comet_ml": ("COMET_API_KEY", "COMET_MODE", "")}
"""By report_to: environment variable with the key, variable that may say "offline" or "disabled", host in ~/.netrc."""
NEEDS_A_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules that Trainer steps with a metric, which it does not have here: evaluations are our own."""


def check_names(settings: Finetuning) -> None:
    """Raises one ValueError with every parameter that names what another library or the Hub does not know or allow."""
    _raise([_scheduler(settings), _optimizer(settings), _reporting(settings), _hub(settings)])


def check_examples(settings: Finetuning, config: PretrainedConfig, inputs: RunInputs) -> None:
    """Raises one ValueError for a base that is quantised already, and for examples that it has no embeddings for."""
    _raise([_quantised(config), _token_ids(config, inputs), _positions(settings, config, inputs)])


def check_machine(settings: Finetuning, plan: "Plan") -> None:
    """Raises one ValueError for hours of training without a GPU, a merge that would not fit, a search by several."""
    _raise([_too_slow(settings, plan), _searched_by_several(settings, plan), *_verification(plan)])


def _raise(problems: list[str | None]) -> None:
    if any(problems):
        raise ValueError("\n".join(filter(None, problems)))


def _quantised(config: PretrainedConfig) -> str | None:
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return None
    method = (stored if isinstance(stored, dict) else vars(stored)).get("quant_method", "unknown method")
    return (
        f"model_name is a base that is quantised already ({getattr(method, 'value', method)}): QLoRA quantises the"
        " original 16-bit weights itself, and merges into them. Set model_name to the repository that this one was"
        " made from"
    )


def _token_ids(config: PretrainedConfig, inputs: RunInputs) -> str | None:
    rows = config.get_text_config().vocab_size
    largest = max(max(example["input_ids"]) for example in [*inputs.data.examples, *inputs.held_out])
    if largest < rows:
        return None
    token = inputs.template.tokenizer.convert_ids_to_tokens(largest)
    return (
        f"the tokenizer gives ids up to {largest} ({token!r}) and the model has {rows} embeddings: they do not belong"
        " together, or tokens were added to the tokenizer alone"
    )


def _positions(settings: Finetuning, config: PretrainedConfig, inputs: RunInputs) -> str | None:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(inputs.data.lengths)
    asked = max((example["labels"].count(IGNORE_INDEX) for example in inputs.held_out), default=0)
    answered = asked + settings.max_new_tokens
    if not most or max(longest, answered) <= most:
        return None
    if longest > most:
        return (
            f"max_seq_length = {settings.max_seq_length}: the longest example has {longest} tokens and the model"
            f" {most} positions (max_position_embeddings): set max_seq_length = {most} or less"
        )
    return (
        f"max_new_tokens = {settings.max_new_tokens}: the longest prompt and its answer take {answered} tokens and the"
        f" model has {most} positions (max_position_embeddings): lower max_new_tokens, or max_seq_length"
    )


def _too_slow(settings: Finetuning, plan: "Plan") -> str | None:
    seconds = plan.seconds + plan.search_seconds
    if plan.machine.on_gpu or settings.allow_slow or seconds <= SLOW:
        return None
    return (
        f"there is no GPU here, and the training would take about {readable_seconds(seconds)}: in Colab choose"
        " Runtime → Change runtime type → A100 GPU and run all cells again; or set allow_slow = True"
    )


def _searched_by_several(settings: Finetuning, plan: "Plan") -> str | None:
    if not settings.find_learning_rate or plan.processes == 1:
        return None
    return (
        f"find_learning_rate = True: {plan.processes} processes train together, and the search is for one. Run the"
        " notebook's cells up to the search first, which write the rate to settings.json; or set it to False"
    )


def _verification(plan: "Plan") -> list[str]:
    machine, (on_device, on_host) = plan.machine, verification_memory(plan.settings, plan.size, plan.machine.on_gpu)
    device = (machine.name, on_device, machine.free_memory, "a smaller base or a machine with more memory")
    host = ("this machine beside its GPU", on_host, machine.host_memory, "a runtime with more memory (High-RAM)")
    return [
        f"merging and verifying the model takes about {as_gib(needed)} on {where}, which has {as_gib(there)}:"
        f" take {cure}"
        for where, needed, there, cure in ([device, host] if machine.on_gpu else [device])
        if needed > there
    ]


def _scheduler(settings: Finetuning) -> str | None:
    name, known = settings.lr_scheduler_type, [kind.value for kind in SchedulerType]
    if name not in known:
        return _unknown("lr_scheduler_type", name, known)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=2)
    except (ValueError, TypeError) as error:  # it needs arguments of its own, which no parameter gives
        return f"lr_scheduler_type = {name!r} cannot be used here ({error}): set 'constant_with_warmup' or 'cosine'"
    if name in NEEDS_A_METRIC:
        return f"lr_scheduler_type = {name!r} needs a metric at each step: set 'constant_with_warmup' or 'cosine'"
    return None


def _optimizer(settings: Finetuning) -> str | None:
    name, known = settings.optim, [AUTO, *(kind.value for kind in OptimizerNames)]
    if name == AUTO:
        return None
    if name not in known:
        return _unknown("optim", name, known)
    arguments = SimpleNamespace(optim=name, optim_args=None, optim_target_modules=None, learning_rate=0.1)
    arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon, arguments.weight_decay = 0.9, 0.999, 1e-8, 0.0
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        return f"optim = {name!r} cannot be used here ({error}): set optim = 'auto'"
    return None


def _reporting(settings: Finetuning) -> str | None:
    name, known = settings.report_to, ["none", *INTEGRATION_TO_CALLBACK]
    if name not in known:
        return _unknown("report_to", name, known)
    if name != "none" and name not in get_available_reporting_integrations():
        return f"report_to = {name!r}: {name} is not installed; install it, or set report_to = 'none'"
    if name in LOGINS and not _logged_in(*LOGINS[name]):
        key, mode, _ = LOGINS[name]
        return (
            f"report_to = {name!r}: {name} would ask for a login in the middle of the run. Set the environment variable"
            f" {key}, or {mode} to 'offline', or report_to = 'none'"
        )
    return None


def _logged_in(key: str, mode: str, host: str) -> bool:
    if os.environ.get(key) or os.environ.get(mode, "").lower() in ("offline", "disabled", "dryrun"):
        return True
    try:
        return bool(host) and netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _hub(settings: Finetuning) -> str | None:
    """Whether the token may write to the repository that the model is to be uploaded to."""
    if settings.publish_to != "hub":
        return None
    owner = settings.hub_repository.partition("/")[0]
    begun = f"publish_to = 'hub', hub_repository = {settings.hub_repository!r}: "
    if not models.is_hub_id(settings.hub_repository) or not owner:
        return f"{begun}the Hub takes no such name: letters, digits, '-', '_' and '.' in user/name"
    cure = "Make a token with write access (https://huggingface.co/settings/tokens), or set publish_to = 'folder'"
    try:
        account = HfApi(token=colab.hub_token()).whoami()
    except (PermissionError, OfflineModeIsEnabled) as error:
        return f"{begun}{error}"
    except (HfHubHTTPError, OSError) as error:
        return f"{begun}the Hub does not accept the token, or cannot be reached ({error}). {cure}"
    names = {account.get("name"), *(organisation.get("name") for organisation in account.get("orgs", []))}
    if owner not in names:
        return f"{begun}the token is {account.get('name')}'s, who cannot write to {owner}. {cure}"
    return None if _may_write(account, owner) else f"{begun}the token may only read. {cure}"


def _may_write(account: dict, owner: str) -> bool:
    """Whether a token of the role "write", or a fine-grained one with "repo.write" for the owner, was asked about."""
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") != "fineGrained":
        return token.get("role") != "read"
    scoped = token.get("fineGrained", {}).get("scoped", [])
    return any(
        "repo.write" in s["permissions"] and s.get("entity", {}).get("name", "").partition("/")[0] == owner
        for s in scoped
    )


def _unknown(parameter: str, value: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(value, known, n=3)
    cure = f"did you mean {' or '.join(map(repr, close))}?" if close else f"one of {', '.join(known)}"
    return f"{parameter} = {value!r}: {cure}"
