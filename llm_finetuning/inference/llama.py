"""llama.cpp as an engine: the Q4_K_M file beside a published folder, if the optional extra is installed."""

import threading
from importlib.util import find_spec
from pathlib import Path

import torch

from llm_finetuning.files import checksums
from llm_finetuning.inference.engines import common_prefix

PATTERN = "*Q4_K_M.gguf"


def file_beside(folder: Path) -> Path | None:
    """The Q4_K_M file in `folder` or in `<folder>-gguf`; None without the extra, or where the file is older.

    A file older than SHA256SUMS was made from another model that lay there before.
    """
    if find_spec("llama_cpp") is None or not (folder / checksums.NAME).is_file():
        return None
    published = (folder / checksums.NAME).stat().st_mtime
    beside = folder.with_name(f"{folder.name}-gguf")
    found = [*sorted(folder.glob(PATTERN)), *sorted(beside.glob(PATTERN))]
    return next((file for file in found if file.stat().st_mtime >= published), None)


class LlamaEngine:
    """One row at a time; what two prompts in a row have in common is not read again."""

    max_batch_size = 1
    name = "llama.cpp"

    def __init__(self, file: Path, context: int, threads: int):
        import llama_cpp

        self.llama = llama_cpp.Llama(
            str(file),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=False,  # the kernels repack the weights: mapped, the file would stay in memory beside them
            verbose=False,
        )
        self.context = context
        self.vocabulary_rows = self.llama.n_vocab()
        self.lock = threading.Lock()

    def set_threads(self, threads: int) -> None:
        import llama_cpp

        llama_cpp.llama_set_n_threads(self.llama._ctx.ctx, threads, threads)

    def session(self, rows: list[list[int]]) -> "LlamaSession":
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} rows at once: llama.cpp takes one here")
        return LlamaSession(self, rows[0])


class LlamaSession:
    """One row. Holds the engine's lock until it is closed, for llama.cpp has one cache."""

    def __init__(self, engine: LlamaEngine, row: list[int]):
        engine.lock.acquire()
        self.engine, self.open = engine, True
        llama = engine.llama
        llama.n_tokens = common_prefix(llama.input_ids[: llama.n_tokens].tolist(), row[:-1])
        self._eval(row[llama.n_tokens :])

    def push(self, ids: list[int]) -> None:
        self._eval(ids)

    def keep(self, indices: list[int]) -> None:
        """There is one row only."""

    def close(self) -> None:
        if self.open:
            self.open = False
            self.engine.lock.release()

    def _eval(self, ids: list[int]) -> None:
        """Feeds ids; leaves `logits` (1, V) of the last one."""
        import numpy as np

        llama = self.engine.llama
        llama.eval(ids)
        values = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(self.engine.vocabulary_rows,))
        self.logits = torch.from_numpy(values.copy())[None]
