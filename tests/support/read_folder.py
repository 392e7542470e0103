"""Reads model folders with whichever transformers is on the path: `python read_folder.py FOLDER…`, JSON on stdout.

Each answer is greedy, from the folder's own chat template, as plain `generate` and `pipeline` give it.
"""

import json
import sys

import torch
import transformers

PROMPTS = [f"{ask} {thing}?" for ask in ("Which colour does", "Where is", "Who was", "Count", "日本語") for thing in (
    "mira like", "the house", "first", "to sixteen", "Zürich  été", "2 + 2", "<b>x</b>", "naïve 😀", "a\n\tb", "C++'s"
)]  # fmt: skip
NEW_TOKENS = 8
PROBE = list(range(5, 69))
"""Token ids whose logits are compared: long enough for a wrong rotary setting to show."""


def read(folder: str) -> dict:
    # `torch_dtype`: the name that all versions take
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        answers.append({"ids": ids, "text": tokenizer.decode(ids[asked["input_ids"].shape[1] :])})
    with torch.no_grad():
        logits = model(torch.tensor([PROBE]), use_cache=False).logits[0, ::9, ::7]
    return {
        "answers": answers,
        "piped": piped(model, tokenizer),
        "logits": logits.tolist(),
        "dtype": str(transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype),
    }


def piped(model, tokenizer) -> str:
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    talk = [{"role": "user", "content": PROMPTS[0]}]
    return pipeline(talk, max_new_tokens=NEW_TOKENS, do_sample=False)[0]["generated_text"][-1]["content"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = {folder: read(folder) for folder in sys.argv[1:]}
    print(json.dumps({"version": transformers.__version__, "folders": folders}))
