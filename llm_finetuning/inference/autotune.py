"""The fastest backend for a model on this CPU, measured once on a layer of its shape and then cached.

The cache is the user's, under the hash of the folder's SHA256SUMS, because the model folder may be read-only.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import torch
import transformers

from llm_finetuning import hardware, models
from llm_finetuning.files import checksums, copying
from llm_finetuning.files.atomic import writing
from llm_finetuning.files.shards import stored_bytes
from llm_finetuning.inference import llama, llama_kernels, nf4

STEPS = 8
NF4_INT8 = "nf4+int8"
BYTES = {"nf4": 0.6, NF4_INT8: 1.6, "bfloat16": 2, "float32": 4}
"""Bytes of memory for a parameter."""
PROMPT, ANSWER = 64, 32
"""Tokens of the prompt and the answer whose time decides."""
KEPT_MODELS = 2
"""Models whose packed weights stay in the cache."""


@dataclass(frozen=True)
class Timing:
    """The speed of a backend with a number of threads."""

    backend: str
    threads: int
    tokens_per_second: float = 0.0
    """Of an answer of ANSWER tokens to PROMPT tokens, the prefill included; 0 = not measured."""


def cache_folder(key: str) -> Path:
    """Returns the folder of the user's cache for the model of this key."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llm_finetuning" / key


def key_of(folder: Path) -> str:
    """Returns the digest of a published folder, or the hash of another one's config.json."""
    published = (folder / checksums.NAME).is_file()
    return (checksums.digest(folder) if published else checksums.hash_file(folder / "config.json"))[:16]


def fastest(folder: Path, config: "transformers.PreTrainedConfig") -> Timing:
    """Returns the fastest installed backend for this model on this machine, from the cache or measured now."""
    if models.count_parameters(config) < hardware.SMALL:  # one thread in exact 32 bits is quick: nothing is measured
        return Timing("float32", 1)
    file = cache_folder(key_of(folder)) / "choice.json"
    machine = fingerprint(folder)
    if file.is_file():
        cached = json.loads(file.read_text(encoding="utf-8"))
        if cached["machine"] == machine:
            return Timing(**cached["choice"])
    timings = measure(folder, config, sorted({1, max(1, machine["cores"] // 2), machine["cores"]}))
    best = max(timings, key=lambda timing: timing.tokens_per_second)
    _cache(file, {"machine": machine, "choice": asdict(best), "measured": [asdict(t) for t in timings]})
    return best


def fingerprint(folder: Path) -> dict:
    """Returns what the timings of a model depend on besides the model: hardware, versions, files, what is measured."""
    gguf = llama.file_beside(folder)
    return {
        "answer": [PROMPT, ANSWER],
        "cpu": hardware.cpu_name(),
        "cores": hardware.cores(),
        "memory": hardware.host_memory(),
        "torch": torch.__version__,
        "nf4": nf4.available(),
        "gguf": gguf.name if gguf else "",
        "amx": bool(gguf) and llama_kernels.amx_is_sound(),
    }


def measure(folder: Path, config: "transformers.PreTrainedConfig", threads: list[int]) -> list[Timing]:
    """Measures every backend that is installed and fits into memory, with every number of threads."""
    gguf = llama.file_beside(folder)
    timings = [] if gguf is None else _measure_llama(gguf, threads)
    count, room = models.count_parameters(config), hardware.host_memory()
    for backend, size in BYTES.items():
        if count * size < 0.8 * room and ("nf4" not in backend or nf4.available()):
            timings += _measure_torch(backend, config, threads)
    if not timings:
        raise ValueError(
            f"{folder} needs {hardware.as_gib(2 * count)} of memory, and there are {hardware.as_gib(room)}"
        )
    return timings


def _measure_torch(backend: str, config: "transformers.PreTrainedConfig", threads: list[int]) -> list[Timing]:
    """Measures one layer and the head with made-up weights; the time of a token is head + layers x layer."""
    model = one_layer(config, torch.float32 if backend == "float32" else torch.bfloat16)
    if backend in ("nf4", NF4_INT8):
        model = nf4.convert(model, backend == NF4_INT8)
    hidden = torch.full((1, 1, config.hidden_size), 0.01, dtype=model.dtype)
    before, timings = torch.get_num_threads(), []
    with torch.inference_mode():
        for count in threads:
            torch.set_num_threads(count)
            head = best_time(lambda: model.get_output_embeddings()(hidden))
            prefill, token = (_seconds_of(model, tokens, head, config.num_hidden_layers) for tokens in (PROMPT, 1))
            timings.append(_timing(backend, count, prefill, token))
    torch.set_num_threads(before)
    return timings


def _seconds_of(model: "transformers.PreTrainedModel", tokens: int, head: float, layers: int) -> float:
    """Returns the seconds of a forward pass with all `layers`, measured on one; `head`: the seconds of the head."""
    ids = torch.ones((1, tokens), dtype=torch.long)
    whole = best_time(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))
    return head + layers * max(whole - head, 1e-6)


def _timing(backend: str, threads: int, prefill: float, token: float) -> Timing:
    """Returns the speed with so many seconds for the prefill, which gives the first token, and for each further one."""
    return Timing(backend, threads, round(ANSWER / (prefill + (ANSWER - 1) * token), 2))


def one_layer(config: "transformers.PreTrainedConfig", dtype: torch.dtype) -> "transformers.PreTrainedModel":
    """Makes a model of this configuration with a single layer, every weight the same."""
    config = deepcopy(config)
    config.num_hidden_layers = 1
    model = nf4.empty_model(config, dtype)
    parameters = model.named_parameters(remove_duplicate=False)  # a tied head too
    weights = {name: torch.full_like(parameter, 0.01, device="cpu") for name, parameter in parameters}
    model.load_state_dict(weights, strict=False, assign=True)
    return model.eval()


def _measure_llama(gguf: Path, threads: list[int]) -> list[Timing]:
    engine = llama.LlamaEngine(gguf, 256, threads[-1])
    timings = [_timing(engine.name, count, *_llama_seconds(engine, count)) for count in threads]
    engine.llama.close()
    return timings


def _llama_seconds(engine: llama.LlamaEngine, threads: int) -> tuple[float, float]:
    """Returns the seconds of a prefill and of a token."""
    engine.set_threads(threads)
    prompts = cycle([[1] * PROMPT, [2] * PROMPT])  # none begins like the one before, whose cache would serve it
    prefill = best_time(lambda: engine.session([next(prompts)]).close())
    session = engine.session([next(prompts)])
    token = best_time(lambda: session.push([1]))
    session.close()
    return prefill, token


def best_time(step: Callable[[], object]) -> float:
    """Returns the shortest of some runs in seconds, after two to warm up: other work only makes a run longer."""
    seconds = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def _cache(file: Path, value: dict) -> None:
    """Writes to the user's cache; where that cannot be written, the next start measures again."""
    try:
        with writing(file, shared=True) as partial:
            partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    except OSError as error:
        print(f"{file} cannot be written ({error.strerror}): the choice is measured again next time.")


def packed_file(folder: Path, backend: str) -> Path | None:
    """Returns the cache file for the packed weights of a published model, and removes those of the oldest models.

    None where the folder is not published, or the disk too full.
    """
    if not (folder / checksums.NAME).is_file():
        return None
    file = cache_folder(key_of(folder)) / f"{backend}.safetensors"
    try:
        copying.check_space(file.parent, 0 if file.is_file() else stored_bytes(folder), file.name)
    except OSError:
        return None
    others = sorted(file.parents[1].glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime)
    for old in [path for path in others if path != file][: -(KEPT_MODELS - 1) or None]:
        with suppress(OSError):  # another start removes it too, or Windows has it open
            old.unlink()
    return file
