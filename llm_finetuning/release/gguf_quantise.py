"""Quantises a GGUF file, in a process of its own, so that an interrupt ends it: a script.

python gguf_quantise.py model-f16.gguf TARGET Q4_K_M
"""

import os
import sys

import llama_cpp

source, target, kind = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
if kind == "Q4_0":  # the quickest on a CPU: llama.cpp would take for the head a type that costs its time
    parameters.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
sys.exit(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters))
