"""``samv2 bench-federation``: table, JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w

from samv2.cli import main
from samv2.commands.bench_federation import METHODS
from samv2.common.config import load_settings, to_toml
from samv2.federated.benchmark_settings import DEFAULT_METHODS
from tests.federated.runs import SMALL


@pytest.fixture(scope="module")
def arguments(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path
) -> list[str]:
    """A benchmark of one round on the tiny model, and a table for one method."""
    folder = tmp_path_factory.mktemp("bench-command")
    settings = load_settings(
        None,
        [*SMALL, f"model.path={tiny_llama_folder}", "federation.rounds=1"],
    )
    tables = tomli_w.dumps({"methods": {"ffa-lora": {"adapter.rank": 2}}})
    (folder / "tiny.toml").write_text(to_toml(settings) + tables)
    config, logs = str(folder / "tiny.toml"), str(folder / "logs")
    return ["bench-federation", "--config", config, "--log-dir", logs]


def test_the_table_names_methods_and_files(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--methods", "fedit, central"]) == 0
    shown = capsys.readouterr().out
    for words in ("FedIT", "centralised", "dense model", "federation.json"):
        assert words in shown


def test_json_is_all_that_goes_to_stdout(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--methods", "fedit,ffa-lora", "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["protocol"]["name"] == "tiny"
    assert [entry["method"] for entry in report["methods"]] == ["fedit", "ffa-lora"]
    assert report["methods"][1]["settings"]["adapter.rank"] == 2
    assert "ffa-lora" in output.err


def test_faults_are_listed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "fedsam", "--set", "methods.samv2.seed=1"]
    assert main([*arguments, *options]) == 2
    shown = capsys.readouterr().err
    assert "no method 'fedsam'; known are fedit" in shown
    assert "methods.samv2.seed is set, but all methods share it" in shown


def test_the_default_methods_are_all_there_are() -> None:
    assert tuple(METHODS.split(",")) == DEFAULT_METHODS
