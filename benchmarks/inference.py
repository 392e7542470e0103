"""Compares the original's inference (fp32, a transformers pipeline) with chat.py, and batches of several sizes.

    python benchmarks/inference.py [--size true] [--gguf FILE] [--tokenizer FOLDER] [--backends nf4+int8 llama.cpp]

A published folder with random weights, of a small Phi or of Phi-2's true size (5.6 GB of disk in --work, as much
again for caches); 64-token prompt, 32 new tokens. The original's way is written out from its description, see
`original`. Every turn has a process of its own: speed and memory differ from one loading to another.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import measuring
import shapes
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from llm_finetuning import models, prompts
from llm_finetuning.files import checksums
from llm_finetuning.inference import autotune, huge_pages, int8, llama, nf4
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.engines import TorchEngine
from llm_finetuning.inference.generation import Engine, SamplingParameters, TokenRules

PART = "inference"
PROMPT_TOKENS, NEW_TOKENS, WARM_UP_TOKENS = 64, 32, 4
ROUNDS = {"small": 5, "true": 3, "tiny": 2}
TURN = {"small": 1.0, "true": 0.0, "tiny": 0.0}
"""A turn answers for so many seconds: short answers are averaged."""
GROWTH = (1, 2, 4, 8, 16, 32)
"""Batch sizes; not measured at the true size on a CPU, where 32 answers take many minutes."""
GROWTH_ROUNDS = 2
GPU_ROUNDS = {"sides": 2, "growth": 1}
"""On a GPU, whose minutes are counted."""
ORIGINAL = "the original's pipeline in fp32"


def published(work: Path, size: str, tokenizer_folder: str, gguf: str) -> Path:
    """Makes a published folder with random weights, and puts the GGUF file, if one is given, beside it alone."""
    weights, folder = shapes.base(work, size, tokenizer_folder), work / f"published-{size}"
    if not (folder / checksums.NAME).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(weights, folder, copy_function=os.link)
        tokenizer = models.tokenizer(models.REHEARSAL, tokenizer_folder)
        prompts.template_for(tokenizer)
        for file in folder.glob("tokenizer*"):
            file.unlink()  # a link to the base's; written anew with the chat template
        tokenizer.save_pretrained(folder)
        GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
        checksums.write_checksums(folder)
    if gguf:
        beside = llama.folder_beside(folder)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        shutil.copyfile(gguf, beside / Path(gguf).name)
    return folder


def question(prompt_length: Callable[[str], int]) -> str:
    """Returns a question whose prompt has PROMPT_TOKENS tokens by `prompt_length(text)`."""
    text = "Why"
    while prompt_length(text + " a") <= PROMPT_TOKENS:
        text += " a"
    while prompt_length(text + "?") <= PROMPT_TOKENS:
        text += "?"
    return text


class Clock:
    """A streamer for `generate` that records the time of each token; the first one is the prompt itself."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: the last token has been recorded."""


def original(folder: Path) -> tuple[str, Callable]:
    """Returns its name and `answer(new_tokens)`, which gives the seconds to the first and to the last token.

    As the original did: everything in fp32, a pipeline for every question, the prompt as a string.
    """
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": device}, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = question(lambda t: len(tokenizer(f"Instruct: {t}\nOutput:").input_ids))

    def answer(new_tokens: int) -> tuple[float, float]:
        length = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        start, clock = time.perf_counter(), Clock()
        run = pipeline(task="text-generation", model=model, tokenizer=tokenizer)
        run(f"Instruct: {text}\nOutput:", streamer=clock, **length)
        return clock.times[1] - start, clock.times[-1] - start

    return ORIGINAL, answer


def ours(folder: Path, backend: str) -> tuple[str, Callable]:
    """Returns the same of chat.py; without stop token ids, so that every answer has its number of tokens."""
    chat = Chat.load(folder, backend)
    text = question(lambda t: len(chat.prepare([{"role": "user", "content": t}]).ids))
    endless = Chat(chat.engine, chat.template, TokenRules(frozenset(), chat.rules.suppressed_token_ids))
    asked = [text, text[::-1]]

    def answer(new_tokens: int, batch_size: int = 0) -> tuple[float, float]:
        """Answers one question, or a batch of them."""
        asked.reverse()  # no prompt begins like the one before,
        getattr(chat.engine, "kept", []).clear()  # nor like an earlier one
        turn, sampling = [{"role": "user", "content": asked[0]}], SamplingParameters(max_new_tokens=new_tokens)
        batch = [turn] * batch_size
        result = endless.generate_batch(batch, sampling)[0] if batch else endless.generate(turn, sampling)
        return result.first_token_seconds, result.seconds

    answer.engine = chat.engine
    return f"chat.py, {chat.engine.name}", answer


def stages(engine: Engine, answer: Callable) -> dict[str, float]:
    """Returns the seconds of the prefill, and of a token after it, in linear layers, in the head and in the rest.

    Empty for an engine that is no torch model, and on a GPU, whose work is still under way when a layer returns.
    """
    if not isinstance(engine, TorchEngine) or torch.cuda.is_available():
        return {}
    seconds = dict.fromkeys(("linear layers", "head"), 0.0)
    with ExitStack() as hooks:
        head = engine.model.get_output_embeddings()
        for layer in outermost(engine.model, (nf4.PackedLinear, int8.Int8Linear, torch.nn.Linear)):
            timed(layer, seconds, "head" if layer is head else "linear layers", hooks)
        prefill, answered = (_run(seconds, answer, tokens) for tokens in (1, NEW_TOKENS))
    token = {stage: (answered[stage] - prefill[stage]) / (NEW_TOKENS - 1) for stage in answered}
    return {f"{of}, {stage}": s for of, times in (("prefill", prefill), ("token", token)) for stage, s in times.items()}


def _run(seconds: dict[str, float], answer: Callable, tokens: int) -> dict[str, float]:
    seconds.update(dict.fromkeys(seconds, 0.0))
    _, whole = answer(tokens)
    return seconds | {"the rest": whole - sum(seconds.values())}


def outermost(module: torch.nn.Module, kinds: tuple[type, ...]) -> Iterator[torch.nn.Module]:
    """The modules of these kinds that lie in no other such module."""
    for child in module.children():
        yield from (child,) if isinstance(child, kinds) else outermost(child, kinds)


def timed(module: torch.nn.Module, seconds: dict[str, float], stage: str, hooks: ExitStack) -> None:
    """Adds the time of each forward pass of a module to `seconds[stage]`, until the hooks are removed."""

    def before(*_: object) -> None:
        seconds[stage] -= time.perf_counter()

    def after(*_: object) -> None:
        seconds[stage] += time.perf_counter()

    for hook in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
        hooks.callback(hook.remove)


def job(side: str, folder: Path, turn_seconds: float) -> Callable[..., dict]:
    """Returns the turn of a side, which answers one question after another, or one batch of them."""
    start = time.perf_counter()
    way, answer = original(folder) if side == ORIGINAL else ours(folder, side)
    load = time.perf_counter() - start

    def turn(**batch_size: int) -> dict:
        answers = [answer(NEW_TOKENS, **batch_size)]
        while sum(seconds for _, seconds in answers) < turn_seconds:
            answers.append(answer(NEW_TOKENS, **batch_size))
        first, seconds = (sum(times) / len(answers) for times in zip(*answers, strict=True))
        peak = measuring.peak_memory() / 1e9
        shares = stages(answer.engine, answer) if side != ORIGINAL and not batch_size else {}
        return {"way": way, "load": load, "first": first, "seconds": seconds, "peak": peak, "stages": shares}

    answer(WARM_UP_TOKENS)
    return turn


def bandwidth() -> float:
    """Returns at how many GB/s all threads read memory in huge pages, which bounds the tokens per second."""
    weights = torch.ones(2**27)
    huge_pages.use()
    return weights.nbytes / 1e9 / autotune.best_time(weights.sum)


def figures(found: dict[str, list[dict]]) -> list[dict]:
    """Returns speed, time to first token, loading and memory of the original beside those of every backend."""
    made: dict[str, dict] = {}
    original, *others = found.values()
    for other in others:
        made |= {entry["name"]: entry for entry in beside(original, other)}
    return list(made.values())


def beside(original: list[dict], other: list[dict]) -> list[dict]:
    def both(take: Callable[[list[dict]], list[float]]) -> list[tuple[str, list[float]]]:
        return [(turns[0]["way"], take(turns)) for turns in (original, other)]

    whole = both(lambda turns: [NEW_TOKENS / turn["seconds"] for turn in turns])
    decoding = both(lambda turns: [(NEW_TOKENS - 1) / (turn["seconds"] - turn["first"]) for turn in turns])
    return [
        *measuring.compare("tokens per second, reading the prompt included", "tokens/s", *reversed(whole)),
        *measuring.compare("tokens per second after the first", "tokens/s", *reversed(decoding)),
        *measuring.compare("time to the first token", "s", *both(lambda turns: [turn["first"] for turn in turns])),
        *measuring.compare("peak memory", "GB", *both(lambda turns: [turn["peak"] for turn in turns])),
        *(
            measuring.figure(f"loading, {way}", "s", loads)
            for way, loads in both(lambda turns: [turn["load"] for turn in turns])
        ),
        *(
            measuring.figure(f"{other[0]['way']}: {stage}", "s", [turn["stages"][stage] for turn in other])
            for stage in other[0]["stages"]
        ),
    ]


def main() -> None:
    parser = measuring.options(__doc__, "small", "true", "tiny")
    parser.add_argument("--tokenizer", default="", help="folder of Phi-2's tokenizer; without: the sample's")
    parser.add_argument("--gguf", default="", help="Q4_0 or Q4_K_M file of the same shape, to be put beside the folder")
    parser.add_argument("--backends", nargs="+", help="auto (the default), or names of inference.backends.NAMES")
    given = parser.parse_args()
    if given.side:
        os.environ["XDG_CACHE_HOME"] = str(given.work / "cache")  # what chat.py caches of a made-up model
        measuring.serve(lambda: job(given.side, given.work / f"published-{given.size}", TURN[given.size]))
        return
    published(given.work, given.size, given.tokenizer, given.gguf)
    both_forms = given.size == "true" and nf4.available()
    names = [ORIGINAL, *(given.backends or (["nf4+int8", "nf4"] if both_forms else ["auto"]))]
    arguments = ["--size", given.size, "--work", str(given.work)]
    gpu = torch.cuda.is_available()
    with measuring.sides(Path(__file__).name, names, arguments, apart=True) as turns:
        rounds = GPU_ROUNDS["sides"] if gpu else ROUNDS[given.size]
        found = figures(measuring.in_turn(turns, rounds, lambda so_far: record(figures(so_far), given)))
    if given.size != "true" or gpu:
        with measuring.sides(Path(__file__).name, names[1:2], arguments, apart=not gpu) as turns:
            found += how_it_grows(turns[names[1]], GPU_ROUNDS["growth"] if gpu else GROWTH_ROUNDS)
    if given.size == "true" and not gpu:
        found.append(measuring.figure("memory read", "GB/s", [bandwidth() for _ in range(ROUNDS["true"])]))
    record(found, given)


def record(found: list[dict], given: argparse.Namespace) -> None:
    print(f"written to {measuring.record(PART, given.size, found, given.results)}", flush=True)


def how_it_grows(turn: Callable[..., dict], rounds: int) -> list[dict]:
    """Returns seconds and tokens per second of batches of 1 to 32 questions."""
    batches = {size: (lambda size=size: turn(batch_size=size)["seconds"]) for size in GROWTH}
    grown = measuring.in_turn(batches, rounds)
    speeds = {size: [size * NEW_TOKENS / seconds for seconds in times] for size, times in grown.items()}
    figures = measuring.growth("time of answers side by side", "rows", "s", grown)
    for size, speed in speeds.items():
        figures.append(measuring.figure(f"tokens per second of all answers, {size} side by side", "tokens/s", speed))
    return figures


if __name__ == "__main__":
    main()
