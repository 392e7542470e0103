"""Merging an adapter: PEFT's `merge_and_unload` of the whole model in memory against our tensor by tensor.

    python benchmarks/merge.py [--size true]

Random weights and a random adapter (r = 64 on all linear layers), of a small Phi or of Phi-2's true size (17 GB of
disk in --work). Each turn has a process of its own, as the speed of malloc's heap differs from one to another; all read
the same 16-bit base and write a whole folder of shards. The 4-bit weights come from the file that the notebook writes
of the trained model; how long that takes is told apart.
"""

import importlib
import shutil
import time
from dataclasses import replace
from pathlib import Path

import measuring
import shapes
import torch
from safetensors.torch import save_file

from llm_finetuning import models, prompts, settings
from llm_finetuning.files import shards
from llm_finetuning.release import companions, held_weights, merging
from llm_finetuning.sample import rehearsal

PART = "merge"
ROUNDS = {"small": 5, "true": 3, "tiny": 2}
GPU_ROUNDS = 2
"""On a GPU, whose minutes are counted."""
TURN = {"small": 2.0, "true": 0.0, "tiny": 0.0}
"""A turn merges for so many seconds: short merges are averaged."""
PEFT = "PEFT's merge_and_unload"
SIDES = {PEFT: "", "ours, into the original base": "original", "ours, into the dequantised base": "dequantized"}
"""Side → the base that carries the adapter."""
EMBEDDINGS = ("embed_tokens", "lm_head")
LIBRARIES = ("bitsandbytes", "peft", "transformers.models.phi.modeling_phi")


def device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def make_adapter(folder: Path, size: str) -> Path:
    """A random adapter on every linear layer, as PEFT saves it."""
    from peft import LoraConfig

    sizes = {n: s for n, s in rehearsal.weight_shapes(shapes.config(size)).items() if len(s) == 2}
    linear = {name: shape for name, shape in sizes.items() if not any(part in name for part in EMBEDDINGS)}
    rank, generator, tensors = measuring.defaults()["lora_r"], torch.Generator().manual_seed(0), {}
    for name, (rows, columns) in linear.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-2] for name in linear})
    LoraConfig(r=rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)
    return folder


def hold_weights(base: Path, path: Path) -> list[float]:
    """Writes the base's 4-bit weights to `path` twice, as the notebook does with the trained model; the seconds."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16,
        device_map={"": device()},
        quantization_config=models.four_bit(torch.bfloat16),
        trust_remote_code=False,
    )
    return [measuring.seconds_of(lambda: held_weights.write(model, shards.Weights(base), path, {})) for _ in range(2)]


def with_peft(base: Path, adapter: Path, out: Path) -> None:
    """The usual way: the base in 16 bits, the adapter on it, merged in place, saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, device_map={"": device()}, trust_remote_code=False
    )
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="2GB")


def ours(kind: str, base: Path, adapter: Path, out: Path, held: Path) -> None:
    """As the notebook merges into one base."""
    read, weights = merging.read_adapter(adapter), shards.Weights(base)
    chosen, dtypes = settings.from_cell(settings.Finetuning, measuring.defaults()), (torch.bfloat16, torch.bfloat16)
    merge = merging.Merge(kind, chosen, *dtypes, device(), weights, read, set(read.factors))
    merging.write_merged(replace(merge, held=held_weights.HeldWeights(held)), out)
    template = prompts.template_for(models.tokenizer(str(base)))
    companions.write_companions(out, base, template, torch.bfloat16)


def once(side: str, size: str, work: Path) -> float:
    """Seconds of one merge into an empty folder, which is looked at and removed."""
    base, adapter, out = work / f"base-{size}", work / f"adapter-{size}", work / "merged"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    if side == PEFT:
        with_peft(base, adapter, out)
    else:
        ours(SIDES[side], base, adapter, out, work / f"held-{size}.safetensors")
    seconds = time.perf_counter() - start
    check(out, base)
    shutil.rmtree(out)
    return seconds


def mean(side: str, size: str, work: Path) -> float:
    """Mean seconds of merges that take TURN together."""
    times = [once(side, size, work)]
    while sum(times) < TURN[size]:
        times.append(once(side, size, work))
    return sum(times) / len(times)


def job(side: str, size: str, work: Path):
    """The turn of a side: merges until TURN is over. Libraries and the GPU are there before the first one begins."""

    def turn() -> dict:
        return {"seconds": mean(side, size, work), "peak_gb": measuring.peak_memory() / 1e9}

    for name in LIBRARIES:
        importlib.import_module(name)
    torch.zeros(1, device=device())
    if size != "true":
        once(side, size, work)
    return turn


def check(out: Path, base: Path) -> None:
    """Raises ValueError when what was written is not a complete model."""
    missing = set(shards.Weights(base).names()) - set(shards.Weights(out).names())
    if missing:
        raise ValueError(f"{out} lacks {sorted(missing)[:3]}: the merge is not complete, so its time says nothing")


def main() -> None:
    given = measuring.options(__doc__, "small", "true", "tiny").parse_args()
    if given.side:
        measuring.serve(lambda: job(given.side, given.size, given.work))
        return
    base = shapes.base(given.work, given.size)
    make_adapter(given.work / f"adapter-{given.size}", given.size)
    held = hold_weights(base, given.work / f"held-{given.size}.safetensors")
    arguments = ["--size", given.size, "--work", str(given.work)]

    def record(results: dict[str, list[dict]]) -> None:
        made = [*figures(results), measuring.figure("time, writing the 4-bit weights", "s", held)]
        print(f"written to {measuring.record(PART, given.size, made, given.results)}", flush=True)

    with measuring.sides(Path(__file__).name, list(SIDES), arguments, apart=True) as turns:
        measuring.in_turn(turns, GPU_ROUNDS if torch.cuda.is_available() else ROUNDS[given.size], record)


def figures(results: dict[str, list[dict]]) -> list[dict]:
    """Seconds and peak memory of PEFT's way over each of ours."""
    made: dict[str, dict] = {}
    for side in list(results)[1:]:
        for name, unit, key in (("time", "s", "seconds"), ("peak memory", "GB", "peak_gb")):
            both = [(label, [turn[key] for turn in results[label]]) for label in (PEFT, side)]
            made |= {entry["name"]: entry for entry in measuring.compare(name, unit, *both)}
    return list(made.values())


if __name__ == "__main__":
    main()
