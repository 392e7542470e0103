"""The backends that can run a model: torch in 16 or 32 bits, 4 bits on a GPU, NF4 on a CPU, llama.cpp.

"nf4+int8" is NF4 on a CPU whose layers hold their weights in int8 as well: a quicker prefill for a byte a parameter.
"""

from pathlib import Path

import torch
import transformers

from llm_finetuning import hardware, models
from llm_finetuning.inference import autotune, huge_pages, llama, nf4
from llm_finetuning.inference.engines import TorchEngine
from llm_finetuning.inference.generation import Engine

NAMES = ("float32", "bfloat16", "float16", "nf4", autotune.NF4_INT8, "llama.cpp")


def load(folder: str | Path, backend: str = "auto", threads: int = 0) -> Engine:
    """Loads the model in `folder`, or of that name on the Hub, with a backend.

    threads: of the CPU; 0 = as measured, or else as torch is set.
    Raises ValueError for a backend that is unknown or not possible here.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend = {backend!r}: auto, {', '.join(NAMES)}")
    folder = Path(folder) if Path(folder).is_dir() else models.fetch(str(folder))
    config = models.one_kernel_gelu(models.configuration(str(folder)))
    if torch.cuda.is_available():
        return load_on_gpu(folder, config, backend)
    if backend == "auto":
        timing = autotune.fastest(folder, config)
        backend, threads = timing.backend, threads or timing.threads
    engine = load_on_cpu(folder, config, backend, threads or torch.get_num_threads())
    huge_pages.use()
    return engine


def load_on_cpu(folder: Path, config: "transformers.PreTrainedConfig", backend: str, threads: int) -> Engine:
    if backend == "llama.cpp":
        return load_llama(folder, config, threads)
    torch.set_num_threads(threads)
    if backend in ("nf4", autotune.NF4_INT8):
        model = load_nf4(folder, config, backend)
    else:
        model = load_torch(folder, config, getattr(torch, backend))
    return TorchEngine(model, f"{backend} on {threads} CPU threads")


def load_on_gpu(folder: Path, config: "transformers.PreTrainedConfig", backend: str) -> TorchEngine:
    """Loads a model in 16 bits, bfloat16 where the GPU has it, or in 4 bits where the memory is too small for that."""
    dtype = hardware.choose_dtype("auto", torch.cuda.get_device_capability())
    if backend in ("llama.cpp", autotune.NF4_INT8):
        raise ValueError(f"backend = {backend!r}: serves CPUs here; set backend = 'auto'")
    if backend in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, backend)
    elif backend == "auto":
        free, _ = torch.cuda.mem_get_info()
        backend = "nf4" if models.count_parameters(config) * 2.3 > free else str(dtype).removeprefix("torch.")
    model = load_torch(folder, config, dtype, models.four_bit(dtype) if backend == "nf4" else None)
    return TorchEngine(model, f"{backend} on {torch.cuda.get_device_name()}")


def load_torch(
    folder: Path,
    config: "transformers.PreTrainedConfig",
    dtype: torch.dtype,
    quantization: "transformers.BitsAndBytesConfig | None" = None,
) -> "transformers.PreTrainedModel":
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
        attn_implementation=models.padded_attention(config),
        quantization_config=quantization,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise ValueError(f"{folder} lacks {len(missing)} weights of its model ({missing[0]}, …): fetch it again")
    return model


def load_nf4(folder: Path, config: "transformers.PreTrainedConfig", backend: str) -> "transformers.PreTrainedModel":
    if not nf4.available():
        raise ValueError(
            f"backend = {backend!r}: needs bitsandbytes and a CPU with AVX512-BF16, or a GPU; set backend = 'auto'"
        )
    return nf4.load(folder, config, autotune.packed_file(folder, backend), backend == autotune.NF4_INT8)


def load_llama(folder: Path, config: "transformers.PreTrainedConfig", threads: int) -> llama.LlamaEngine:
    file = llama.file_beside(folder)
    if file is None:
        raise ValueError(
            f"backend = 'llama.cpp': needs llama-cpp-python and a Q4_0 or Q4_K_M file newer than {folder}, in it"
            f" or in {folder.name}-gguf beside it: make gguf MODEL={folder}"
        )
    engine = llama.LlamaEngine(file, config.max_position_embeddings, threads)
    if engine.vocab_size != config.vocab_size:
        raise ValueError(f"{file} has {engine.vocab_size:,} tokens, {folder} {config.vocab_size:,}: export it again")
    return engine
