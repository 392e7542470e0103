"""Writes to $IMPORT_CLOCK when a process loaded modules, and for how many seconds: a line for each, with its name.

Python imports a module of this name at the start of every process that finds it on its path. What an import imports
is part of it; those under a millisecond are left out.
"""

import os
import threading
import time
from importlib import _bootstrap

LEAST = 0.001
_load = _bootstrap._find_and_load  # what `import` and importlib.import_module both come to
_inside = threading.local()


def _timed(name, *arguments):
    if getattr(_inside, "an_import", False):
        return _load(name, *arguments)
    begun, _inside.an_import = time.time(), True
    try:
        return _load(name, *arguments)
    finally:
        _inside.an_import = False
        if (seconds := time.time() - begun) >= LEAST:
            with open(os.environ["IMPORT_CLOCK"], "a", encoding="utf-8") as file:
                file.write(f"{begun} {seconds} {name}\n")


if "IMPORT_CLOCK" in os.environ:
    _bootstrap._find_and_load = _timed
