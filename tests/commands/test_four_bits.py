"""NF4 expert blocks from the command line: what a user sees, and that all verbs work."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from samv2.cli import main
from samv2.experts.moe_layers import WalkOptions
from samv2.federated.run_folder import load_model_or_run
from samv2.models.expert_model import ExpertModel
from tests.federated.runs import SMALL
from tests.helpers import assert_close, logits_of

OPTIONS = [f"--set={item}" for item in SMALL]
NF4 = "--set=experts.quantise=nf4"


@pytest.fixture(scope="module")
def bootstrapped(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path
) -> tuple[Path, str]:
    """A folder that ``samv2 bootstrap`` quantised, and what was printed."""
    folder = tmp_path_factory.mktemp("four-bits") / "experts"
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setenv("COLUMNS", "100")
        more = [NF4, "--set=experts.other_k=2", "--also-score=math"]
        small = "--set=data.train_bytes=16384"
        arguments = [str(tiny_llama_folder), "--output", str(folder), *OPTIONS]
        assert main(["bootstrap", *arguments, *more, small]) == 0
    return folder, output.getvalue()


def frontier_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "frontier.json").read_text())


def test_the_frontier_says_what_four_bits_cost(
    bootstrapped: tuple[Path, str], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Before it is the frontier of the same bootstrap without them, at K = E too."""
    plain = tmp_path / "plain"
    more = ["--set=experts.other_k=2", "--also-score=math"]
    small = "--set=data.train_bytes=16384"
    arguments = [str(tiny_llama_folder), "--output", str(plain), *OPTIONS]
    assert main(["bootstrap", *arguments, *more, small]) == 0
    frontier = frontier_of(bootstrapped[0])
    assert [point["experts_per_token"] for point in frontier] == [2, 4, 8]
    for point, before in zip(frontier, frontier_of(plain), strict=True):
        assert set(point["perplexity"]) == {"python", "pydoc", "math"}
        assert point["unquantised_perplexity"] == before["perplexity"]
        assert point["unquantised_ratio"] == before["ratio"]
        assert point["unquantised_unseen_ratio"] == before["unseen_ratio"]
        assert point["perplexity"] != before["perplexity"]
        assert point["ratio"] == pytest.approx(before["ratio"], rel=0.2)
        assert before["unquantised_perplexity"] is before["unquantised_ratio"] is None
    whole = frontier[-1]
    assert whole["unquantised_ratio"] == pytest.approx(1, rel=1e-4)
    changes = [
        abs(value / whole["unquantised_perplexity"][name] - 1)
        for name, value in whole["perplexity"].items()
    ]
    assert max(changes) > 5e-4, "four bits are felt at K = E too"


def test_the_table_has_both_perplexities(bootstrapped: tuple[Path, str]) -> None:
    folder, shown = bootstrapped
    lines = shown.splitlines()
    rows: dict[str, list[str]] = {}
    for line in lines:
        if cells := [cell.strip() for cell in line.split("│")[1:-1]]:
            rows.setdefault(cells[0], []).extend(cells[1:])
    frontier = frontier_of(folder)
    for name in ("python", "pydoc", "math"):
        pairs = [
            f"{p['unquantised_perplexity'][name]:.2f} -> {p['perplexity'][name]:.2f}"
            for p in frontier
        ]
        assert [cell for cell in rows[name] if "->" in cell] == pairs
    ratios = [f"{p['unquantised_ratio']:.3f} -> {p['ratio']:.3f}" for p in frontier]
    assert set(ratios) <= set(rows["mean ratio to dense"])
    costs = [f"{p['ratio'] / p['unquantised_ratio']:.3f}" for p in frontier]
    assert [cell for cell in rows["mean ratio to float"] if cell] == costs
    assert "a -> b: before and after expert blocks went to 4 bits" in shown
    assert "Quantising expert blocks (layers)" in shown
    assert max(map(len, lines[: lines.index(lines[-2])])) <= 100


def test_eval_measures_what_the_frontier_says(
    bootstrapped: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for point in frontier_of(bootstrapped[0]):
        k = str(point["experts_per_token"])
        capsys.readouterr()
        arguments = [str(bootstrapped[0]), "--experts", k, "--json", *OPTIONS]
        assert main(["eval", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)["models"]["expert graph"]
        for name, value in found.items():
            assert value == pytest.approx(point["perplexity"][name], rel=1e-4)


def test_it_trains_is_evaluated_and_exported(
    bootstrapped: tuple[Path, str], tiny_batch: torch.Tensor, tmp_path: Path
) -> None:
    """Its own settings are the defaults of a run on it; the blocks stay as they are."""
    folder, run = bootstrapped[0], tmp_path / "run"
    before = load_file(folder / "layer-00001.safetensors")
    sets = [*OPTIONS, f"--set=model.path={folder}", "--set=federation.rounds=1"]
    assert main(["train", "--log-dir", str(run), *sets]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 1
    assert main(["eval", str(run), "--json"]) == 0
    model, _, name = load_model_or_run(run)
    assert "after round 1" in name and model.expert_config.quantise == "nf4"
    assert any(bool(layer.adapter_up_EFR.any()) for layer in model.expert_layers)
    after = load_file(folder / "layer-00001.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert main(["export", str(run), "--output", str(tmp_path / "plain")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    opened = torch.ones(3, 8, 8, dtype=torch.bool).triu()
    model.set_graph(replace(model.graph, edge_mask_LEE=opened))
    whole = WalkOptions(experts_per_token=8, use_assembler=False)
    expected = logits_of(model, tiny_batch, walk_options=whole)
    assert_close("logits", logits_of(dense, tiny_batch), expected, "logits")


def test_a_run_that_starts_from_a_dense_model_is_quantised_too(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    sets = [*OPTIONS, f"--set=model.path={tiny_llama_folder}", NF4]
    run = ["--log-dir", str(tmp_path / "run"), "--set=federation.rounds=1"]
    assert main(["train", *run, *sets]) == 0
    model = ExpertModel.from_pretrained(tmp_path / "run" / "model")
    assert model.expert_config.quantise == "nf4"
    assert all(len(layer.packed) == 4 for layer in model.expert_layers)


def test_a_run_cannot_quantise_a_float_folder(
    tiny_bootstrapped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [*OPTIONS, f"--set=model.path={tiny_bootstrapped}", NF4]
    assert main(["train", "--log-dir", str(tmp_path / "run"), *sets]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "experts.quantise is 'nf4', but" in shown and "with 'none'" in shown


def test_the_gradient_stage_comes_first(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    arguments = [str(tiny_llama_folder), "--output", str(folder), *OPTIONS, NF4]
    learn = ["--set=distill.steps=3", "--set=distill.learning_rate=5e-5"]
    assert main(["bootstrap", *arguments, *learn]) == 0
    shown = capsys.readouterr().out
    assert shown.index("KL to the dense model") < shown.index("Quantising expert")
    model = ExpertModel.from_pretrained(folder)
    assert model.expert_config.quantise == "nf4"
    frontier = frontier_of(folder)
    plain = tmp_path / "plain"
    arguments = [str(tiny_llama_folder), "--output", str(plain), *OPTIONS]
    assert main(["bootstrap", *arguments, *learn]) == 0
    for point, before in zip(frontier, frontier_of(plain), strict=True):
        assert point["unquantised_perplexity"] == before["perplexity"]
