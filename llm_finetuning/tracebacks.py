"""What a notebook shows of an error: the sentence alone where the package found what the user can cure.

Such an error is raised by a `raise` of this package, and is of a class in CURABLE; it keeps its class. Whatever a
library raises, and every other class, is a fault to be looked into and keeps its traceback.
"""

import dis
import sys
from types import TracebackType
from typing import Any

CURABLE = (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError)
RAISE = dis.opmap["RAISE_VARARGS"]


def shorten() -> None:
    """Makes the notebook that this process belongs to, if any, show curable errors without a traceback."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    if (shell := get_shell and get_shell()) is None:
        return
    whole = getattr(shell.showtraceback, "whole", shell.showtraceback)  # this package may be imported a second time

    def showtraceback(exc_tuple: tuple | None = None, *arguments: Any, **named: Any) -> None:
        _, error, trace = exc_tuple or sys.exc_info()
        if is_curable(error, trace):
            error._render_traceback_ = lambda: [getattr(error, "strerror", None) or str(error)]
        whole(exc_tuple, *arguments, **named)

    showtraceback.whole = whole
    shell.showtraceback = showtraceback


def is_curable(error: BaseException | None, trace: TracebackType | None) -> bool:
    """Whether a `raise` statement of this package raised the error, in a class for what a user can cure."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, CURABLE):
        return False
    frame = trace.tb_frame
    ours = frame.f_globals.get("__name__", "").partition(".")[0] == __package__
    return ours and frame.f_code.co_code[trace.tb_lasti] == RAISE
