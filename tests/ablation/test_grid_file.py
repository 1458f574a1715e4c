"""Grids that are written down, and those that ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from samv2.ablation.factors import read_factors
from samv2.ablation.grid_file import PRESETS, preset_path, read_grid, to_grid_toml
from samv2.ablation.plan import plan_runs
from samv2.common.errors import ConfigError


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_builds_on_another_and_the_command_line_on_it(tmp_path: Path) -> None:
    below = write(tmp_path / "below.toml", "seed = 3\n[adapter]\nrank = 2\nscale = 1.0")
    above = write(
        tmp_path / "above.toml",
        f'base = "{below}"\none_at_a_time = true\n[adapter]\nrank = 4\n'
        '[vary]\nK = [8, 12]\n"edits.rho_max" = [0]\n[vary.train]\nlocal_steps = [1]\n',
    )
    grid = read_grid(
        config=above, overrides=["seed=5"], vary={"K": ["4"], "codec": ["int4"]}
    )
    assert grid.values == {"seed": "5", "adapter.rank": 4, "adapter.scale": 1.0}
    assert grid.one_at_a_time
    assert grid.vary == {
        "K": ["4"],
        "edits.rho_max": [0],
        "train.local_steps": [1],
        "codec": ["int4"],
    }
    again = read_grid(config=write(tmp_path / "again.toml", to_grid_toml(grid)))
    assert again == grid


def test_a_config_takes_the_place_of_the_presets_base(tmp_path: Path) -> None:
    own = write(tmp_path / "own.toml", "[federation]\nclients = 3\n")
    grid = read_grid(preset="graph", config=own)
    assert grid.values == {"federation.clients": 3, "federation.rounds": 6}
    assert set(grid.vary) == {"rho_max", "assembler", "chains"}
    demo = read_grid(preset="graph")
    assert demo.values["experts.layers"] == "10-" and "base" not in demo.values


def test_shipped_grids_can_run(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = [f"model.path={tiny_llama_folder}", "experts.layers=all"]
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    assert names == ["budget", "components", "graph"]
    for name in names:
        grid = read_grid(preset=name, overrides=wide)
        factors = read_factors(grid.vary, grid.values)
        runs = plan_runs(grid.values, factors, one_at_a_time=grid.one_at_a_time)
        assert len(runs) == {"budget": 12, "components": 8, "graph": 12}[name]


def test_what_is_no_grid(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="no preset 'parts'.*budget, components, graph"
    ):
        preset_path("parts")
    wrong = write(tmp_path / "wrong.toml", 'base = 3\none_at_a_time = "yes"\n')
    with pytest.raises(ConfigError) as caught:
        read_grid(config=wrong)
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match="no '='"):
        read_grid(overrides=["seed"])
