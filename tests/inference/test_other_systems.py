"""What people do at home, without what macOS and Windows lack: import of every module, chat, page."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MISSING = """
import builtins, errno, importlib, os, pkgutil, signal, sys
from pathlib import Path
import bitsandbytes, datasets, gradio, matplotlib.pyplot, peft, psutil, torch, transformers, trl  # as built for it

for name in ("sched_getaffinity", "posix_fadvise", "O_DIRECTORY", "getuid", "getloadavg", "statvfs", "fork"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGALRM", "SIGKILL", "SIGHUP", "SIGPIPE", "alarm"):
    delattr(signal, name)
for name in ("EREMOTEIO", "EDQUOT", "ESTALE"):
    delattr(errno, name)
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None

open_file, is_file = builtins.open, Path.is_file
def hidden(path):
    return str(path).startswith(("/proc", "/sys"))
def guarded(path, *rest, **options):
    if hidden(path) and "psutil" not in sys._getframe(1).f_code.co_filename:  # which is another one there
        raise FileNotFoundError(path)
    return open_file(path, *rest, **options)
builtins.open = guarded
Path.is_file = lambda path: not hidden(path) and is_file(path)

# Windows
open_handle = os.open
def no_folders(path, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return open_handle(path, *rest, **options)
os.open = no_folders
import llm_finetuning.files.copying as copying
copying.os = type("os", (), {name: getattr(os, name) for name in dir(os)} | {"name": "nt"})
copying.sync_folder(Path("."))
"""

USE = """
import llm_finetuning
for module in pkgutil.walk_packages(llm_finetuning.__path__, "llm_finetuning."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in ("llama_cpp", "optuna"):  # for what runs where they are installed
                raise

from llm_finetuning import hardware
from llm_finetuning.inference import autotune, page
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.page import loading
from llm_finetuning.inference.generation import SamplingParameters

folder = Path(sys.argv[1])
chat = Chat.load(folder)
print(chat.answer([{"role": "user", "content": "Count."}]))
assert chat.engine.name == "float32 on 1 CPU threads", chat.engine.name
assert hardware.detect().cores == hardware.cores() == os.cpu_count()
assert autotune.fingerprint(folder)["cores"] == os.cpu_count() and autotune.fingerprint(folder)["cpu"]
assert autotune.measure(folder, transformers.AutoConfig.from_pretrained(folder), [1])
with hardware.timed("nothing"):
    pass
print(page.launch(page.build(loading.in_background(lambda: chat, ""), "T", [], SamplingParameters()), wait=False))
"""


@pytest.mark.slow  # older libraries of Jupyter ask for more of the system
def test_chat_and_page_need_nothing_that_only_linux_has(published, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MISSING + USE, str(published)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "one two three" in done.stdout and "http://127.0.0.1" in done.stdout
