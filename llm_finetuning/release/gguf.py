"""Exporting a merged folder to GGUF for llama.cpp and Ollama, an optional extra.

    python -m llm_finetuning.release.gguf outputs/sample/finetuned_phi2 --types f16,Q4_K_M

writes a file of each type and a Modelfile to finetuned_phi2-gguf, once llama.cpp has shown that it reads the same
tokens and computes the same model. `make gguf` installs what this needs.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from llm_finetuning import models
from llm_finetuning.data import pairs
from llm_finetuning.evaluation.scoreboard import held_out_set
from llm_finetuning.files import checksums
from llm_finetuning.files.atomic import building, write_text
from llm_finetuning.files.copying import check_space
from llm_finetuning.files.shards import stored_bytes
from llm_finetuning.inference import llama
from llm_finetuning.prompts import Template
from llm_finetuning.release import gguf_checks, llama_cpp_tools, model_card, ollama
from llm_finetuning.release.verify import Merged
from llm_finetuning.settings import GGUF_TYPES, gguf_types
from llm_finetuning.training.planning import Plan

SCRIPTS = Path(__file__).parent
ADAPTER = "adapter-f16.gguf"
UNKNOWN_ADAPTERS = {"use_dora": "DoRA adapters", "target_parameters": "adapters of experts"}
"""What llama.cpp does not know, by the entry of adapter_config.json that says it."""
F16_KL, F16_TOP_1 = 0.01, 0.9
"""What an f16 file may differ from the merged model: mean KL divergence in nats, and the least top-1 agreement."""


@dataclass(frozen=True)
class Exported:
    """A folder with GGUF files, and what was measured of them."""

    folder: Path
    measured: list[dict]
    """As `gguf_checks.measure` returns it, one for each type."""
    texts: int
    """That llama.cpp and the tokenizer encode alike."""
    left_out: list[str] = field(default_factory=list)
    """What was not written, with the reason."""

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.measured)


def export(
    folder: str | Path,
    target: str | Path,
    types: list[str],
    examples: list[dict] | None = None,
    adapter: Path | None = None,
    device: str = "cpu",
) -> Exported:
    """Writes a GGUF file of each of `types`, a Modelfile and a README for the merged model in `folder` to `target`.

    examples: what the files are measured on (`prompts.encode`); adapter: a LoRA adapter that is written too. Raises
    FileNotFoundError without llama.cpp, and ValueError for a model that llama.cpp cannot read or reads otherwise; the
    target then stays as it was.
    """
    folder, target = Path(folder), Path(target)
    check_no_code(folder)
    weights = stored_bytes(folder)
    check_space(target, int(weights * (1 + sum(GGUF_TYPES[kind] for kind in types) / 16)), "The GGUF files")
    template = Template(models.read_tokenizer(str(folder)), f"the chat template of {folder.name}")
    texts, examples = gguf_checks.texts_of(template), examples or gguf_checks.own_examples(template)
    check_shape(folder)
    with building(target) as partial:
        f16 = convert(folder, partial / "model-f16.gguf")
        alike = gguf_checks.compare_tokens(f16, template.tokenizer, texts)
        files = {"f16": f16} | {kind: quantise(f16, kind) for kind in types if kind != "f16"}
        measured = gguf_checks.measure(files, folder, examples, device)
        _check_f16(measured[0], folder)
        if "f16" not in types:
            f16.unlink()
        left_out = _write_modelfile(folder, partial, files[types[-1]].name)
        if adapter:
            left_out += convert_adapter(adapter, folder, partial / ADAPTER)
        exported = Exported(target, [row for row in measured if row["type"] in types], alike, left_out)
        write_text(partial / "README.md", model_card.gguf_section(exported, f"GGUF files of {folder.name}"))
        checksums.write_checksums(partial)
    return exported


def check_no_code(folder: Path) -> None:
    """Raises ValueError for a folder that brings Python code, which llama.cpp's converter would run."""
    configs = [path for path in folder.glob("*config*.json") if "auto_map" in json.loads(path.read_text("utf-8"))]
    if found := [*folder.glob("*.py"), *configs]:
        raise ValueError(
            f"{found[0]} brings code of its own, and llama.cpp's converter would run it: export a model whose"
            " architecture transformers has"
        )


def check_shape(folder: Path) -> None:
    """Raises ValueError for a Phi of another shape than Phi-2's, which llama.cpp's converter writes for every Phi."""
    config = models.configuration(str(folder))
    if config.model_type != "phi":
        return
    wanted = {
        "intermediate_size": 4 * config.hidden_size,
        "num_key_value_heads": config.num_attention_heads,
        "qk_layernorm": False,
    }
    found = {name: getattr(config, name) for name in wanted}
    if other := [
        f"{name} is {found[name]} in place of {value}" for name, value in wanted.items() if found[name] != value
    ]:
        raise ValueError(
            f"{folder}: llama.cpp takes every Phi to be shaped as Phi-2 is, and here {', '.join(other)}: use the model"
            " with transformers or vLLM"
        )


def convert(folder: Path, target: Path) -> Path:
    """Converts the folder's weights, in 16-bit floats, and its tokenizer to one GGUF file."""
    script = [SCRIPTS / "gguf_vocabulary.py", llama_cpp_tools.converter()]
    problem = f"llama.cpp could not convert {folder}"
    llama_cpp_tools.run([*script, folder, "--outfile", target, "--outtype", "f16"], problem)
    return target


def convert_adapter(adapter: Path, folder: Path, target: Path) -> list[str]:
    """Converts a LoRA adapter, in 16-bit floats, for the GGUF file of its base; `folder`: with the base's config.

    Returns what was left out: an adapter that llama.cpp does not know, DoRA's or one of experts. It divides lora_alpha
    by the rank whatever the adapter says, so rsLoRA's is handed over as the one that gives the same scale.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for entry, kind in UNKNOWN_ADAPTERS.items():
        if config.get(entry):
            return [f"{target.name} was left out: llama.cpp knows no {kind}. The merged model holds it"]
    if config.get("use_rslora"):
        config["lora_alpha"] *= config["r"] ** 0.5
    script = llama_cpp_tools.converter("convert_lora_to_gguf.py")
    options = ["--base", folder, "--outfile", target, "--outtype", "f16"]
    with tempfile.TemporaryDirectory(dir=target.parent) as copy:
        shutil.copyfile(adapter / "adapter_model.safetensors", Path(copy) / "adapter_model.safetensors")
        write_text(Path(copy) / "adapter_config.json", json.dumps(config))
        llama_cpp_tools.run([script, *options, copy], f"llama.cpp could not convert the adapter in {adapter}")
    return []


def quantise(f16: Path, kind: str) -> Path:
    """Quantises a GGUF file to one of GGUF_TYPES, beside it."""
    target = f16.with_name(f"model-{kind}.gguf")
    script = SCRIPTS / "gguf_quantise.py"
    llama_cpp_tools.run([script, f16, target, kind], f"llama.cpp could not quantise {f16.name} to {kind}")
    return target


def _check_f16(row: dict, folder: Path) -> None:
    if row["kl"] > F16_KL or row["top_1"] < F16_TOP_1:
        raise ValueError(
            f"llama.cpp computes another model than {folder}: KL divergence {row['kl']:.2g} (at most {F16_KL:g}),"
            f" top-1 agreement {row['top_1']:.0%} (at least {F16_TOP_1:.0%}). It does not know this configuration; use"
            " the model with transformers or vLLM."
        )


def _write_modelfile(folder: Path, target: Path, gguf_name: str) -> list[str]:
    """Writes the Modelfile; returns the reason where Ollama cannot write this chat template."""
    try:
        write_text(target / "Modelfile", ollama.modelfile(folder, gguf_name))
    except ValueError as error:
        return [f"Modelfile: {error}. The GGUF file carries the chat template itself: llama-server --jinja reads it."]
    return []


def export_merged(merged: Merged, plan: Plan, held_out: list[dict]) -> Exported | None:
    """Exports a verified merge to the types that the settings name, measured on the held-out set.

    None where they name none, or where that fails (llama.cpp cannot read the model, a disk or a memory is full): the
    reason is printed, and publishing goes on.
    """
    settings = plan.settings
    if not (types := gguf_types(settings.gguf)):
        return None
    target = settings.folders.work / "gguf"
    try:
        return export(merged.folder, target, types, held_out, settings.folders.adapter, plan.device)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"No GGUF files were written. {error}")
        return None


def held_out_beside(folder: Path, template: Template) -> list[dict] | None:
    """The held-out examples of the run that published `folder`; None where its pairs do not lie beside it."""
    file = folder.parent / "data" / "finetuning_data_val.jsonl"
    if not file.is_file():
        return None
    return held_out_set(pairs.to_records(pairs.read_jsonl(file)), template, gguf_checks.LONGEST, count=50, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exports a published folder to GGUF.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", default="f16,Q4_K_M", help=", ".join(GGUF_TYPES))
    parser.add_argument("--target", type=Path, help="default: FOLDER-gguf")
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter that is converted too")
    given = parser.parse_args()
    folder = given.folder.resolve()
    checksums.verify_checksums(folder)
    template = Template(models.read_tokenizer(str(folder)))
    exported = export(
        folder,
        given.target or llama.folder_beside(folder),
        gguf_types(given.types),
        held_out_beside(folder, template),
        given.adapter,
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    print(f"{exported.folder}\n{exported.texts} texts have the same tokens\n{exported.table().to_string(index=False)}")
    print(*exported.left_out, sep="\n")


if __name__ == "__main__":
    main()
