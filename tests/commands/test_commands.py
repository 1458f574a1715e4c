"""What each verb does when it is used as it should be."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from samv2.ablation.factors import ENGINE, NAMES
from samv2.cli import main
from samv2.common.config import field_kinds
from samv2.common.settings_checks import CHOICES
from samv2.configs import shipped_names
from samv2.experts.moe_layers import WalkOptions
from samv2.federated.checkup import checkup
from samv2.federated.run_folder import load_model_or_run
from tests.federated.runs import SMALL
from tests.helpers import assert_close, stdlib_text

VERBS = (
    "demo",
    "bootstrap",
    "train",
    "ablate",
    "eval",
    "export",
    "generate",
    "inspect",
    "report",
    "bench-federation",
    "doctor",
)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS) and "samv2 demo" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"samv2 {verb}" in shown
    if verb == "train":
        assert all(key in shown for key in field_kinds())
    if "--set KEY=VALUE" in shown:
        words = " ".join(shown.split())
        assert "`samv2 train --help` lists all keys" in words
        assert all(name in words for name in shipped_names())


def test_help_says_what_settings_mean_and_may_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "federation.rounds int 3 Rounds of the run." in words
    assert (
        "Divide an expert's sum by its contributors or by all valid replies." in words
    )
    for values in CHOICES.values():
        assert all(value in shown for value in values)
    assert max(map(len, shown[shown.index("settings (key") :].splitlines())) <= 88


def test_help_names_every_factor(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ablate", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(NAMES) | set(ENGINE) <= set(words)


def test_help_is_quick() -> None:
    heavy = ("torch", "transformers", "flwr")
    code = (
        "import sys; from samv2.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")


def test_doctor_finds_nothing_broken(capsys: pytest.CaptureFixture[str]) -> None:
    findings = checkup()
    assert [item for item in findings if item.state == "broken"] == []
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(item.name in shown for item in findings)


def test_doctor_says_what_a_gpu_is_used_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    (found,) = [item for item in checkup() if item.name == "device"]
    assert found.state == "ok" and found.detail.startswith("GPU: clients")
    assert "train.device" in found.detail and "generate on the CPU" in found.detail


def test_doctor_says_what_is_broken(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMV2_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["doctor"]) == 1
    assert "broken" in capsys.readouterr().out


def evaluate(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, dict[str, dict[str, float]]]:
    """The JSON of ``samv2 eval --json``, which is all of its output."""
    capsys.readouterr()
    assert main(["eval", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_eval_of_a_run_is_what_the_run_measured(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(capsys, str(run_folder))
    summary = json.loads((run_folder / "summary.json").read_text())
    assert list(found["models"]) == ["dense model", "expert graph"]
    for name, value in found["models"]["expert graph"].items():
        expected = summary["domains"][name]["final"]
        assert value == pytest.approx(expected, rel=1e-5)


def test_eval_shows_the_dense_model_behind_a_bootstrapped_folder(
    run_folder: Path,
    tiny_bootstrapped: Path,
    tiny_llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own.txt").write_text(stdlib_text()[:20_000])
    options = ("--text", f"mine={tmp_path / 'own.txt'}", "--windows", "2")
    short = (*options, "--set=train.sequence_length=64", "--set=model.dtype=float32")
    expected = evaluate(capsys, str(tiny_llama_folder), *short)
    wanted = expected["models"]["dense model"]["mine"]
    found = evaluate(capsys, str(run_folder), *options)
    assert found["models"]["dense model"]["mine"] == pytest.approx(wanted, rel=1e-5)
    found = evaluate(capsys, str(tiny_bootstrapped), *short)
    assert found["models"]["dense model"]["mine"] == pytest.approx(wanted, rel=1e-5)
    assert list(found["models"]) == ["dense model", "expert graph"]


def test_eval_of_own_text_and_another_k(
    run_folder: Path,
    tiny_llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "own.txt"
    text.write_text(stdlib_text()[:20_000])
    options = ("--text", f"mine={text}", "--windows", "2")
    few, more = (
        evaluate(capsys, str(run_folder), *options, "--experts", k) for k in ("2", "8")
    )
    assert few["windows"] == 2 and few["domains"] == ["mine"]
    low, high = (x["models"]["expert graph"]["mine"] for x in (few, more))
    assert 1 < high != low
    sequence = "--set=train.sequence_length=64"
    dense = evaluate(capsys, str(tiny_llama_folder), *options, sequence)
    assert list(dense["models"]) == ["dense model"]
    assert dense["models"]["dense model"]["mine"] == pytest.approx(high, rel=0.1)
    assert main(["eval", str(run_folder), *options]) == 0
    assert "mine" in capsys.readouterr().out


def test_export_is_the_full_model_without_samv2(
    run_folder: Path, tiny_batch: Tensor, tmp_path: Path
) -> None:
    output = tmp_path / "plain"
    assert main(["export", str(run_folder), "--output", str(output)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(output).eval()
    assert type(plain) is LlamaForCausalLM
    AutoTokenizer.from_pretrained(output)
    model, _, name = load_model_or_run(run_folder)
    assert "after round 1" in name
    assert any(bool(layer.adapter_down_ERF.any()) for layer in model.expert_layers)
    opened = torch.ones(3, 8, 8, dtype=torch.bool).triu()
    model.set_graph(replace(model.graph, edge_mask_LEE=opened))
    every = WalkOptions(experts_per_token=8, use_assembler=False)
    with torch.no_grad():
        expected = model(tiny_batch, walk_options=every).logits
        assert_close("logits", plain(tiny_batch).logits, expected, "logits")
    again = ["export", str(run_folder), "--output", str(output)]
    assert main(again) == 2
    assert main([*again, "--overwrite"]) == 0


def test_train_prints_a_summary_and_resumes_from_its_folder_alone(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    resumed = ["train", "--resume", "--log-dir", str(run_folder)]
    assert main(resumed) == 0
    shown = capsys.readouterr().out
    assert "What happened." in shown and "after training" in shown
    assert main([*resumed, "--set=federation.codec=int4"]) == 2
    assert "'int8' -> 'int4'" in capsys.readouterr().err


def test_the_summary_bears_a_run_without_scores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from samv2.commands.summary import show_summary
    from samv2.common.telemetry import make_console

    summary = {
        "model": "m",
        "domains": {},
        "ffn_flops_fraction": 0.5,
        "bytes_up_per_client_round": 0,
        "fedit_bytes_per_client_round": 10,
        "rounds": 1,
        "clients": 2,
        "edits": 0,
        "refused": 0,
        "seconds": {},
    }
    show_summary(summary, Path("logs"), make_console())
    summary["domains"] = {"x": {"dense": None, "start": 2.0, "final": None}}
    show_summary(summary, Path("logs"), make_console())
    assert "0 of 1 domains" in capsys.readouterr().out
