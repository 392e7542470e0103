"""The original's way (fp32, a transformers pipeline) against chat.py: tokens per second, first token, peak memory.

    python benchmarks/inference.py --work FOLDER [--size true|small] [--gguf FILE] [--backends auto nf4 bfloat16]

`--size true`: Phi-2's configuration with random weights, made in FOLDER (5.6 GB, as much again for caches); 64-token
prompt, 32 new tokens. Every way runs in a process of its own, loading counted. Results: FOLDER/inference.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llm_finetuning import hardware

PROMPT_TOKENS, NEW_TOKENS, RUNS = 64, 32, 3
SMALL = {
    "hidden_size": 320,
    "intermediate_size": 1280,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def published(work: Path, size: str, tokenizer_folder: str, gguf: str) -> Path:
    """A published folder with random weights, and the GGUF file beside it if there is one."""
    from transformers import GenerationConfig

    from llm_finetuning import bases, prompts
    from llm_finetuning.release import sums

    tokenizer = bases.tokenizer("rehearsal", tokenizer_folder)
    config = bases.phi2_config(tokenizer)
    if size == "small":
        config.update(SMALL)
    weights = bases.make_rehearsal(work / f"base-{size}", tokenizer_folder, config)
    folder = work / f"published-{size}"
    if not (folder / "SHA256SUMS").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(weights, folder, copy_function=os.link)
        prompts.template_for(tokenizer)
        for file in folder.glob("tokenizer*"):
            file.unlink()  # a link to the base's; written anew with the chat template
        tokenizer.save_pretrained(folder)
        GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
        sums.write_sums(folder)
    if gguf:
        beside = folder.with_name(f"{folder.name}-gguf")
        beside.mkdir(exist_ok=True)
        shutil.copyfile(gguf, beside / "model-Q4_K_M.gguf")
    return folder


def question(prompt_length) -> str:
    """A question whose prompt has PROMPT_TOKENS tokens by `prompt_length(text)`."""
    text = "Why"
    while prompt_length(text + " a") <= PROMPT_TOKENS:
        text += " a"
    while prompt_length(text + "?") <= PROMPT_TOKENS:
        text += "?"
    return text


def original(folder: Path) -> dict:
    """As the original did: everything in fp32, a pipeline for the question, the prompt as a string."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

    class Clock(TextStreamer):
        def put(self, value):
            times.append(time.perf_counter())

        def end(self):
            pass

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = time.perf_counter() - start
    text = question(lambda t: len(tokenizer(f"Instruct: {t}\nOutput:").input_ids))
    prompt = f"Instruct: {text}\nOutput:"
    results = []
    for _ in range(RUNS):
        times: list[float] = []
        start = time.perf_counter()
        run = pipeline(task="text-generation", model=model, tokenizer=tokenizer)
        run(prompt, streamer=Clock(tokenizer), do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
        results.append((times[1] - start, times[-1] - start))  # times[0] is the prompt itself
    return summary("original: fp32 pipeline", loaded, results)


def ours(folder: Path, backend: str) -> dict:
    """chat.py with this backend; the end ids are taken away, so that every answer has NEW_TOKENS tokens."""
    from llm_finetuning.chat import Chat
    from llm_finetuning.serving.generation import Options, Rules

    start = time.perf_counter()
    chat = Chat.load(folder, backend)
    loaded = time.perf_counter() - start
    text = question(lambda t: len(chat.prepare([{"role": "user", "content": t}]).ids))
    endless = Chat(chat.engine, chat.template, Rules(frozenset(), chat.rules.suppressed))
    results = []
    for number in range(RUNS + 1):
        other = text if number % 2 else text[::-1]  # no prompt begins like the one before
        reply = endless.reply([{"role": "user", "content": other}], Options(max_new_tokens=NEW_TOKENS))
        results.append((reply.first_token_seconds, reply.seconds))
    return summary(f"chat.py: {chat.engine.name}", loaded, results[1:])


def summary(name: str, loaded: float, results: list[tuple[float, float]]) -> dict:
    """The fastest run: other work on the machine only makes one slower."""
    first, whole = min(results, key=lambda result: result[1])
    return {
        "way": name,
        "load_s": round(loaded, 1),
        "first_token_s": round(first, 2),
        "tokens_per_s": round(NEW_TOKENS / whole, 2),
        "decode_tokens_per_s": round((NEW_TOKENS - 1) / (whole - first), 2),
        "peak_gb": round(hardware.peak_resident() / 1e9, 2),
    }


def in_a_process(way: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--one", way, "--folder", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{way} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--size", choices=["true", "small"], default="small")
    parser.add_argument("--tokenizer", default="", help="folder of Phi-2's tokenizer; without: the sample's")
    parser.add_argument("--gguf", default="", help="Q4_K_M file of the same shape, to be put beside the folder")
    parser.add_argument("--backends", nargs="+", default=["auto", "auto", "bfloat16"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(original(given.folder) if given.one == "original" else ours(given.folder, given.one)))
        return
    folder = published(given.work, given.size, given.tokenizer, given.gguf)
    rows = []
    for way in ["original", *given.backends]:
        rows.append(in_a_process(way, folder))
        first, row = rows[0], rows[-1]
        row["times_faster"] = round(row["tokens_per_s"] / first["tokens_per_s"], 2)
        row["share_of_memory"] = round(row["peak_gb"] / first["peak_gb"], 3)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    machine = {"cpu": hardware.cpu_name(), "cores": len(os.sched_getaffinity(0))}
    found = {"size": given.size, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, **machine, "rows": rows}
    (given.work / "inference.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
