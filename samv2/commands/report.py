"""``samv2 report``: one page about runs, comparisons and grids, for a browser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Writes one HTML file that needs no network: what was trained, what came of it and at what
cost, with charts. Give one run, or several to see them side by side.

RUN is one of
  a run directory             the --log-dir of `samv2 train` or `samv2 demo`
  a folder or its file        federation.json (methods compared), ablation.csv (settings
                              varied), frontier.json (of `samv2 bootstrap`)
"""


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "report",
        help="figures and expert graph of runs as one HTML file",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="what to report on"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="file to write; an older report there is replaced (default: report.html)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace FILE whatever it is"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.telemetry import make_console
    from samv2.report.page import make_report, write_report
    from samv2.report.sources import find_sources

    sources = find_sources(arguments.runs)
    output: Path = arguments.output
    write_report(output, make_report(sources), overwrite=arguments.overwrite)
    make_console().print(
        f"Wrote {output} ({output.stat().st_size / 1e6:.1f} MB). Open it in a browser:\n"
        f"  {output.resolve().as_uri()}",
        markup=False,
        soft_wrap=True,
    )
    return 0
