"""The command line.

python -m llm_finetuning run [--profile NAME|FILE] [--output DIR] [--notebooks NAME,…] [-p NAME=VALUE]…
python -m llm_finetuning search [--profile NAME|FILE] [--output DIR] -p NAME=VALUE,VALUE…
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llm_finetuning import __version__, tracebacks
from llm_finetuning.runner import stopping

if TYPE_CHECKING:
    from llm_finetuning.runner.steps import Step


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 = a notebook failed, 2 = refused before anything ran.

    A run that is stopped ends the process with 130.
    """
    stopping.stop.listen()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where the terminal or pipe takes less than Unicode
    options = _parser().parse_args(arguments)
    output = options.output or Path("outputs") / Path(options.profile).stem
    return options.command(options, output)


def _notebooks(options: argparse.Namespace, output: Path) -> int:
    """Answers `run`."""
    from llm_finetuning.runner import listing, steps  # after the arguments: a typing mistake is answered at once

    try:
        chosen = steps.named(options.notebooks or "")
        if options.parameters:
            if hasattr(signal, "SIGPIPE"):  # not on Windows
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager or head that is closed ends it without a word
            print(listing.text(options.profile, chosen))
            return 0
        assigned = steps.prepare(options.profile, output, options.parameter, chosen)
        for sentence in steps.not_used(options.parameter, chosen):
            print(sentence, flush=True)
    except (ValueError, OSError) as error:
        print(f"Nothing was run.\n{error}", file=sys.stderr)
        return 2
    return _run(assigned, output, chosen)


def _search(options: argparse.Namespace, output: Path) -> int:
    """Answers `search`."""
    from llm_finetuning.runner import search

    try:
        request = search.request(options.profile, output, options.parameter, options.seeds, options.steps)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"Nothing was run.\n{error}", file=sys.stderr)
        return 2
    from llm_finetuning.runner import study  # importing it takes seconds

    try:
        study.run(request)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # training has saved a checkpoint
        stopping.leave()
    return 0


def _run(assigned: list[dict], output: Path, chosen: "tuple[Step, ...]") -> int:
    """Runs the notebooks with their parameters and shows what came out; returns the exit code."""
    from llm_finetuning.runner import notebooks  # importing it takes seconds

    try:
        notebooks.run(assigned, output, chosen)
        from llm_finetuning.runner import summary  # so does this

        summary.show(output)
    except notebooks.FolderBusy as error:
        print(f"Nothing was run.\n{error}", file=sys.stderr)
        return 2
    except notebooks.NotebookFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        stopping.leave(str(stopped))
    except BrokenPipeError:  # nobody reads any more
        stopping.leave()
    except OSError as error:  # of what is kept of a notebook: the disk is full or gone
        print(f"\n{_sentence(error, output)}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: OSError, output: Path) -> str:
    """Returns what an error of files says, with its cure where it has none of its own."""
    said = error.strerror or str(error)
    if tracebacks.is_curable(error, error.__traceback__):
        return said
    return f"{error.filename or output}: {said}. When that is cured, the same command goes on."


class _Assignment(argparse.Action):
    """Reads `-p NAME=VALUE…` and `-p NAME VALUE` into pairs of name and value."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, words: list[str], option: str = ""
    ) -> None:
        pairs = [word.split("=", 1) for word in words] if "=" in words[0] else [words]
        if any(len(pair) != 2 or not pair[0].strip() for pair in pairs):
            parser.error(f"{option} {' '.join(words)}: expected NAME=VALUE or NAME VALUE")
        getattr(namespace, self.dest).extend(map(tuple, pairs))


class _Parser(argparse.ArgumentParser):
    """A parser that tells who typed a parameter as an option of its own how it is set."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with the message, as argparse does."""
        super().error(f"{message}; a parameter is set with -p NAME=VALUE" if "unrecognized" in message else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m llm_finetuning")
    parser.add_argument("--version", action="version", version=f"llm_finetuning {__version__}")
    commands = parser.add_subparsers(required=True, metavar="run|search")
    run = _command(commands, "run", "run the notebooks in order", _notebooks)
    run.add_argument(
        "--notebooks",
        type=_names,
        metavar="NAME,…",
        help="which to run, in their order: generation, training-data, validation-data, finetuning, preference,"
        " inference, evaluation (default: all but generation, preference and evaluation)",
    )
    run.add_argument(
        "--parameters", action="store_true", help="list the parameters of these notebooks, and run nothing"
    )
    search = _command(commands, "search", "compare trainings with several values of some parameters", _search)
    search.add_argument("--seeds", type=_number(1), default=3, metavar="N", help="seeds of each (default: 3)")
    search.add_argument(
        "--steps",
        type=_number(0),
        metavar="N",
        help="optimizer steps of each training; 0 = the whole run (default: a fifth of it, from 20 to 60)",
    )
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, sentence: str, answer: Callable[[argparse.Namespace, Path], int]
) -> argparse.ArgumentParser:
    """A command with what all of them take."""
    command = commands.add_parser(name, help=sentence, description=f"{sentence[0].upper()}{sentence[1:]}.")
    command.set_defaults(command=answer)
    command.add_argument(
        "--profile", default="sample", help="sample (the default), rehearsal, or a YAML file of parameters"
    )
    command.add_argument("--output", type=_folder, metavar="DIR", help="where all goes (default: outputs/<profile>)")
    several = "; of the finetuning notebook's several values, separated by commas" if name == "search" else ""
    command.add_argument(
        "-p",
        "--parameter",
        nargs="+",
        action=_Assignment,
        default=[],
        metavar="NAME=VALUE",
        help="set a parameter in every notebook that has it; NAME VALUE does it too; may be repeated" + several,
    )
    return command


def _folder(text: str) -> Path:
    """Reads a folder; `~` is the home, which a shell leaves alone in --output=~/results."""
    if not text.strip():  # of a shell's variable that is not set
        raise argparse.ArgumentTypeError("no folder is named")
    return Path(os.path.expanduser(text))


def _names(text: str) -> str:
    """Reads a list of names; a blank one is a shell's variable that is not set, and not all of them."""
    if not text.strip(" ,"):
        raise argparse.ArgumentTypeError("no notebook is named")
    return text


def _number(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number, at least {least}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
