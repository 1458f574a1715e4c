"""Whole runs on the tiny model and real text: files, workers, resuming."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samv2.common.config import load_settings, to_toml
from samv2.common.errors import CheckpointError, ConfigError, DataError
from samv2.common.settings import Settings
from samv2.common.telemetry import read_metrics, read_rows
from samv2.federated.client_state import load_client_state
from samv2.federated.run_folder import check_output, load_model_or_run
from samv2.federated.server_app import run_embedded
from tests.federated.runs import (
    assert_same_bits,
    checkpoint_tensors,
    quiet,
    small_settings,
)

REPOSITORY = Path(__file__).resolve().parents[2]
LEARNING = ("train.learning_rate=3e-3", "train.local_steps=8")


def run(settings: Settings, root: Path, **flags: bool) -> dict[str, Any]:
    """A run in this process."""
    return run_embedded(settings, root, console=quiet(), **flags)


@pytest.fixture(scope="module")
def settings(tiny_llama_folder: Path) -> Settings:
    """From the dense model, learning fast enough to show."""
    return small_settings(tiny_llama_folder, *LEARNING)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Path:
    """The directory of a run of three rounds."""
    root = tmp_path_factory.mktemp("run") / "logs"
    run(settings, root)
    return root


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, expert_folder: Path
) -> tuple[Settings, Path]:
    """An uninterrupted run of four rounds from a bootstrapped folder."""
    root = tmp_path_factory.mktemp("reference")
    chosen = small_settings(expert_folder, "federation.rounds=4", *LEARNING)
    run(chosen, root)
    return chosen, root


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_directory_holds_every_file(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints",
        "clients",
        "clients.jsonl",
        "cluster_stats.txt",
        "config.toml",
        "expert_call_trace.json",
        "log.jsonl",
        "mask_debug.npy",
        "merge_round1.json",
        "merge_round2.json",
        "merge_round3.json",
        "metrics.jsonl",
        "model",
        "pack_sizes.txt",
        "prepared.json",
        "server.lock",
        "shards",
        "summary.json",
        "tensorboard",
        "usage.jsonl",
    }


def test_masks_are_bool_and_upper_triangular(finished: Path) -> None:
    masks = np.load(finished / "mask_debug.npy")
    assert masks.dtype == np.bool_ and masks.shape == (3, 2, 8, 8)
    assert np.array_equal(masks, np.triu(masks))
    assert masks.diagonal(axis1=2, axis2=3).any(axis=2).all()


def test_the_call_trace_visits_parents_first(finished: Path) -> None:
    trace = read(finished / "expert_call_trace.json")
    assert sorted(item["sequence"] for item in trace) == ["pydoc", "python"]
    for item in trace:
        assert [layer["layer"] for layer in item["layers"]] == [0, 1, 2]
        for layer in item["layers"]:
            assert item["tokens"] <= sum(layer["fired"].values()) <= 4 * item["tokens"]
            assert layer["fired"]["0"] == item["tokens"]  # the shared expert
            depths: dict[int, int] = {}
            for visit in layer["walk_of_last_token"]:
                expected = 0 if visit["parent"] is None else 1 + depths[visit["parent"]]
                assert visit["depth"] == expected
                assert visit["expert"] not in depths
                depths[visit["expert"]] = visit["depth"]
            assert 1 <= len(depths) <= 4


def test_cluster_stats_tell_of_every_layer(finished: Path) -> None:
    lines = (finished / "cluster_stats.txt").read_text().splitlines()
    assert sum(line.split()[0] in ("0", "1", "2") for line in lines if line) == 3


def test_pack_sizes_multiply(finished: Path) -> None:
    lines = (finished / "pack_sizes.txt").read_text().splitlines()
    assert lines[0].startswith("#")
    columns = lines[1].split()
    rows = [dict(zip(columns, map(float, line.split()))) for line in lines[2:]]
    assert [(row["round"], row["client"]) for row in rows] == [
        (number, client) for number in (1, 2, 3) for client in (0, 1)
    ]
    for row in rows:
        product = row["x_selection"] * row["x_codec"] * row["x_index"]
        assert product == pytest.approx(row["x_total"], rel=5e-3)
        assert row["x_total"] == pytest.approx(
            row["dense_all_B"] / row["frame_B"], abs=1e-3
        )
        assert row["frame_B"] <= 16384


def test_merges_are_bounded_and_used_by_every_client(
    finished: Path, settings: Settings
) -> None:
    versions = [0]
    for number in (1, 2, 3):
        merge = read(finished / f"merge_round{number}.json")
        assert merge["round"] == number and merge["refused"] == []
        assert len(merge["edits"]) <= settings.edits.rho_max
        for edit in merge["edits"]:
            assert edit["kind"] in ("prune", "promote") and edit["reason"]
            assert 0 <= edit["src"] <= edit["dst"] < 8 and 0 <= edit["layer"] < 3
        assert list(merge["clients"]) == ["0", "1"]
        for client in merge["clients"].values():
            assert client["edge_visits"] >= 3 * client["tokens"] > 0
            assert client["experts_sent"] > 0
        assert set().union(*merge["contributors"].values()) == {0, 1}
        assert min(merge["usage_per_layer"]) > 0
        versions.append(merge["graph_version"])
        assert versions[-1] == versions[-2] + bool(merge["edits"])


def test_usage_counts_what_the_merges_summed(finished: Path) -> None:
    lines = (finished / "usage.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        merge = read(finished / f"merge_round{row['round']}.json")
        assert row["experts"] == 8
        assert {len(layer) for layer in row["usage"] + row["demand"]} == {8 * 9 // 2}
        assert [sum(layer) for layer in row["usage"]] == merge["usage_per_layer"]
        assert [sum(layer) for layer in row["demand"]] == merge["demand_per_layer"]


def test_metrics_have_the_agreed_keys(finished: Path) -> None:
    rows = read_metrics(finished)
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        keys = ("bytes_up", "bytes_down", "clients", "refused", "train_loss")
        assert all(isinstance(row[key], (int, float)) for key in keys)
        assert list(row["perplexity"]) == ["pydoc", "python"]
        assert set(row["seconds"]) == {"train", "merge", "evaluate", "server"}
        assert row["clients"] == 2 and row["refused"] == 0
        assert 0 < row["bytes_up_per_client"] <= row["bytes_up"]
        assert row["bytes_up"] <= 2 * row["bytes_up_per_client"]


def test_the_summary_adds_up_and_perplexity_falls(finished: Path) -> None:
    summary, rows = read(finished / "summary.json"), read_metrics(finished)
    for name, values in summary["domains"].items():
        assert values["final"] == rows[-1]["perplexity"][name]
        # A repaired start is all but the dense model, which saw Python before: that
        # domain has nothing left to gain, the other has.
        assert 1 < values["dense"] < values["start"] * 1.002 < values["dense"] * 1.05
        if name == "python":
            assert values["final"] < values["dense"] * 1.03
        else:
            assert values["final"] < values["start"] * 0.98
    assert summary["rounds"] == 3 and summary["clients"] == 2
    assert summary["edits"] == sum(row["edits"] for row in rows)
    assert summary["refused"] == 0
    assert summary["fedit_bytes_per_client_round"] == 3 * 3 * 8 * (64 + 128) * 4
    up = max(row["bytes_up_per_client"] for row in rows)
    assert summary["bytes_up_per_client_round"] == up
    assert up < summary["fedit_bytes_per_client_round"]
    assert 0 < summary["ffn_flops_fraction"] < 1
    assert summary["experts"] == {
        "num_experts": 8,
        "experts_per_token": 4,
        "layers": "all",
    }
    assert all(0 <= value < 1e4 for value in summary["seconds"].values())


def test_the_config_reloads_equal(finished: Path, settings: Settings) -> None:
    assert load_settings(finished / "config.toml") == settings


def test_tensorboard_shows_every_round(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    rows = read_metrics(finished)
    shown = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert shown == [(row["round"], pytest.approx(row["train_loss"])) for row in rows]
    assert len(events.Scalars("perplexity/python")) == 3


def test_the_log_tells_every_round(finished: Path) -> None:
    lines = [json.loads(x) for x in (finished / "log.jsonl").read_text().splitlines()]
    told = [(line["event"], line["fields"].get("round")) for line in lines]
    first = told.index(("started", 0))
    assert told[first : first + 2] == [("started", 0), ("checkpoint_written", 0)]
    for number in (1, 2, 3):
        events = [event for event, round in told if round == number]
        events = [event for event in events if event != "edits"]
        assert events[:4] == [
            "round_started",
            "replies",
            "round_finished",
            "checkpoint_written",
        ]


def test_every_client_of_every_round_has_a_row(finished: Path) -> None:
    metrics = read_metrics(finished)
    rows = read_rows(finished / "clients.jsonl")
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row, numbers in zip(rows, metrics):
        assert [client["client"] for client in row["clients"]] == [0, 1]
        for name in ("bytes_up", "bytes_down"):
            sizes = [client[name] for client in row["clients"]]
            assert sum(sizes) == numbers[name] and max(sizes) == (
                numbers[f"{name}_per_client"]
            )
        assert all(client["seconds"] > 0 for client in row["clients"])
        assert numbers["refused_by_reason"] == {}
        spent = numbers["seconds"]
        assert 0 < spent["server"] < 60
    assert read(finished / "summary.json")["refusals"] == {}


def test_clients_keep_residual_and_graph(finished: Path) -> None:
    for client in (0, 1):
        folder = finished / "clients" / f"client_{client:04d}"
        state = load_client_state(folder, before_round=4)
        merge = read(finished / "merge_round2.json")
        assert state.residual and state.graph is not None
        assert state.graph.version == merge["graph_version"]


def test_a_run_is_resumed_when_it_has_ended_already(
    finished: Path, settings: Settings
) -> None:
    before, rows = checkpoint_tensors(finished, 3), read_metrics(finished)
    again = run(settings, finished, resume=True)
    assert_same_bits(checkpoint_tensors(finished, 3), before)
    assert read_metrics(finished) == rows
    assert again["domains"] == read(finished / "summary.json")["domains"]


def test_a_used_directory_needs_a_flag_and_the_same_settings(
    finished: Path, settings: Settings, tiny_llama_folder: Path
) -> None:
    with pytest.raises(CheckpointError, match="already holds a run.*--resume"):
        run(settings, finished)
    with pytest.raises(CheckpointError, match="exclude each other"):
        run(settings, finished, resume=True, overwrite=True)
    other = small_settings(tiny_llama_folder, *LEARNING, "federation.codec=int4")
    with pytest.raises(CheckpointError, match="'int8' -> 'int4'"):
        run(other, finished, resume=True)
    assert load_settings(finished / "config.toml") == settings


def test_workers_do_not_change_a_bit(
    reference: tuple[Settings, Path], expert_folder: Path, tmp_path: Path
) -> None:
    _, root = reference
    chosen = small_settings(
        expert_folder, "federation.rounds=4", "federation.workers=2", *LEARNING
    )
    run(chosen, tmp_path)
    assert_same_bits(checkpoint_tensors(tmp_path, 4), checkpoint_tensors(root, 4))
    for left, right in zip(read_metrics(root), read_metrics(tmp_path), strict=True):
        assert left["perplexity"] == right["perplexity"]
        assert left["bytes_up"] == right["bytes_up"]


@pytest.fixture
def command(reference: tuple[Settings, Path], tmp_path: Path) -> Iterator[list[str]]:
    """``samv2 train`` of the reference's settings into ``tmp_path / logs``."""
    config = tmp_path / "run.toml"
    config.write_text(to_toml(reference[0]))
    yield [
        sys.executable,
        "-m",
        "samv2.cli",
        "train",
        "--config",
        str(config),
        "--log-dir",
        str(tmp_path / "logs"),
    ]


def start(command: list[str], *flags: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own, on one thread."""
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*command, *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_when(process: subprocess.Popen[bytes], there: Path, later: float) -> None:
    """SIGKILL some seconds after a file is there."""
    deadline = time.monotonic() + 300  # a busy machine takes its time to start
    while not there.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(later)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    ("file", "later"), [("merge_round1.json", 0.0), ("metrics.jsonl", 0.4)]
)
def test_a_killed_run_ends_in_the_same_bits(
    reference: tuple[Settings, Path],
    command: list[str],
    tmp_path: Path,
    file: str,
    later: float,
) -> None:
    chosen, root = reference
    logs = tmp_path / "logs"
    kill_when(start(command), logs / file, later)
    assert not (logs / "summary.json").exists()
    again = run(chosen, logs, resume=True)
    assert_same_bits(checkpoint_tensors(logs, 4), checkpoint_tensors(root, 4))
    expected = read(root / "summary.json")
    assert again["domains"] == expected["domains"]
    assert again["edits"] == expected["edits"]
    for number in (1, 2, 3, 4):
        name = f"merge_round{number}.json"
        assert read(logs / name) == read(root / name)
    assert [row["round"] for row in read_metrics(logs)] == [1, 2, 3, 4]
    sizes = (logs / "pack_sizes.txt").read_text()
    assert sizes == (root / "pack_sizes.txt").read_text()
    assert (logs / "usage.jsonl").read_text() == (root / "usage.jsonl").read_text()


def test_overwrite_replaces_the_run_and_nothing_foreign(
    reference: tuple[Settings, Path], expert_folder: Path, tmp_path: Path
) -> None:
    _, root = reference
    chosen = small_settings(
        expert_folder, "federation.rounds=1", "federation.codec=int4"
    )
    logs, elsewhere = tmp_path / "logs", tmp_path / "elsewhere"
    run(chosen, logs)
    elsewhere.mkdir()
    (elsewhere / "keep").write_text("mine")
    foreign = ("notes.txt", ".gitkeep", "merge_round_plan.md", "merge_round1.json.bak")
    for name in foreign:
        (logs / name).write_text("mine")
    (logs / "plots").mkdir()
    (logs / "plots" / "model.png").write_text("mine")
    (logs / "flower").symlink_to(elsewhere)
    (logs / "merge_round9.json").write_text("{}")
    run(chosen, logs, overwrite=True)
    assert all((logs / name).read_text() == "mine" for name in foreign)
    assert (logs / "plots" / "model.png").read_text() == "mine"
    assert (elsewhere / "keep").read_text() == "mine"
    assert not (logs / "flower").exists()
    assert not (logs / "merge_round9.json").exists()
    assert read(logs / "summary.json")["rounds"] == 1


def test_a_foreign_config_is_never_replaced(
    expert_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("[other]\nproject = true\n")
    (tmp_path / "model").mkdir()
    chosen = small_settings(expert_folder)
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(CheckpointError, match="not the config of a run"):
            run(chosen, tmp_path, **flags)
    assert (tmp_path / "config.toml").read_text().startswith("[other]")
    assert (tmp_path / "model").is_dir()


def test_a_start_that_failed_does_not_take_the_directory(
    expert_folder: Path, tmp_path: Path
) -> None:
    wrong = small_settings(expert_folder, "data.domains=nosuch")
    with pytest.raises(DataError, match="no domain 'nosuch'"):
        run(wrong, tmp_path)
    right = small_settings(expert_folder, "federation.rounds=1")
    assert run(right, tmp_path)["rounds"] == 1


def test_a_resume_needs_a_run(expert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume.*--log-dir"):
        run(small_settings(expert_folder), tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_run_without_heldout_windows_is_refused_at_once(
    expert_folder: Path, tmp_path: Path
) -> None:
    long = small_settings(
        expert_folder, "data.heldout_bytes=1024", "train.sequence_length=4000"
    )
    with pytest.raises(DataError, match="data.heldout_bytes"):
        run(long, tmp_path)


def test_a_bootstrapped_folder_must_fit_the_settings(
    expert_folder: Path, tmp_path: Path
) -> None:
    other = small_settings(expert_folder, "adapter.rank=2", "experts.num_shared=2")
    with pytest.raises(ConfigError) as caught:
        run(other, tmp_path)
    assert len(caught.value.faults) == 2
    assert "adapter.rank is 2" in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(
    reference: tuple[Settings, Path], tmp_path: Path
) -> None:
    chosen, _ = reference
    one_round = small_settings(chosen.model.path, "federation.rounds=1")
    run(one_round, tmp_path)
    path = tmp_path / "checkpoints" / "round_0001" / "state.json"
    facts = read(path)
    path.write_text(json.dumps(facts | {"model_fingerprint": "0" * 16}))
    with pytest.raises(CheckpointError, match="belongs to model 0000"):
        run(one_round, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="belongs to model 0000"):
        load_model_or_run(tmp_path)


def test_one_process_serves_two_models_in_turn(
    tiny_expert_model: Any, tiny_tokenizer: Any, expert_folder: Path, tmp_path: Path
) -> None:
    from samv2.models.save import load_expert_model, save_expert_model

    folder, logs = tmp_path / "model-here", tmp_path / "logs"
    chosen = small_settings(folder, "federation.rounds=1")
    starts = []
    for change in (0.0, 0.5):
        model, tokenizer = load_expert_model(expert_folder)
        for layer in model.expert_layers:
            layer.up_EFD.data += change
        save_expert_model(model, tokenizer, folder)
        summary = run(chosen, logs, overwrite=True)
        starts.append(summary["domains"]["python"]["start"])
    assert math.isfinite(starts[0]) and starts[0] != starts[1]


def test_outputs_replace_only_models_of_their_kind(
    expert_folder: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    check_output(tmp_path / "new", overwrite=False, expert=True)
    check_output(expert_folder, overwrite=True, expert=True)
    check_output(tiny_llama_folder, overwrite=True, expert=False)
    for folder, expert in ((expert_folder, False), (tiny_llama_folder, True)):
        with pytest.raises(CheckpointError, match="other things than"):
            check_output(folder, overwrite=True, expert=expert)
        with pytest.raises(CheckpointError, match="exists"):
            check_output(folder, overwrite=False, expert=expert)
    check_output(tmp_path, overwrite=True, expert=True)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="other things than"):
        check_output(tmp_path, overwrite=True, expert=False)
