"""``samv2 report``: one file, and clear words where there is nothing to report on."""

from __future__ import annotations

from pathlib import Path

import pytest

from samv2.cli import main


def test_a_report_on_a_run_and_a_bootstrapped_folder(
    run_folder: Path,
    tiny_bootstrapped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["report", str(run_folder), str(tiny_bootstrapped)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Wrote report.html (")
    assert (tmp_path / "report.html").as_uri() in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "Two clients trained" in page
    # The run was started from the folder, so both sections show its frontier.
    assert page.count("<strong>Quality against arithmetic</strong>") == 2
    assert main(["report", str(run_folder), "--output", "report.html"]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") != page


def test_the_same_run_gives_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    pages = [tmp_path / name for name in ("one.html", "two.html")]
    for page in pages:
        assert main(["report", str(run_folder), "--output", str(page)]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_what_cannot_be_reported_is_told(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["report", *arguments]) == 2
        return capsys.readouterr().err

    assert f"{tmp_path} holds nothing to report on" in refused(str(tmp_path))
    assert "does not exist" in refused(str(tmp_path / "none"))
    mine = tmp_path / "thesis.html"
    mine.write_text("mine")
    said = refused(str(run_folder), "--output", str(mine))
    assert "thesis.html exists and is no report" in said and "--overwrite" in said
    assert mine.read_text() == "mine"
    arguments = [str(run_folder), "--output", str(mine), "--overwrite"]
    assert main(["report", *arguments]) == 0
    assert mine.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(SystemExit):
        main(["report"])
