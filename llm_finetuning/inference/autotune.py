"""The fastest way to run a model on this CPU: measured once on a layer of its shape, then remembered.

Remembered in the user's cache under the hash of the folder's SHA256SUMS; the model folder may be read-only.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llm_finetuning import hardware, models
from llm_finetuning.files import checksums
from llm_finetuning.inference import llama, nf4

STEPS = 8
KEPT_MODELS = 2
"""Models whose packed form stays in the cache."""


@dataclass(frozen=True)
class Timing:
    backend: str
    threads: int
    tokens_per_second: float = 0.0
    """Of decoding, as measured; 0 = not measured."""


def cache_folder(key: str) -> Path:
    """Where things about the model of this key are remembered."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llm_finetuning" / key


def key_of(folder: Path) -> str:
    """The hash of SHA256SUMS; of config.json for a folder that was not published."""
    file = folder / checksums.NAME if (folder / checksums.NAME).is_file() else folder / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def fastest(folder: Path, config) -> Timing:
    """The remembered choice for this model on this machine, or the fastest of what is installed, measured now."""
    cores = len(os.sched_getaffinity(0))
    if models.count_parameters(config) < hardware.SMALL:  # one thread in exact 32 bits is quick: nothing is measured
        return Timing("float32", 1)
    file = cache_folder(key_of(folder)) / "choice.json"
    machine = fingerprint(folder)
    if file.is_file():
        remembered = json.loads(file.read_text(encoding="utf-8"))
        if remembered["machine"] == machine:
            return Timing(**remembered["choice"])
    measured = measure(folder, config, thread_counts(cores))
    best = max(measured, key=lambda choice: choice.tokens_per_second)
    _remember(file, {"machine": machine, "choice": asdict(best), "measured": [asdict(m) for m in measured]})
    return best


def fingerprint(folder: Path) -> dict:
    """What a choice depends on besides the model."""
    gguf = llama.file_beside(folder)
    return {
        "cpu": hardware.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": hardware.host_memory(),
        "torch": torch.__version__,
        "nf4": nf4.available(),
        "gguf": gguf.name if gguf else "",
    }


def thread_counts(cores: int) -> list[int]:
    return sorted({1, max(1, cores // 2), cores})


def measure(folder: Path, config, threads: list[int]) -> list[Timing]:
    """Tokens per second of every way that is installed and fits into memory, with every number of threads."""
    gguf = llama.file_beside(folder)
    found = [] if gguf is None else _measure_llama(gguf, threads)
    count, room = models.count_parameters(config), hardware.host_memory()
    bytes_each = {"nf4": 0.6, "bfloat16": 2, "float32": 4}
    for backend, size in bytes_each.items():
        if count * size < 0.8 * room and (backend != "nf4" or nf4.available()):
            found += _measure_torch(backend, config, threads)
    if not found:
        raise ValueError(
            f"{folder} needs {hardware.as_gib(2 * count)} of memory, and there are {hardware.as_gib(room)}"
        )
    return found


def _measure_torch(backend: str, config, threads: list[int]) -> list[Timing]:
    """From one layer and the head, with made-up weights: head + layers x layer is a token's time."""
    model = one_layer(config, torch.float32 if backend == "float32" else torch.bfloat16)
    if backend == "nf4":
        model = nf4.convert(model)
    hidden = torch.full((1, 1, config.hidden_size), 0.01, dtype=model.dtype)
    before, found = torch.get_num_threads(), []
    with torch.inference_mode():
        for count in threads:
            torch.set_num_threads(count)
            head = best_time(lambda: model.get_output_embeddings()(hidden))
            whole = best_time(lambda: model(input_ids=torch.tensor([[1]]), use_cache=False))
            seconds = head + config.num_hidden_layers * max(whole - head, 1e-6)
            found.append(Timing(backend, count, round(1 / seconds, 2)))
    torch.set_num_threads(before)
    return found


def one_layer(config, dtype: torch.dtype):
    """The model with one layer and every weight the same."""
    from copy import deepcopy

    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = deepcopy(config)
    config.num_hidden_layers = 1
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.full(parameter.shape, 0.01, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    return model.eval()


def _measure_llama(gguf: Path, threads: list[int]) -> list[Timing]:
    engine = llama.LlamaEngine(gguf, 256, threads[-1])
    session = engine.session([[1] * 8])
    found = []
    for count in threads:
        engine.set_threads(count)
        found.append(Timing(engine.name, count, round(1 / best_time(lambda: session.push([1])), 2)))
    session.close()
    engine.llama.close()
    return found


def best_time(step) -> float:
    """Shortest of some runs in seconds, after two to warm up: other work on the machine only makes it longer."""
    seconds = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def _remember(file: Path, what: dict) -> None:
    """Writes to the user's cache; where that cannot be written, the next start measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(what, indent=1), encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        print(f"{file} cannot be written ({error.strerror}): the choice is measured again next time.")


def packed_file(folder: Path) -> Path | None:
    """Where the packed form of a published model is kept; None where it is not published or the disk is too full.

    Packed forms of models not used lately are removed.
    """
    if not (folder / checksums.NAME).is_file():
        return None
    file = cache_folder(key_of(folder)) / "nf4.safetensors"
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not file.is_file() and hardware.free_disk(file.parent) < weights:
        return None
    others = sorted(file.parents[1].glob("*/nf4.safetensors"), key=lambda path: path.stat().st_mtime)
    for old in [path for path in others if path != file][: -(KEPT_MODELS - 1) or None]:
        old.unlink()
    return file
