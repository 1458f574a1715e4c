"""The command line: one verb per job; ``samv2 VERB --help`` teaches each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from samv2.common.errors import SamError

DESCRIPTION = """\
Turn a pre-trained Llama-style LLM into a graph of experts and fine-tune it across
clients whose texts differ, sending only the experts that matter.

Start with:  samv2 demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    from samv2.commands import COMMANDS

    parser = argparse.ArgumentParser(
        prog="samv2",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verbose", action="store_true", help="show debug messages")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for command in COMMANDS:
        command.register(verbs)
    arguments = parser.parse_args(argv)
    from samv2.common.telemetry import log_to, make_console

    errors = make_console(stderr=True)
    log_to(errors, verbose=arguments.verbose)
    try:
        return arguments.run(arguments)
    except (SamError, OSError) as error:
        if arguments.verbose:
            errors.print_exception()
        errors.print(f"[bold red]error:[/bold red] {_escaped(error)}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("stopped; a run keeps its completed rounds: go on with --resume")
        return 130


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def existing_folder(text: str) -> Path:
    """An argparse type: a folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path


def existing_file(text: str) -> Path:
    """An argparse type: a file that is there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name one file in it")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist; check the path")
    return path


if __name__ == "__main__":
    sys.exit(main())
