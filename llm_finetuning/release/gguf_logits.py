"""Computes logits with llama.cpp: a script, in a process of its own, as its threads and torch's may crash each other.

    python gguf_logits.py model-f16.gguf examples.json TARGET.npy

examples.json: [{"input_ids": [T], "places": positions whose logits are asked for}, …]; writes them, (n, V) in float32.
"""

import json
import sys

import llama_cpp
import numpy as np

file, listed, target = sys.argv[1:]
with open(listed, encoding="utf-8") as opened:
    examples = json.load(opened)
context = max(len(example["input_ids"]) for example in examples)
llama = llama_cpp.Llama(file, n_ctx=context, n_batch=context, logits_all=True, verbose=False)
parts = []
for example in examples:
    llama.reset()
    llama.eval(example["input_ids"])
    parts.append(llama.scores[example["places"]].copy())
llama.close()
np.save(target, np.concatenate(parts))
