"""``samv2 train``: federated rounds in this process and its workers."""

from __future__ import annotations

import argparse
from typing import Any

from samv2.commands.options import (
    add_run_options,
    add_settings_options,
    settings_from,
    settings_help,
)


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "train",
        help="run a federation",
        description="Prepare text and model, then run federated rounds. Everything is "
        "written to --log-dir; a stopped run continues with --resume and ends in the "
        "same bits.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings_options(parser, default=None)
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.commands.summary import show_summary
    from samv2.common.config import load_settings
    from samv2.common.telemetry import make_console
    from samv2.federated.run_folder import RunFolder, is_run
    from samv2.federated.server_app import run_embedded

    if arguments.resume and arguments.config is None and is_run(arguments.log_dir):
        stored = RunFolder(root=arguments.log_dir).config
        settings = load_settings(stored, arguments.overrides)
    else:
        settings = settings_from(arguments)
    console = make_console()
    summary = run_embedded(
        settings,
        arguments.log_dir,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        console=console,
    )
    show_summary(summary, arguments.log_dir, console)
    return 0
