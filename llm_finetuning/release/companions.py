"""What lies beside the weights of a published folder, written so that transformers 4 and 5 read the same model.

transformers 5 moved the rotary settings into `rope_parameters`, renamed `torch_dtype`, and names a tokenizer class that
version 4 does not have. What version 4 misses it replaces by its defaults, silently: both names are written.
"""

import json
import re
import shutil
from pathlib import Path

import torch
import transformers

from llm_finetuning import models, prompts
from llm_finetuning.files.atomic import write_json
from llm_finetuning.prompts import IGNORE_INDEX, Template

SENTENCEPIECE = "tokenizer.model"
ROTARY_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct")}
"""What version 4 calls `rope_theta` and `partial_rotary_factor`, by model type, where it has names of its own."""
OF_THIS_MACHINE = ("backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file", "processor_class")


def write_companions(folder: Path, base: Path, template: Template, save_dtype: torch.dtype) -> None:
    """Writes config, tokenizer with chat template, and generation config with stop, pad and suppressed token ids."""
    config = models.configuration(str(base))
    config.dtype = save_dtype
    config.use_cache = True
    write_config(folder, config)
    write_tokenizer(folder, template)
    if (base / SENTENCEPIECE).is_file():
        shutil.copyfile(base / SENTENCEPIECE, folder / SENTENCEPIECE)
    tokenizer = template.tokenizer
    unused = list(range(len(tokenizer), config.get_text_config().vocab_size))
    transformers.GenerationConfig(
        eos_token_id=sorted(template.stop_token_ids),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        suppress_tokens=unused or None,
    ).save_pretrained(folder)


def write_config(folder: Path, config: transformers.PreTrainedConfig) -> None:
    """Saves a configuration for transformers 4 and 5; as it is where the old names would mislead version 5.

    Some families that version 4 does not have take them for something else.
    """
    config.save_pretrained(folder)
    path, before = folder / "config.json", _as_read(folder)
    plain = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, with_names_of_version_4(plain), indent=2)
    after = _as_read(folder)
    if before != {name: after.get(name) for name in before}:
        write_json(path, plain, indent=2)


def _as_read(folder: Path) -> dict:
    return _without_type(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict())


def _without_type(values: object) -> object:
    """Without `type`, the old name of `rope_type`, at any depth."""
    if not isinstance(values, dict):
        return values
    return {name: _without_type(value) for name, value in values.items() if name != "type"}


def with_names_of_version_4(config: dict) -> dict:
    """Returns a configuration, and those inside it, with the names that transformers 4 reads beside those of 5."""
    inner = {name: with_names_of_version_4(value) for name, value in config.items() if _is_configuration(value)}
    old = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = config.get("rope_parameters") or {}
    if isinstance(sliding := rope.get("sliding_attention"), dict):
        old["rope_local_base_freq"] = sliding["rope_theta"]
    whole = rope.get("full_attention", rope)
    if isinstance(whole, dict) and "rope_theta" in whole:
        old |= _rotary_names(whole, config)
    return config | inner | old


def _is_configuration(value: object) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _rotary_names(rope: dict, config: dict) -> dict:
    """What transformers 4 reads in place of `rope_parameters`; the scaling alone stays together, in `rope_scaling`."""
    base, factor = ROTARY_NAMES.get(config["model_type"], ("rope_theta", "partial_rotary_factor"))
    names = {base: rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        names[factor] = rope["partial_rotary_factor"]
    # A value that also stands in the configuration itself is read there; Phi-3 takes none in its scaling but its own.
    scaling = {
        name: value
        for name, value in rope.items()
        if name not in ("rope_theta", "partial_rotary_factor", "rope_type", "type") and name not in config
    }
    kind = rope.get("rope_type", "default")
    if kind != "default":
        names["rope_scaling"] = {"type" if kind == "longrope" else "rope_type": kind} | scaling
    return names


def write_tokenizer(folder: Path, template: Template) -> None:
    """Saves the tokenizer so that transformers 4 and 5 read `tokenizer.json` as it is: no class adds its own rules."""
    template.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in OF_THIS_MACHINE}
    if isinstance(more := kept.get("extra_special_tokens"), list):  # version 4 has a dictionary under this name
        del kept["extra_special_tokens"]
        kept |= {"additional_special_tokens": more} if more else {}
    # In version 4 the plain class returns token_type_ids, which causal language models do not take, and cleaning up
    # takes blanks out of the answers; version 5 does neither.
    kept |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if response := response_template(template):
        kept["response_template"] = response
    write_json(path, kept, indent=2)


def response_template(template: Template) -> dict | None:
    """How transformers' pipeline and server take an answer out of what was generated; None where it is the same.

    In Phi-2's format the blank before an answer is part of its first token: there it must not be shown, and not be
    written twice in the next turn.
    """
    example = prompts.encode({"prompt": "a", "response": "b"}, template)
    labels = [label for label in example["labels"] if label != IGNORE_INDEX]
    before, _, _ = template.tokenizer.decode(labels).partition("b")
    if not before or before.strip():
        return None
    stops = template.tokenizer.convert_ids_to_tokens(sorted(template.stop_token_ids))
    content = {
        "open_pattern": rf"\A(?:{re.escape(before)})?",
        "close": stops,
        "content": "text",
        "content_args": {"strip": False},
    }
    defaults = {"role": "assistant", "content": ""}
    return {"defaults": defaults, "start_anchor_pattern": r"\Z", "fields": {"content": content}}
