"""Computes logits with llama.cpp: a script, in a process of its own, which may crash without taking others along.

    python gguf_logits.py model-f16.gguf examples.json TARGET.npy

examples.json: [{"input_ids": [T], "places": positions whose logits are asked for}, …]; writes them, (n, V) in float32.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama, llama_cpp

sys.path[0] = str(Path(__file__).parents[2])  # in place of this file's folder
from llm_finetuning.inference.llama_kernels import safe_kernels  # noqa: E402

file, listed, target = sys.argv[1:]
with open(listed, encoding="utf-8") as opened:
    examples = json.load(opened)
threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
context = max(len(example["input_ids"]) for example in examples)
with safe_kernels(llama_cpp):
    llama = Llama(file, n_ctx=context, n_batch=context, n_threads_batch=threads, logits_all=True, verbose=False)
parts = []
for example in examples:
    llama.reset()
    llama.eval(example["input_ids"])
    parts.append(llama.scores[example["places"]].copy())
llama.close()
np.save(target, np.concatenate(parts))
