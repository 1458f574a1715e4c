"""The federation benchmark on the tiny model: one text, a folder a method, a report."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from matplotlib.image import imread
from rich.console import Console

from samv2.common.config import load_settings, to_flat
from samv2.common.errors import CheckpointError, ConfigError, DataError
from samv2.configs import config_path
from samv2.data.shard_files import load_federated_text
from samv2.federated import benchmark as module
from samv2.federated.benchmark import (
    PICTURE,
    REPORT,
    check_same_text,
    is_finished,
    run_benchmark,
)
from samv2.federated.benchmark_plot import draw_federation
from samv2.federated.benchmark_report import (
    geometric_mean,
    method_entry,
    report_table,
    title_of,
)
from samv2.federated.benchmark_settings import (
    DEFAULT_METHODS,
    Benchmark,
    load_benchmark,
)
from samv2.federated.run_folder import stored_settings
from tests.federated.runs import SMALL, quiet

METHODS = ("fedit", "local", "samv2")
TABLES = {"samv2": {"adapter.rank": 2, "train": {"learning_rate": 3e-3}}}
SHORT = ("federation.rounds=2", "train.local_steps=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A protocol with a table for samv2."""
    path = tmp_path_factory.mktemp("protocol") / "small.toml"
    values: dict[str, Any] = {"methods": TABLES}
    for item in [*SMALL, *SHORT, f"model.path={tiny_llama_folder}"]:
        key, _, text = item.partition("=")
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = text
    path.write_text(tomli_w.dumps(values))
    return path


@pytest.fixture(scope="module")
def protocol(config: Path) -> Benchmark:
    """Three methods of it."""
    return load_benchmark(config, METHODS)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, protocol: Benchmark
) -> tuple[Path, dict[str, Any]]:
    """A finished benchmark: its folder and its report."""
    root = tmp_path_factory.mktemp("benchmark")
    return root, run_benchmark(protocol, root, console=quiet())


def test_every_method_has_a_folder(finished: tuple[Path, dict[str, Any]]) -> None:
    root, _ = finished
    assert {path.name for path in root.iterdir()} == {
        "text",
        *METHODS,
        REPORT,
        PICTURE,
    }
    assert all(is_finished(root / name) for name in METHODS)


def test_the_report_has_the_agreed_keys(
    finished: tuple[Path, dict[str, Any]], protocol: Benchmark
) -> None:
    root, report = finished
    assert json.loads((root / REPORT).read_text()) == report
    shared = report["protocol"]
    assert shared["name"] == "small" and shared["settings"]["train.local_steps"] == 2
    assert set(shared["corpus_sha256"]) == {"python", "pydoc"}
    assert set(shared["dense"]["domains"]) == {"python", "pydoc"}
    assert [entry["method"] for entry in report["methods"]] == list(METHODS)
    for entry in report["methods"]:
        assert set(entry) == {
            "method",
            "title",
            "perplexity",
            "domains",
            "bytes_up_per_client_round",
            "bytes_up_total",
            "seconds",
            "seconds_by_phase",
            "settings",
            "rounds",
        }
        assert [item["round"] for item in entry["rounds"]] == [1, 2]
        last = entry["rounds"][-1]
        assert entry["perplexity"] == last["perplexity"] < 100
        product = math.prod(entry["domains"].values())
        assert entry["perplexity"] == pytest.approx(product**0.5)
        assert entry["bytes_up_total"] == last["bytes_up_total"]
        assert entry["seconds"] == last["seconds"] > entry["rounds"][0]["seconds"]
        own = to_flat(protocol.methods[entry["method"]])
        assert own == {**shared["settings"], **entry["settings"]}
    sam = report["methods"][2]["settings"]
    assert sam["adapter.rank"] == 2 and sam["train.learning_rate"] == 3e-3


def test_bytes_add_up(finished: tuple[Path, dict[str, Any]]) -> None:
    by_name = {entry["method"]: entry for entry in finished[1]["methods"]}
    assert by_name["local"]["bytes_up_total"] == 0
    fedit = by_name["fedit"]
    assert fedit["bytes_up_total"] == 4 * fedit["bytes_up_per_client_round"]
    sam = by_name["samv2"]
    assert 0 < sam["bytes_up_per_client_round"] <= 16384
    assert sam["bytes_up_total"] <= 4 * sam["bytes_up_per_client_round"]


def test_all_methods_hold_the_same_tokens(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    root, _ = finished
    check_same_text(root / "samv2/shards", root / "text/shards")
    ours = load_federated_text(root / "samv2/shards")
    theirs = load_federated_text(root / "text/shards")
    for left, right in zip(ours.clients, theirs.clients, strict=True):
        assert left.train.equal(right.train)
        assert left.heldout.keys() == right.heldout.keys()
    checksums = finished[1]["protocol"]["corpus_sha256"]
    for name in ("fedit", "local"):
        assert not (root / name / "shards").exists()
        summary = json.loads((root / name / "summary.json").read_text())
        assert summary["corpus_sha256"] == checksums


def test_other_tokens_are_refused(
    finished: tuple[Path, dict[str, Any]], config: Path, tmp_path: Path
) -> None:
    root, _ = finished
    other = load_benchmark(config, ["fedit"], ["seed=1"])
    run_benchmark(other, tmp_path, console=quiet())
    with pytest.raises(DataError, match="is not the benchmark's"):
        check_same_text(root / "samv2/shards", tmp_path / "text/shards")


def test_a_finished_method_is_not_run_again(
    finished: tuple[Path, dict[str, Any]],
    protocol: Benchmark,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a method was run")

    monkeypatch.setattr(module, "_run_method", refuse)
    monkeypatch.setattr(module, "load_llama", refuse)
    root, report = finished
    assert run_benchmark(protocol, root, console=quiet()) == report


def test_a_stopped_method_goes_on_alone(
    protocol: Benchmark,
    config: Path,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped while SAM-v2 runs, the next call ends it and repeats nothing else."""
    plain, ran = module._run_method, []

    def stop_at_sam(name: str, *rest: Any) -> None:
        if name == "samv2":
            raise KeyboardInterrupt
        ran.append(name)
        plain(name, *rest)

    monkeypatch.setattr(module, "_run_method", stop_at_sam)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(protocol, tmp_path, console=quiet())
    assert ran == ["fedit", "local"]
    report = json.loads((tmp_path / REPORT).read_text())
    assert [entry["method"] for entry in report["methods"]] == ["fedit", "local"]
    monkeypatch.undo()
    report = run_benchmark(protocol, tmp_path, console=quiet())
    for ours, theirs in zip(report["methods"], finished[1]["methods"], strict=True):
        assert ours["domains"] == theirs["domains"]


def test_changed_settings_are_named_all_at_once(
    finished: tuple[Path, dict[str, Any]], config: Path
) -> None:
    root, _ = finished
    other = load_benchmark(
        config, METHODS, ["train.learning_rate=1e-3", "federation.workers=2"]
    )
    with pytest.raises(CheckpointError) as caught:
        run_benchmark(other, root, console=quiet())
    shown = str(caught.value)
    assert "fedit (train.learning_rate: 0.002 -> 0.001)" in shown
    assert "local (train" in shown and "--overwrite" in shown
    assert "samv2" not in shown.replace(str(root), "")  # its table has its own rate
    assert "workers" not in shown and "text (" not in shown
    shorter = load_benchmark(config, METHODS, ["federation.rounds=1"])
    with pytest.raises(CheckpointError, match="text .federation.rounds: 2 -> 1"):
        run_benchmark(shorter, root, console=quiet())


def test_overwrite_runs_with_the_new_settings(config: Path, tmp_path: Path) -> None:
    one = load_benchmark(config, ["fedit"], ["federation.rounds=1"])
    two = load_benchmark(config, ["fedit"], ["methods.fedit.adapter.rank=2"])
    run_benchmark(one, tmp_path, console=quiet())
    report = run_benchmark(two, tmp_path, overwrite=True, console=quiet())
    assert len(report["methods"][0]["rounds"]) == 2
    assert stored_settings(tmp_path / "fedit").adapter.rank == 2


def test_a_domain_that_is_left_out_stops_the_benchmark(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = load_benchmark(config, ["fedit"], ["data.domains=python,pydoc,wiki"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="domains wiki could not be loaded"):
        run_benchmark(chosen, tmp_path, console=quiet())


def test_every_fault_of_a_file_is_listed(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(
        "[train]\nlocal_steps = 0\n[methods.fedavg]\n'adapter.rank' = 4\n"
        "[methods.samv2]\n'adapter.rang' = 4\n'data.split' = 'shards'\n"
        "'train.batch_size' = 2\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_benchmark(path, ["fedit", "fedit", "lora"], ["nonsense"])
    faults = "\n".join(caught.value.faults)
    for words in (
        "train.local_steps is 0",
        "a table for method 'fedavg'",
        "no method 'lora'; known are fedit, ffa-lora, local, central, samv2,",
        "names a method twice",
        "'nonsense' has no '='",
        "methods.samv2.data.split is set, but all methods share it",
        "methods.samv2.train.batch_size is set",
    ):
        assert words in faults
    with pytest.raises(
        ConfigError, match="methods.samv2: .*adapter.rang.*did you mean"
    ):
        load_benchmark(config, ["fedit"], ["methods.samv2.adapter.rang=4"])
    with pytest.raises(ConfigError, match="names none"):
        load_benchmark(config, [])


def test_tables_of_methods_are_for_the_benchmark(config: Path) -> None:
    with pytest.raises(ConfigError, match="for `samv2 bench-federation`") as caught:
        load_settings(config)
    assert len(caught.value.faults) == 1


def test_an_expert_graph_is_no_start_for_all(config: Path, expert_folder: Path) -> None:
    with pytest.raises(ConfigError, match="name the dense model"):
        load_benchmark(config, ["fedit"], [f"model.path={expert_folder}"])


def test_a_file_may_name_more_sam_methods(config: Path) -> None:
    made = load_benchmark(config, ["samv2-wide"], ["methods.samv2-wide.adapter.rank=9"])
    assert made.methods["samv2-wide"].adapter.rank == 9
    assert title_of("samv2-wide") == "SAM-v2-wide"


@pytest.mark.parametrize("name", ["protocol_a", "protocol_b2"])
def test_the_shipped_protocols_are_sound(name: str) -> None:
    made = load_benchmark(config_path(name), DEFAULT_METHODS)
    assert made.base.federation.clients == len(made.base.data.domains)
    lora = made.methods["fedit"].adapter
    assert (lora.rank, lora.rank * lora.scale) == (8, 16.0)
    sparse, plain = made.methods["samv2-sparse"], made.methods["samv2"]
    assert plain.experts.experts_per_token == plain.experts.num_experts
    assert sparse.experts.experts_per_token < sparse.experts.num_experts / 2
    for method in (sparse, plain):
        assert method.adapter.siblings >= made.base.federation.clients


def test_the_table_has_a_row_a_method(finished: tuple[Path, dict[str, Any]]) -> None:
    text = io.StringIO()
    Console(file=text, width=140).print(report_table(finished[1]))
    shown = text.getvalue()
    for words in ("dense model", "FedIT", "local only", "SAM-v2", "geo-mean", "up kB"):
        assert words in shown
    assert f"{finished[1]['methods'][0]['perplexity']:.2f}" in shown


def test_the_picture_has_two_panels(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, report = finished
    pixels = imread(root / PICTURE)
    assert pixels.shape[1] > 2 * pixels.shape[0] and pixels.std() > 0
    draw_federation(tmp_path / "none.png", {**report, "methods": []})
    silent = [entry for entry in report["methods"] if entry["method"] == "local"]
    draw_federation(tmp_path / "silent.png", {**report, "methods": silent})
    assert (tmp_path / "none.png").is_file() and (tmp_path / "silent.png").is_file()


def test_a_perplexity_that_is_not_known_makes_no_mean(protocol: Benchmark) -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([2.0, None]) is None and geometric_mean([]) is None
    row = {
        "round": 1,
        "perplexity": {"python": None},
        "bytes_up": 0,
        "bytes_up_per_client": 0,
        "seconds": {"train": 1.0, "merge": 0.0, "evaluate": 1.0},
    }
    summary = {"seconds": {"prepare": 2.0, "train": 1.0}}
    entry = method_entry("fedit", protocol.methods["fedit"], protocol, [row], summary)
    assert entry["perplexity"] is None
    assert entry["seconds_by_phase"] == {
        "prepare": 2.0,
        "train": 1.0,
        "merge": 0.0,
        "evaluate": 1.0,
    }
