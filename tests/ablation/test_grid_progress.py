"""What a person sees of a grid while it runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from samv2.ablation.bounds import CHECKS, OK
from samv2.ablation.progress import GridProgress


def row(name: str, **changes: Any) -> dict[str, Any]:
    """Of a run that has finished."""
    figures = {
        "name": name,
        "status": "done",
        "error": "",
        "perplexity": 12.345,
        "perplexity_start": 15.0,
        "bytes_up_per_client_round": 12_000,
        "seconds": 65.0,
    }
    return figures | dict.fromkeys(CHECKS, OK) | changes


def test_lines_say_what_came_of_a_run_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("samv2.ablation.progress.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    with GridProgress(console, {"a": 2, "b": 2, "c": 4}, tmp_path) as progress:
        for name in ("a", "b", "c"):
            progress.begin(name)
            now[0] += 30
            progress.refresh()
            progress.end(name)
            changes: dict[str, dict[str, Any]] = {
                "a": {},
                "b": {"status": "failed", "error": "FrameError: [budget] no"},
                "c": {"check_edits": "too many", "perplexity": None},
            }
            progress.tell(row(name, **changes[name]), "abc".index(name) + 1, 3)
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "[1/3] a: done; perplexity 12.35 (start 15.00), 12.0 kB up, 65 s; "
        "about 2 min left",
        "[2/3] b: failed; FrameError: [budget] no; about 60 s left",
        "[3/3] c: done; perplexity - (start 15.00), 12.0 kB up, 65 s; "
        "check_edits: too many",
    ]


def test_a_terminal_sees_the_rounds_of_the_runs_that_go_on(tmp_path: Path) -> None:
    (tmp_path / "K=8-12345678").mkdir()
    rows = "".join(json.dumps({"round": number}) + "\n" for number in (1, 2, 3))
    (tmp_path / "K=8-12345678" / "metrics.jsonl").write_text(rows)
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with GridProgress(console, {"K=8-12345678": 4, "x": 2}, tmp_path) as progress:
        progress.begin("K=8-12345678")
        progress.refresh()
    shown = console.file.getvalue()
    assert "K=8" in shown and "50%" in shown
