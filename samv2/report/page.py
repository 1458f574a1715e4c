"""The page: templates, style and script put together into one file of HTML.

Everything that comes from files is text of strangers (a refusal quotes what a client
said), so Jinja escapes it, and the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from samv2.common.errors import CheckpointError
from samv2.common.files import write_bytes
from samv2.report import words
from samv2.report.other_data import csv_number
from samv2.report.reading import Missing
from samv2.report.sources import Source
from samv2.report.views import ReportView, view_report

GENERATOR = '<meta name="generator" content="samv2 report">'
"""By which a report is known."""
MOST_ROWS = 500
"""Edits and refusals that are listed; a long run has thousands."""
TEMPLATES = files("samv2.report") / "templates"
CODE = re.compile(r"`([^`]*)`")


def make_report(sources: Sequence[Source]) -> str:
    """The report on some sources, as HTML.

    Args:
        sources: what :func:`samv2.report.sources.find_sources` found; at least one.
    """
    return render(view_report(sources))


def render(view: ReportView) -> str:
    """The page of a view."""
    environment = Environment(
        loader=FunctionLoader(read_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    environment.filters |= {
        "perplexity": words.perplexity,
        "size": words.size,
        "share": words.share,
        "change": words.change,
        "duration": words.duration,
        "code": code,
        "csv_number": csv_number,
        "heading": heading,
    }
    script = read_template("page.js")
    return environment.get_template("page.html").render(
        view=view,
        generator=Markup(GENERATOR),
        most_rows=MOST_ROWS,
        title=title_of(view),
        style=Markup(read_template("page.css")),
        script=Markup(script),
        policy=policy(script),
    )


def read_template(name: str) -> str:
    """A file of the ``templates`` folder."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def policy(script: str) -> str:
    """A content security policy: this one script, nothing from elsewhere."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def code(sentence: str) -> Markup:
    """Escaped text whose parts between backticks are code."""
    return Markup(CODE.sub(r"<code>\1</code>", str(escape(sentence))))


def heading(column: str) -> str:
    """A column's name for a table's head."""
    return column.replace("_", " ")


def title_of(view: ReportView) -> str:
    """The page's title: what it is about."""
    parts = (view.runs, view.comparisons, view.ablations, view.frontiers)
    names = list(dict.fromkeys(item.name for part in parts for item in part))
    if len(names) > 3:
        names = [*names[:2], f"{len(names) - 2} more"]
    return f"SAM-v2 report: {words.listed(names)}"


def write_report(path: Path, page: str, *, overwrite: bool = False) -> None:
    """Write a page; an older report is replaced.

    Args:
        path: the file.
        page: of :func:`make_report`.
        overwrite: replace whatever the file is.

    Raises:
        CheckpointError: the file is there and is something else.
    """
    if path.is_dir():
        raise CheckpointError(f"--output {path} is a folder; name a file in it")
    if path.exists() and not overwrite and not _is_report(path):
        raise CheckpointError(
            f"--output {path} exists and is no report; choose another name, or give "
            "--overwrite"
        )
    write_bytes(path, page.encode())


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(1000)
