"""The command line: `python -m llm_finetuning run [--profile NAME|FILE] [--output DIR] [-p NAME VALUE]…`."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 = a notebook failed, 2 = refused before anything ran."""
    options = _parser().parse_args(arguments)
    output = options.output or Path("outputs") / Path(options.profile).stem
    from llm_finetuning.runner import notebooks, summary  # after the arguments: importing them takes seconds

    try:
        assigned = notebooks.prepare(options.profile, output, options.parameter)
    except (ValueError, OSError) as error:
        print(f"Nothing was run.\n{error}", file=sys.stderr)
        return 2
    try:
        notebooks.run(assigned, output)
    except notebooks.NotebookFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    summary.show(output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm_finetuning")
    run = parser.add_subparsers(required=True, metavar="run").add_parser(
        "run", help="run the four notebooks in order", description="Run the four notebooks in order."
    )
    run.add_argument(
        "--profile", default="sample", help="sample (the default), rehearsal, or a YAML file of parameters"
    )
    run.add_argument("--output", type=Path, metavar="DIR", help="where everything goes (default: outputs/<profile>)")
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter in every notebook that has it; may be repeated",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
