"""``samv2 doctor``: what this machine has, and which code path each op takes."""

from __future__ import annotations

import argparse
from typing import Any


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "doctor",
        help="what this machine has and which code path each op takes",
        description="Checks the installation: versions, devices, the C++ extension, the "
        "cache, and the code path of every op. Exit status 1 if something is broken.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.telemetry import make_console
    from samv2.federated.checkup import checkup

    console = make_console()
    findings = checkup()
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]--[/yellow]"}
    for finding in findings:
        mark = marks.get(finding.state, "[bold red]broken[/bold red]")
        console.print(f"{mark}  {finding.name}: {finding.detail}")
    return 1 if any(finding.state == "broken" for finding in findings) else 0
