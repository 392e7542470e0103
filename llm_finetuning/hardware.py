"""What this machine is, and what that decides: device, dtype, attention, arithmetic speed, free memory and disk."""

import ctypes
import gc
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.benchmark import Timer

GIB = 2**30
SMALL = 100_000_000
"""Below so many parameters one CPU thread is as quick as several, and gives the same numbers on every machine."""
LARGE = 1_000_000_000
"""From so many parameters on, memory counts for more on a CPU than speed."""
_plans = count()
"""Numbers what processes ask each other, so that a second plan is not answered by the first one's values."""


@dataclass(frozen=True)
class Machine:
    """The device that trains. Memory in bytes, `flops` in operations per second as measured."""

    device: str
    name: str
    capability: tuple[int, int] | None
    memory: int
    free_memory: int
    host_memory: int
    cores: int
    flops: float
    varlen: bool = False
    """Whether torch's variable-length attention runs on it."""
    float32_flops: float = 0.0
    """The same in float32, as `with_memory_rates` measures it; 0 = not known."""
    bandwidth: float = 0.0
    """Bytes a second that a copy in its memory reads and writes, as measured there; 0 = not known."""

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


def detect(dtype: str = "auto") -> Machine:
    """Detects the machine; its peak matmul throughput is measured in under a second, in the dtype of the training."""
    host = host_memory()
    if torch.cuda.is_available():
        free_memory()  # blocks that an earlier run left in torch's cache are free
        device = f"cuda:{torch.cuda.current_device()}"
        free, total = torch.cuda.mem_get_info()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    else:
        device, name, capability = "cpu", cpu_name(), None
        free, total = min(psutil.virtual_memory().available, host), host
    rate = peak_matmul_flops(device, choose_dtype(dtype, capability))
    return Machine(device, name, capability, total, free, host, cores(), rate, has_varlen_kernel(device))


def with_memory_rates(machine: Machine) -> Machine:
    """The machine with what bounds work beside the products of a training: float32 throughput and memory traffic."""
    device = machine.device
    flops, traffic = peak_matmul_flops(device, torch.float32), copy_bandwidth(device)
    return replace(machine, float32_flops=flops, bandwidth=traffic)


def with_least_memory(machine: Machine) -> Machine:
    """The machine with the least free memory among the processes that torchrun or accelerate launched together.

    Processes that plan micro-batches of different sizes would wait for one another forever. Outside such a launch the
    machine stays as it is.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
        return machine
    store, rank, processes = next(torch.distributed.rendezvous("env://"))
    asked = f"free_memory/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_plans)}"
    store.set(f"{asked}/{rank}", str(machine.free_memory))
    free = min(int(store.get(f"{asked}/{other}")) for other in range(processes))
    return replace(machine, free_memory=free)


def cores() -> int:
    """CPU cores that this process may use: on Linux those it is bound to, elsewhere all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit if that is lower."""
    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(file).is_file() and (text := Path(file).read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)", info.read_text() if info.is_file() else "", re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def choose_dtype(wanted: str, capability: tuple[int, int] | None) -> torch.dtype:
    """What the computation runs in.

    "auto": bfloat16 on GPUs of capability 8.0 or later, float16 on older ones (a T4 only emulates bfloat16),
    float32 on a CPU, where it is exact and small models are quick enough. Raises ValueError for bfloat16 on a GPU
    without it.
    """
    if wanted == "auto":
        if capability is None:
            return torch.float32
        return torch.bfloat16 if capability >= (8, 0) else torch.float16
    if wanted == "bfloat16" and capability is not None and capability < (8, 0):
        raise ValueError(
            f"dtype = 'bfloat16': this GPU has capability {capability[0]}.{capability[1]} and only emulates it;"
            " set dtype = 'auto'"
        )
    if wanted == "float16" and capability is None:
        raise ValueError("dtype = 'float16': there is no GPU here; set dtype = 'float32' or 'bfloat16'")
    return getattr(torch, wanted)


def peak_matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Peak matmul throughput in operations per second, median of five products after a warm-up."""
    size = 8192 if device.startswith("cuda") else 768
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds("a @ b", a, b)


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes, median of five after a warm-up."""
    count = 2**28 if device.startswith("cuda") else 2**26
    a, b = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * count / _seconds("a.copy_(b)", a, b)


def _seconds(statement: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """The median time of a statement on two tensors; the GPU is waited for."""
    timer = Timer(statement, globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return sorted(timer.timeit(1).median for _ in range(5))[2]


def threads_for(parameters: int, cores: int) -> int:
    """CPU threads for a model of that size."""
    return 1 if parameters < SMALL else cores


class PeakMemory:
    """Peak memory of this process, in bytes, since `start`.

    On a GPU what the allocator gave out, and what has gone of the `free` bytes beside it: kernels, workspaces, the
    pages of a paged optimizer. On a CPU the anonymous memory, looked at twenty times a second: a model file that is
    mapped into memory does not count, the system takes those pages back when it needs them.
    """

    def __init__(self, device: str, free: int = 0):
        self.device, self.free, self.peak = device, free, 0
        self._stop = threading.Event()

    def start(self) -> "PeakMemory":
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            threading.Thread(target=self._look, name="peak-memory", daemon=True).start()
        return self

    def stop(self, *error: Any) -> None:
        """Stops looking; the peak stays readable."""
        self._stop.set()

    __enter__, __exit__ = start, stop

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, anonymous_memory())

    def read(self) -> int:
        if self.device.startswith("cuda"):
            beside = self.free - torch.cuda.mem_get_info(self.device)[0] - torch.cuda.memory_reserved(self.device)
            return torch.cuda.max_memory_allocated(self.device) + max(0, beside)
        self.peak = max(self.peak, anonymous_memory())
        return self.peak


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long the block took, and the peak of host memory in it."""
    begun = time.perf_counter()
    with PeakMemory("cpu") as peak:
        yield
    seconds = readable_seconds(time.perf_counter() - begun)
    print(f"{what}: {seconds}, host memory at most {as_gib(peak.read())}")


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind; outside Linux all that is resident."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def return_large_blocks() -> None:
    """Has every block of 1 MiB or more returned to the system as soon as it is freed, from now on.

    Left to itself glibc soon takes blocks of up to 32 MiB from its heap; freed between those that stay they leave
    holes, gigabytes beside a large model. The page faults cost a sixth of a training step of Phi-2 on two cores, and
    a quarter of one of a model of 100 million parameters.
    """
    _map_blocks_from(2**20)


def keep_large_blocks() -> None:
    """Has blocks of up to 32 MiB come from glibc's heap, from now on: quicker, where none stays beside others."""
    _map_blocks_from(2**25)


def _map_blocks_from(size: int) -> None:
    """Sets M_MMAP_THRESHOLD; the heap keeps 256 MiB at its end, else it would come and go with every block.

    See mallopt(3); only glibc has it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, size)  # M_MMAP_THRESHOLD in malloc.h
        libc.mallopt(-1, 2**28)  # M_TRIM_THRESHOLD


def free_memory() -> None:
    """Returns freed memory to the system: what Python no longer uses, the allocator's free blocks, CUDA's cache.

    In a notebook the newest error keeps the variables of all functions that it left; where memory ran out they go.
    """
    error = getattr(sys, "last_value", None)
    while isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        traceback.clear_frames(error.__traceback__)  # those that still run are left alone
        error = error.__cause__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def as_gib(count: float) -> str:
    """1.5e9 → '1.4 GiB'; small amounts in MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def readable_seconds(seconds: float) -> str:
    """75 → '1 min 15 s'; 3700 → '1 h 2 min'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def has_varlen_kernel(device: torch.device | str = "cuda") -> bool:
    """Whether `device` is a GPU that runs torch's variable-length attention."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
