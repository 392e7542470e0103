"""A shell as a notebook has it, and what it shows of a cell."""

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from llm_finetuning import tracebacks


@pytest.fixture
def shell():
    """An IPython shell with the package's display of errors."""
    made = InteractiveShell()
    made.colors = "NoColor"
    InteractiveShell._instance = made  # what IPython.get_ipython gives
    tracebacks.shorten()
    tracebacks.shorten()  # as after a second import
    yield made
    InteractiveShell.clear_instance()


def shown(shell: InteractiveShell, cell: str, **names) -> tuple[str, BaseException | None]:
    """(what is shown of a cell, the error that it ended with); names: those that the cell finds."""
    shell.user_ns |= names
    with capture_output() as output:
        result = shell.run_cell(cell)
    return output.stdout + output.stderr, result.error_in_exec
