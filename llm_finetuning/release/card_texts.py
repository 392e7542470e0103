"""How to use what was published: the last section of the model card."""

from llm_finetuning.files.checksums import COMMAND

MODEL = f"""\
Check that the download is whole, in this folder:

```bash
{COMMAND}
```

The prompt format travels with the tokenizer (`apply_chat_template`); do not write it by hand.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
messages = [{{"role": "user", "content": "Hello!"}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

vLLM (a GPU), with an OpenAI-compatible server on port 8000:

```bash
vllm serve . --max-model-len 2048
```

llama.cpp: convert and quantise once, then chat.

```bash
python convert_hf_to_gguf.py . --outfile model-f16.gguf --outtype f16
llama-quantize model-f16.gguf model-Q4_K_M.gguf Q4_K_M
llama-cli -m model-Q4_K_M.gguf --jinja
```"""

ADAPTER = f"""\
Check that the download is whole, in this folder:

```bash
{COMMAND}
```

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")  # fetches the base by itself
messages = [{{"role": "user", "content": "Hello!"}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
