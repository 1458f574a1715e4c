"""``samv2 export --peft``: from a run to ``PeftModel.from_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from samv2.cli import main
from samv2.federated.run_folder import load_model_or_run
from tests.federated.runs import SMALL
from tests.helpers import assert_close, logits_of, random_llama

pytestmark = pytest.mark.filterwarnings(
    # peft asks for it by the name that transformers is about to drop.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def train(root: Path, model: Path, *overrides: str) -> Path:
    """A run of one round in which tokens visit every expert."""
    whole = (
        "experts.experts_per_token=8",
        "federation.rounds=1",
        f"model.path={model}",
    )
    options = [f"--set={item}" for item in (*SMALL, *whole, *overrides)]
    assert main(["train", "--log-dir", str(root), *options]) == 0
    return root


def base_of(output: Path) -> str:
    """The base model that an adapter names."""
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    return config["base_model_name_or_path"]


def assert_same(run: Path, output: Path, batch: Tensor) -> None:
    """Base and adapter, the run, and the merged export have the same logits."""
    model, _, _ = load_model_or_run(run)
    model.set_experts_per_token(8)
    expected = logits_of(model, batch)
    base = AutoModelForCausalLM.from_pretrained(base_of(output)).eval()
    plain = logits_of(base, batch)
    adapted = PeftModel.from_pretrained(base, output / "adapter").eval()
    found = logits_of(adapted, batch)
    assert float((found - plain).abs().max()) > 1e-2
    assert_close("adapter", found, expected, "logits")
    merged = AutoModelForCausalLM.from_pretrained(output).eval()
    assert_close("merged", logits_of(merged, batch), expected, "logits")


def test_a_run_from_a_dense_model(
    tiny_llama_folder: Path, tiny_batch: Tensor, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", tiny_llama_folder)
    output = tmp_path / "plain"
    export = ["export", str(run), "--output", str(output), "--peft"]
    assert main(export) == 0
    assert base_of(output) == str(tiny_llama_folder.resolve())
    assert not (output / "base").exists()
    assert_same(run, output, tiny_batch)
    assert main([*export, "--overwrite"]) == 0


def test_a_run_from_a_bootstrapped_folder(
    tiny_bootstrapped: Path,
    tiny_llama_folder: Path,
    tiny_batch: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train(tmp_path / "run", tiny_bootstrapped)
    export = ["export", str(run), "--peft", "--output"]
    assert main([*export, str(tmp_path / "a")]) == 0
    assert base_of(tmp_path / "a") == str(tmp_path / "a" / "base")
    assert "PeftModel.from_pretrained" in capsys.readouterr().out
    assert_same(run, tmp_path / "a", tiny_batch)
    named = [*export, str(tmp_path / "b"), "--base", str(tiny_llama_folder)]
    assert main(named) == 0
    assert base_of(tmp_path / "b") == str(tiny_llama_folder.resolve())
    assert_same(run, tmp_path / "b", tiny_batch)
    other = tmp_path / "other"
    random_llama(seed=5).save_pretrained(other)
    assert main([*export, str(tmp_path / "c"), "--base", str(other)]) == 2
    assert "FFN rows of layer 0" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_run_that_is_no_lora(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", str(run_folder), "--output", str(tmp_path / "out")]
    assert main([*export, "--peft"]) == 2
    found = capsys.readouterr().err
    assert "experts_per_token is 4 of 8" in found and "without --peft" in found
    assert main([*export, "--base", "smollm2"]) == 2
    assert "give --peft too" in capsys.readouterr().err
    assert [path for path in tmp_path.iterdir() if path.name.startswith("out")] == []
