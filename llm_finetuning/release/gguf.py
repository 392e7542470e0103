"""Exporting a merged folder to GGUF for llama.cpp and Ollama, an optional extra: `make gguf` installs what it needs.

    python -m llm_finetuning.release.gguf outputs/sample/finetuned_phi2 [target folder]

writes model-f16.gguf, model-Q4_K_M.gguf and a Modelfile, and compares a greedy answer with transformers'.
llama.cpp's converter comes with the source package of llama-cpp-python; it knows Phi-2's tokenizer by a hash.
"""

import os
import re
import subprocess
import sys
from itertools import islice, takewhile
from pathlib import Path

import torch
import transformers

from llm_finetuning.files.atomic import write_text, writing
from llm_finetuning.files.checksums import verify_checksums
from llm_finetuning.files.copying import check_space

UNPACKED = Path(__file__).parents[2] / ".gguf"
"""Where `make gguf` unpacks the source package of llama-cpp-python."""
QUANTISATION = "Q4_K_M"
QUESTION, LONGEST = "What is the capital of France?", 32
TEMPLATE = """\
{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}
{{ else if eq .Role "user" }}Instruct: {{ .Content }}
Output:{{ else if eq .Role "assistant" }} {{ .Content }}EOS
{{ end }}{{ end }}"""
"""Phi-2's format (prompts.PHI2_FORMAT) in Ollama's template language; EOS stands for the end-of-text token."""


def export(folder: str | Path, target: str | Path) -> dict[str, Path]:
    """Writes f16, Q4_K_M and Modelfile of the merged model in `folder` to `target`; returns {"f16" | …: path}.

    Raises FileNotFoundError without llama.cpp, ValueError for a folder that is not complete, a tokenizer that
    llama.cpp does not know, or a chat template other than Phi-2's.
    """
    folder, target = Path(folder), Path(target)
    verify_checksums(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_space(target, int(1.4 * weights), "The GGUF files")
    target.mkdir(parents=True, exist_ok=True)
    text = modelfile(folder, f"model-{QUANTISATION}.gguf")
    f16 = convert(folder, target / "model-f16.gguf")
    small = quantise(f16, target / f"model-{QUANTISATION}.gguf")
    return {"f16": f16, QUANTISATION: small, "Modelfile": write_text(target / "Modelfile", text)}


def converter() -> Path:
    """Finds llama.cpp's convert_hf_to_gguf.py, from the folder LLAMA_CPP or from what `make gguf` unpacked."""
    places = [Path(os.environ["LLAMA_CPP"])] if "LLAMA_CPP" in os.environ else []
    places += sorted(UNPACKED.glob("llama_cpp_python-*/vendor/llama.cpp"))
    scripts = [place / "convert_hf_to_gguf.py" for place in places if (place / "conversion").is_dir()]
    if not scripts:
        raise FileNotFoundError(
            "llama.cpp's converter is not here. Run `make gguf` (it builds llama-cpp-python, about 5 minutes on "
            "2 cores), or set LLAMA_CPP to a checkout of llama.cpp."
        )
    return scripts[-1]


def convert(folder: Path, target: Path) -> Path:
    """Converts the folder's weights, in 16-bit floats, and its tokenizer to one GGUF file."""
    with writing(target) as partial:
        command = [sys.executable, str(converter()), str(folder), "--outfile", str(partial), "--outtype", "f16"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode and "pre-tokenizer was not recognized" in result.stderr:
            raise ValueError(
                f"llama.cpp does not know the tokenizer in {folder}. It knows those of published models, Phi-2's among "
                "them; the sample's own tokenizer is not one of them. Export a model finetuned from microsoft/phi-2."
            )
        if result.returncode:
            end = "\n".join(result.stderr.splitlines()[-5:])
            raise ValueError(f"llama.cpp could not convert {folder}:\n{end}")
    return target


def quantise(f16: Path, target: Path) -> Path:
    """Quantises most weights of a GGUF file to 4 bits (Q4_K_M, about 4.8 bits a weight)."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{QUANTISATION}")
    with writing(target) as partial:
        failed = llama_cpp.llama_model_quantize(os.fsencode(f16), os.fsencode(partial), parameters)
        if failed:
            raise ValueError(f"llama.cpp could not quantise {f16} to {QUANTISATION} (code {failed}).")
    return target


def modelfile(folder: Path, gguf_name: str) -> str:
    """Returns what `ollama create NAME -f Modelfile` reads: weights, template, system message, stop, greedy answers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    system = _system_message(tokenizer)
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{TEMPLATE.replace("EOS", tokenizer.eos_token)}"""',
        *([f'SYSTEM """{system}"""'] if system else []),
        f'PARAMETER stop "{tokenizer.eos_token}"',
        f"PARAMETER num_ctx {config.max_position_embeddings}",
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"


def _system_message(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """What the chat template puts before a conversation. Raises ValueError unless the rest is Phi-2's format."""
    eos = tokenizer.eos_token
    turns = [{"role": role, "content": word} for role, word in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = f"Instruct: a\nOutput: b{eos}\nInstruct: c\nOutput:"
    if tokenizer.bos_token:  # llama.cpp adds it
        text = re.sub(rf"\A{re.escape(tokenizer.bos_token)} ?", "", text)
    system, separator, _ = text.rpartition(expected)
    if not separator or not (system == "" or system.endswith("\n")) or not text.endswith(expected):
        raise ValueError(
            f"The chat template of this model is not Phi-2's format: {text!r}. Its Modelfile has to be written by "
            "hand; the GGUF file carries the template itself, for llama.cpp's --jinja."
        )
    return system.removesuffix("\n")


def answer(gguf: Path, ids: list[int], max_new_tokens: int) -> list[int]:
    """Continues token ids greedily with llama.cpp, up to the end-of-text token, which is left out."""
    import llama_cpp

    model = llama_cpp.Llama(str(gguf), n_ctx=len(ids) + max_new_tokens, verbose=False)
    tokens = islice(model.generate(ids, temp=0.0, repeat_penalty=1.0), max_new_tokens)
    new = list(takewhile(lambda token: token != model.token_eos(), tokens))
    model.close()
    return new


def smoke(folder: Path, f16: Path) -> tuple[str, str]:
    """Returns the greedy answers of transformers (in float32) and of llama.cpp (f16) to QUESTION."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    count = prompt["input_ids"].shape[1]
    ids = model.generate(**prompt, max_new_tokens=LONGEST, do_sample=False)[0, count:].tolist()
    other = answer(f16, prompt["input_ids"][0].tolist(), LONGEST)
    return tokenizer.decode(ids, skip_special_tokens=True), tokenizer.decode(other)


def main(folder: str, target: str = "") -> None:
    files = export(folder, target or f"{folder.rstrip('/')}-gguf")
    for path in files.values():
        print(f"{path} ({path.stat().st_size / 1e6:,.1f} MB)")
    ours, theirs = smoke(Path(folder), files["f16"])
    print(f"{QUESTION}\n  transformers: {ours}\n  llama.cpp:    {theirs}\n  same: {ours == theirs}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
