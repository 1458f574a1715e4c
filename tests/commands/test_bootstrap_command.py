"""``samv2 bootstrap``: what it prints, what it writes, how it chooses K and goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from samv2.cli import main
from samv2.federated.frontier import partial_folder
from samv2.models import streamed_bootstrap
from samv2.models.expert_model import ExpertModel
from tests.federated.runs import SMALL

ROOT = Path(__file__).parents[2]
COARSE = ("--set=experts.repair_rank=0", "--set=experts.allocate=false")
"""Settings that cost the tiny model quality at each K below E."""
FILES = ("frontier.json", "layers.json", "cluster_stats.txt", "frontier.png")


@pytest.fixture
def bootstrap(
    tiny_llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Bootstraps the tiny model into ``tmp_path / "out"``; returns what was printed."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*options: str, status: int = 0) -> str:
        capsys.readouterr()
        sets = [f"--set={item}" for item in SMALL]
        output = ["--output", str(tmp_path / "out")]
        assert main(
            ["bootstrap", str(tiny_llama_folder), *output, *sets, *options]
        ) == (status)
        return capsys.readouterr().out

    return call


def frontier_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "frontier.json").read_text())


def kept(folder: Path) -> int:
    return ExpertModel.from_pretrained(folder).expert_config.experts_per_token


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_it_saves_its_frontier(tiny_bootstrapped: Path) -> None:
    frontier = frontier_of(tiny_bootstrapped)
    assert [point["experts_per_token"] for point in frontier] == [4, 8]
    fractions = [point["ffn_flops_fraction"] for point in frontier]
    assert fractions == sorted(fractions)
    model = ExpertModel.from_pretrained(tiny_bootstrapped)
    for point in frontier:
        k = point["experts_per_token"]
        assert point["ffn_flops_fraction"] == pytest.approx(model.flops_fraction(k))
        assert list(point["perplexity"]) == list(point["dense_perplexity"])
        assert set(point["perplexity"]) == {"python", "pydoc"}
        assert point["unseen_ratio"] is None
        visits = [layer.visits_at(k) for layer in model.expert_layers]
        assert point["visits"] == visits
    ratios = [
        x / y
        for x, y in zip(
            *(frontier[0][f"{p}perplexity"].values() for p in ("", "dense_"))
        )
    ]
    assert frontier[0]["ratio"] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
    last = frontier[-1]
    assert last["ratio"] == pytest.approx(1, rel=1e-4)
    for name, value in last["perplexity"].items():
        assert value == pytest.approx(last["dense_perplexity"][name], rel=1e-4)
        assert all(p["perplexity"][name] > 0.99 * value for p in frontier)


def test_it_writes_layers_statistics_and_a_picture(tiny_bootstrapped: Path) -> None:
    layers = json.loads((tiny_bootstrapped / "layers.json").read_text())
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    assert all(set(layer["visits"]) == set(layer["error"]) == {"4"} for layer in layers)
    assert all(0 < layer["error"]["4"] < 1 for layer in layers)
    assert (tiny_bootstrapped / "cluster_stats.txt").read_text().count("\n") >= 3
    pixels = imread(tiny_bootstrapped / "frontier.png")
    assert pixels.shape[:2] == (630, 960)
    colours = {tuple(c) for c in (pixels[:, :, :3] * 255).astype(int).reshape(-1, 3)}
    assert (255, 255, 255) in colours and (0x1F, 0x5F, 0xA8) in colours
    assert not partial_folder(tiny_bootstrapped).exists()


def test_eval_measures_the_frontier(
    tiny_bootstrapped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--set={item}" for item in SMALL]
    for point in frontier_of(tiny_bootstrapped):
        k = point["experts_per_token"]
        capsys.readouterr()
        arguments = [str(tiny_bootstrapped), "--experts", str(k), "--json", *options]
        assert main(["eval", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)["models"]["expert graph"]
        assert found == pytest.approx(point["perplexity"], rel=1e-4)


def test_it_replaces_its_own_folder_only_when_told(
    tiny_bootstrapped: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    for output, extra in ((tiny_bootstrapped, []), (tmp_path, ["--overwrite"])):
        (tmp_path / "thesis.txt").write_text("mine")
        arguments = ["bootstrap", str(tiny_llama_folder), "--output", str(output)]
        assert main([*arguments, *extra]) == 2
    assert (tmp_path / "thesis.txt").exists()


def test_the_table_has_every_k_and_domains_that_were_not_calibrated_on(
    bootstrap: Callable[..., str], tmp_path: Path
) -> None:
    own = tmp_path / "own.txt"
    shutil.copy(Path(os.__file__).parent / "argparse.py", own)
    shown = bootstrap(
        "--set=experts.other_k=2,6",
        "--set=data.train_bytes=16384",
        "--also-score=math",
        f"--also-score=own={own}",
        "--per-layer",
    )
    frontier = frontier_of(tmp_path / "out")
    assert [point["experts_per_token"] for point in frontier] == [2, 4, 6, 8]
    lines = shown.splitlines()
    assert (
        max(map(len, lines[: lines.index(next(x for x in lines if "Next" in x))]))
        <= 100
    )
    heads = next(line for line in lines if "dense" in line)
    assert heads.replace("┃", " ").split() == ("dense K = 2 K = 4* K = 6 K = 8".split())
    rows = {
        cells[0]: cells[1:]
        for line in lines
        if (cells := [cell.strip() for cell in line.split("│")[1:-1]])
    }
    order = [
        name
        for name in rows
        if name in ("python", "pydoc", "math", "own", "not in the")
    ]
    assert order == ["python", "pydoc", "not in the", "math", "own"]
    for name in ("python", "pydoc", "math", "own"):
        values = [frontier[0]["dense_perplexity"][name]]
        values += [point["perplexity"][name] for point in frontier]
        assert rows[name] == [f"{value:.2f}" for value in values]
    shares = [f"{100 * point['ffn_flops_fraction']:.0f} %" for point in frontier]
    assert rows["FFN FLOPs"] == ["100 %", *shares]
    ratios = [f"{point['unseen_ratio']:.3f}" for point in frontier]
    assert rows["mean ratio to dense"] == [
        "1.000",
        *ratios,
    ]  # the later of the two rows
    assert len(rows["2"]) == 3 and "Visits and relative stream error" in shown
    assert "peak memory" in shown.lower() and "converting layers" in shown
    assert f"samv2 train --set model.path={tmp_path / 'out'}" in shown
    assert f"samv2 eval {tmp_path / 'out'}" in shown
    assert all((tmp_path / "out" / name).is_file() for name in FILES)


def test_flops_choose_k(bootstrap: Callable[..., str], tmp_path: Path) -> None:
    shown = bootstrap("--flops=0.9", "--set=experts.repair_rank=4")
    last, whole = frontier_of(tmp_path / "out")
    assert last["experts_per_token"] == kept(tmp_path / "out") == 6
    assert last["ffn_flops_fraction"] <= 0.9 < whole["ffn_flops_fraction"]
    assert "K = 6*" in shown and "Saved" in shown


def test_a_target_keeps_the_least_k_that_reaches_it(
    bootstrap: Callable[..., str], tmp_path: Path
) -> None:
    shown = in_one_line(bootstrap("--target-ppl-ratio=1000", *COARSE))
    points = frontier_of(tmp_path / "out")
    assert [point["experts_per_token"] for point in points] == [1, 2, 4, 6, 8]
    assert kept(tmp_path / "out") == 1
    assert "K = 1 is the least of these K whose mean ratio is at most 1000" in shown
    ratios = [point["ratio"] for point in points]
    middle = (ratios[1] + ratios[2]) / 2
    assert ratios == sorted(ratios, reverse=True) and middle > 1
    bootstrap(f"--target-ppl-ratio={middle}", "--overwrite", *COARSE)
    assert kept(tmp_path / "out") == 4
    assert [p["ratio"] for p in frontier_of(tmp_path / "out")] == ratios


def test_a_target_that_no_k_reaches_keeps_all_experts(
    bootstrap: Callable[..., str], tmp_path: Path
) -> None:
    shown = in_one_line(bootstrap("--target-ppl-ratio=1.00001", *COARSE))
    best = frontier_of(tmp_path / "out")[3]
    assert kept(tmp_path / "out") == 8
    assert "No K below 8 has a mean ratio of at most 1.00001" in shown
    assert f"the best is K = 6 with {best['ratio']:.3f}" in shown
    assert "saves no arithmetic" in shown


@pytest.fixture
def stops_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets the next bootstraps store every layer, and stop before a file is written."""
    write = streamed_bootstrap._Work.write_tensors
    monkeypatch.setattr(streamed_bootstrap, "STORE_SECONDS", -1.0)

    def stop(at: str) -> None:
        def stopping(self: Any, name: str, tensors: Any) -> None:
            if name == at:
                raise KeyboardInterrupt
            write(self, name, tensors)

        monkeypatch.setattr(streamed_bootstrap._Work, "write_tensors", stopping)

    return stop


def test_a_stopped_bootstrap_goes_on(
    bootstrap: Callable[..., str],
    stops_at: Callable[[str], None],
    tmp_path: Path,
) -> None:
    stops_at("layer-00002.safetensors")
    assert "The same command" in in_one_line(bootstrap(status=130))
    assert not (tmp_path / "out").exists()
    stops_at("none")
    shown = bootstrap()
    assert "going on at layer 2" in shown and "Surveying" not in shown
    found = frontier_of(tmp_path / "out")
    bootstrap("--overwrite")
    assert found == frontier_of(tmp_path / "out")
    assert not partial_folder(tmp_path / "out").exists()


def test_a_stopped_bootstrap_goes_on_behind_its_survey(
    bootstrap: Callable[..., str], stops_at: Callable[[str], None]
) -> None:
    stops_at("layer-00000.safetensors")
    bootstrap(status=130)
    stops_at("none")
    shown = bootstrap()
    assert "going on behind its survey" in shown and "Surveying" not in shown


def test_unfinished_work_that_does_not_fit_is_dropped_and_said(
    bootstrap: Callable[..., str], stops_at: Callable[[str], None], tmp_path: Path
) -> None:
    stops_at("layer-00002.safetensors")
    bootstrap(status=130)
    stops_at("none")
    shown = in_one_line(bootstrap("--set=experts.experts_per_token=6"))
    assert "Unfinished work of another model, settings or text was dropped" in shown
    assert kept(tmp_path / "out") == 6


def test_overwrite_begins_anew(
    bootstrap: Callable[..., str], stops_at: Callable[[str], None], tmp_path: Path
) -> None:
    stops_at("layer-00002.safetensors")
    bootstrap(status=130)
    stops_at("none")
    shown = bootstrap("--overwrite")
    assert "Unfinished" not in shown and "Surveying" in shown
    stops_at("layer-00002.safetensors")
    before = frontier_of(tmp_path / "out")
    assert "is what it was before" in in_one_line(bootstrap("--overwrite", status=130))
    assert frontier_of(tmp_path / "out") == before


def test_what_is_not_used_is_said(bootstrap: Callable[..., str]) -> None:
    shown = bootstrap("--set=experts.repair=false", "--set=experts.other_k=2")
    assert "experts.other_k is not used" in shown


def test_training_at_a_k_without_a_repair_is_warned_of(
    tiny_bootstrapped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(name: str, *overrides: str) -> str:
        capsys.readouterr()
        sets = [*SMALL, f"model.path={tiny_bootstrapped}", "federation.rounds=1"]
        arguments = [f"--set={item}" for item in (*sets, *overrides)]
        assert main(["train", "--log-dir", str(tmp_path / name), *arguments]) == 0
        return in_one_line(capsys.readouterr().out)

    free = ["repair=false", "repair_rank=9", "other_k=2", "allocate=false"]
    shown = train("at-4", *(f"experts.{item}" for item in free))
    assert "no repair" not in shown
    shown = train("at-5", "experts.experts_per_token=5")
    assert "experts.experts_per_token is 5, but" in shown
    assert "no repair for it" in shown and "experts.other_k=5" in shown


def test_the_script_passes_settings_and_options_on(tmp_path: Path) -> None:
    fake = tmp_path / "samv2"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    script = ROOT / "scripts" / "bootstrap_experts.sh"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, env=path, capture_output=True, text=True)

    options = ["--also-score", "own=x.txt", "--flops", "0.5"]
    done = call("model", "out dir", "experts.num_experts=16", "seed=1", *options)
    sets = ["--set", "experts.num_experts=16", "--set", "seed=1"]
    expected = ["bootstrap", "model", "--output", "out dir", *sets, *options]
    assert done.stdout.splitlines() == expected
    bare = call("model", "out")
    assert bare.stdout.splitlines() == ["bootstrap", "model", "--output", "out"]
    assert call("model").returncode == 2 and "MODEL OUTPUT" in call().stdout


def test_the_gradient_stage_says_what_it_did(
    bootstrap: Callable[..., str], tmp_path: Path
) -> None:
    text = in_one_line(bootstrap("--set=distill.steps=2"))
    assert "KL to the dense model on text kept from training" in text
    assert "before" in text and "after" in text
    assert kept(tmp_path / "out") == 4 and len(frontier_of(tmp_path / "out")) == 2


def test_a_gradient_stage_that_does_not_help_is_undone_aloud(
    bootstrap: Callable[..., str], tmp_path: Path
) -> None:
    bootstrap()
    plain = frontier_of(tmp_path / "out")
    wild = ("--set=distill.steps=4", "--set=distill.learning_rate=3.0")
    text = in_one_line(bootstrap("--overwrite", *wild))
    assert "did not help and was undone; lower distill.learning_rate" in text
    for first, second in zip(plain, frontier_of(tmp_path / "out"), strict=True):
        for name, value in first["perplexity"].items():
            assert second["perplexity"][name] == pytest.approx(value, rel=1e-5)
