"""The engine of llama.cpp, for the 4-bit file beside a published folder, if the optional extra is installed."""

import threading
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from llm_finetuning.files import checksums
from llm_finetuning.inference.engines import common_prefix
from llm_finetuning.inference.llama_kernels import amx_runs, safe_kernels

QUICK, NEAR = "*Q4_0.gguf", "*Q4_K_M.gguf"
"""Files that can be used: the quickest where AMX kernels compute it; elsewhere as quick, and nearer to the model."""


def folder_beside(folder: Path) -> Path:
    """Returns where the GGUF files of a published folder lie."""
    return folder.with_name(f"{folder.name}-gguf")


def file_beside(folder: Path) -> Path | None:
    """Returns the file to use in `folder` or `<folder>-gguf`; None without the extra, or where the file is older.

    A file older than SHA256SUMS was made from another model that lay there before.
    """
    if find_spec("llama_cpp") is None or not (folder / checksums.NAME).is_file():
        return None
    published = (folder / checksums.NAME).stat().st_mtime
    places = (folder, folder_beside(folder))
    patterns = (QUICK, NEAR) if amx_runs() else (NEAR, QUICK)
    files = [file for pattern in patterns for place in places for file in sorted(place.glob(pattern))]
    return next((file for file in files if file.stat().st_mtime >= published), None)


class LlamaEngine:
    """A GGUF model that answers one request at a time; a prefix that successive prompts share is not recomputed."""

    max_batch_size = 1
    name = "llama.cpp"

    def __init__(self, file: Path, context: int, threads: int):
        import llama_cpp

        with safe_kernels(llama_cpp.llama_cpp):
            self.llama = llama_cpp.Llama(
                str(file),
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                use_mmap=False,  # the kernels repack the weights: mapped, the file would stay in memory beside them
                verbose=False,
            )
        weakref.finalize(self, self.llama.close)  # at exit too: llama_cpp's own __del__ comes too late there
        self.context = context
        self.vocab_size = self.llama.n_vocab()
        self.lock = threading.Lock()

    def set_threads(self, threads: int) -> None:
        import llama_cpp

        llama_cpp.llama_set_n_threads(self.llama._ctx.ctx, threads, threads)

    def session(self, sequences: list[list[int]]) -> "LlamaSession":
        (ids,) = sequences  # max_batch_size is 1
        return LlamaSession(self, ids)


class LlamaSession:
    """One sequence. It holds the engine's lock until it is closed, as llama.cpp has a single cache."""

    def __init__(self, engine: LlamaEngine, ids: list[int]):
        engine.lock.acquire()
        self.engine, self.open = engine, True
        llama = engine.llama
        try:
            known = common_prefix(llama.input_ids[: llama.n_tokens].tolist(), ids[:-1])
            if known < llama.n_tokens and not llama._ctx.kv_cache_seq_rm(-1, known, -1):
                llama.reset()  # a state that runs along cannot be cut
                known = 0
            llama.n_tokens = known
            self._eval(ids[known:])
        except BaseException:
            self.close()
            raise

    def push(self, ids: list[int]) -> None:
        self._eval(ids)

    def keep(self, indices: list[int]) -> None:
        """Does nothing: there is one sequence only."""

    def close(self) -> None:
        if self.open:
            self.open = False
            self.engine.lock.release()

    def _eval(self, ids: list[int]) -> None:
        """Feeds ids; sets `logits` (1, V) of the last one."""
        llama = self.engine.llama
        llama.eval(ids)
        values = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(self.engine.vocab_size,))
        self.logits = torch.from_numpy(values.copy())[None]
