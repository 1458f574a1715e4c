"""What an argument of ``samv2 report`` is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from samv2.common.errors import CheckpointError
from samv2.report.sources import find_sources


def test_every_kind_is_known(
    tiny_run: Path, methods_folder: Path, grid_folder: Path, frontier_folder: Path
) -> None:
    folders = [tiny_run, methods_folder, grid_folder, frontier_folder]
    found = find_sources(folders)
    kinds = ["run", "comparison", "ablation", "frontier"]
    assert [source.kind for source in found] == kinds
    assert found[0].path == tiny_run and found[0].name == "tiny"
    assert found[1].path == methods_folder / "federation.json"
    assert found == find_sources([tiny_run, *(s.path for s in found[1:])])
    assert found == find_sources(folders * 2)


def test_a_folder_can_be_several_things(broken_run: Path, grid_folder: Path) -> None:
    shutil.copy(grid_folder / "ablation.csv", broken_run)
    (broken_run / "frontier.json").write_text("[]")
    found = find_sources([broken_run])
    assert [source.kind for source in found] == ["run", "ablation"]
    (broken_run / "other.csv").write_text("name,perplexity\na,1\n")
    assert find_sources([broken_run / "other.csv"])[0].kind == "ablation"


def test_names_tell_apart(broken_run: Path, tiny_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "broken"
    shutil.copytree(broken_run, other)
    names = [source.name for source in find_sources([broken_run, other])]
    assert names == [f"{tmp_path.name}/broken", "elsewhere/broken"]


def test_what_is_none_is_refused(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            find_sources([path])
        return str(caught.value)

    assert "does not exist" in refusal(tmp_path / "none")
    found = refusal(tmp_path)
    assert "neither config.toml of a run nor federation.json" in found
    assert f"samv2 train --log-dir {tmp_path}" in found
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt is no file that a report can show" in refusal(
        tmp_path / "notes.txt"
    )
    (tmp_path / "config.toml").write_text("[server]\nport = 80\n")
    assert "holds nothing to report on" in refusal(tmp_path)
    (tmp_path / "checkpoints" / "round_0001").mkdir(parents=True)
    assert find_sources([tmp_path])[0].kind == "run"
