"""``samv2 bench-federation``: SAM-v2 beside federated and central LoRA, on equal terms."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from samv2.commands.options import add_settings_options

METHODS = "fedit,ffa-lora,local,central,samv2,samv2-sparse"

WIDTH = 120
"""Of the table where there is no terminal."""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "bench-federation",
        help="compare methods of federated fine-tuning on the same text",
        description="Runs every method on the same clients' text, batches and held-out "
        "windows: FedIT and FFA-LoRA (federated LoRA), LoRA on each client alone and on "
        "all text, and SAM-v2. Each has a folder in --log-dir, goes on where it was "
        "stopped, and is not run again once finished. Writes federation.json and "
        "federation.png. The config is an ordinary one, with tables [methods.NAME] of "
        "dotted keys for one method; --set methods.NAME.KEY=VALUE does the same.",
    )
    add_settings_options(parser, default="protocol_a")
    parser.add_argument(
        "--methods",
        metavar="NAMES",
        default=METHODS,
        help=f"comma-separated (default: {METHODS})",
    )
    parser.add_argument(
        "--log-dir",
        type=Path,
        default=Path("logs/federation"),
        metavar="DIR",
        help="folder of the benchmark (default: logs/federation)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="run again what is finished or was made with other settings",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.telemetry import make_console
    from samv2.configs import config_path
    from samv2.federated.benchmark import PICTURE, REPORT, run_benchmark
    from samv2.federated.benchmark_report import report_table
    from samv2.federated.benchmark_settings import load_benchmark

    names = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    benchmark = load_benchmark(
        config_path(arguments.config), names, arguments.overrides
    )
    progress = make_console(stderr=arguments.json)
    try:
        report = run_benchmark(
            benchmark,
            arguments.log_dir,
            overwrite=arguments.overwrite,
            console=progress,
        )
    except KeyboardInterrupt:
        progress.print("stopped; the same command, without --overwrite, goes on")
        return 130
    if arguments.json:
        print(json.dumps(report, indent=1))
        return 0
    console = make_console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print()
    console.print(report_table(report))
    console.print(
        f"\nEverything is in {arguments.log_dir}/: {REPORT}, {PICTURE}, and a folder a "
        "method.",
        soft_wrap=True,
    )
    return 0
