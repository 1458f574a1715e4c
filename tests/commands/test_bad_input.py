"""Bad input: exit status 2 at once, and a message with name, value and remedy."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from samv2.cli import main
from tests.federated.runs import SMALL

SETS = [f"--set={item}" for item in SMALL]


@pytest.fixture
def refuse(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., str]:
    """Runs a command that must fail; returns what it said."""

    def long_work(*_: object, **__: object) -> None:
        raise AssertionError("long work began")

    for name in (
        "prepare.bootstrap",
        "frontier.bootstrap_to_folder",
        "heldout.score_windows",
    ):
        monkeypatch.setattr(f"samv2.federated.{name}", long_work)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        capsys.readouterr()
        begin = time.monotonic()
        assert main(list(arguments)) == 2
        assert time.monotonic() - begin < 10
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        assert "error:" in printed.err
        return printed.err

    return call


def says(message: str, *words: str) -> None:
    """A message holds all of these."""
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def test_settings(refuse: Callable[..., str], tiny_llama_folder: Path) -> None:
    train = ("train", f"--set=model.path={tiny_llama_folder}", *SETS)
    found = refuse(*train, "--set=federation.round=3")
    says(found, "'federation.round'", "did you mean federation.rounds")
    found = refuse(*train, "--set=federation.rounds")
    says(found, "'federation.rounds' has no '='", "key=value")
    found = refuse(*train, "--set=federation.rounds=many", "--set=train.clip_norm=-1")
    says(found, "federation.rounds is 'many'", "whole number", "train.clip_norm is -1")
    found = refuse(*train, "--config", "nowhere.toml")
    says(found, "'nowhere.toml'", "demo")
    Path("broken.toml").write_text("[federation\n")
    says(refuse(*train, "--config", "broken.toml"), "broken.toml", "TOML")
    Path("binary.toml").write_bytes(b"\xff\xfe\0")
    says(refuse(*train, "--config", "binary.toml"), "binary.toml", "UTF-8")
    found = refuse(*train, "--set=federation.min_replies=3")
    says(found, "federation.min_replies is 3", "only 2")
    assert not Path("logs").exists()


def test_text(
    refuse: Callable[..., str], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    train = ("train", f"--set=model.path={tiny_llama_folder}", *SETS)
    found = refuse(*train, "--set=data.domains=python,pydog")
    says(found, "'pydog'", "pydoc", "NAME=PATH")
    found = refuse(*train, "--set=data.domains=own=missing.txt")
    says(found, "missing.txt", "check the path")
    Path("small.txt").write_text("One short line.\n")
    found = refuse(*train, "--set=data.domains=own=small.txt")
    says(found, "own")
    found = refuse(*train, "--set=federation.clients=60")
    says(found, "fewer clients")
    found = refuse(*train, "--set=train.sequence_length=30000")
    says(found, "30000")


def test_models(
    refuse: Callable[..., str],
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    train = ("train", *SETS)
    dense = f"--set=model.path={tiny_llama_folder}"
    found = refuse(*train, dense, "--set=experts.num_experts=7")
    says(found, "128", "7")
    found = refuse(*train, dense, "--set=experts.layers=2-9")
    says(found, "2-9", "0..2")
    found = refuse(*train, dense, "--set=adapter.rank=65")
    says(found, "adapter.rank is 65", "64")
    big = ("--set=adapter.rank=64", "--set=federation.update_budget_bytes=4096")
    found = refuse(*train, dense, *big, "--set=federation.codec=raw")
    says(found, "federation.update_budget_bytes is 4096", "lower adapter.rank")
    found = refuse(*train, "--set=model.path=no/such/folder/here")
    says(found, "no/such/folder/here")
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=512, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained("gpt2-like")
    tiny_tokenizer.save_pretrained("gpt2-like")
    found = refuse(*train, "--set=model.path=gpt2-like")
    says(found, "'gpt2'", "cannot become an expert graph")
    found = refuse("bootstrap", "gpt2-like", "--output", "out", *SETS)
    says(found, "'gpt2'")
    assert not Path("out").exists()
    Path("empty").mkdir()
    says(refuse(*train, "--set=model.path=empty"), "empty", "config.json")


def test_runs(
    refuse: Callable[..., str], run_folder: Path, tiny_bootstrapped: Path
) -> None:
    says(refuse("train", "--log-dir", str(run_folder)), "--resume", "--overwrite")
    found = refuse("train", "--resume", "--log-dir", "nowhere")
    says(found, "nowhere", "no run to resume")
    Path("folder").mkdir()
    found = refuse("export", "folder", "--output", "out")
    says(found, "folder", "samv2 train")
    with pytest.raises(SystemExit) as caught:
        main(["export", "nowhere", "--output", "out"])
    assert caught.value.code == 2
    found = refuse("eval", str(run_folder), "--experts", "9")
    says(found, "9", "1..8")
    says(refuse("eval", str(run_folder), "--experts", "0"), "0", "1..8")
    says(refuse("eval", str(run_folder), "--windows", "0"), "--windows is 0")
    found = refuse("eval", str(run_folder), "--set=train.batch_size=1")
    says(found, "own settings", "--set")
    found = refuse("eval", "nowhere/at/all")
    says(found, "nowhere/at/all")
    wrong = [*SETS, "--set=adapter.rank=2"]
    found = refuse("train", f"--set=model.path={tiny_bootstrapped}", *wrong)
    says(found, "adapter.rank is 2", "use 4")


def test_bootstrap_options(
    refuse: Callable[..., str], tiny_llama_folder: Path, tiny_bootstrapped: Path
) -> None:
    bootstrap = ("bootstrap", str(tiny_llama_folder), "--output", "out", *SETS)
    found = refuse(*bootstrap, "--flops=0.5", "--target-ppl-ratio=1.2")
    says(found, "--flops and --target-ppl-ratio exclude each other", "give one")
    for ratio in ("1", "0.9", "-2", "nan", "inf"):
        found = refuse(*bootstrap, f"--target-ppl-ratio={ratio}")
        says(found, "--target-ppl-ratio is", ratio, "above 1")
    target = (*bootstrap, "--target-ppl-ratio=1.5")
    found = refuse(*target, "--set=experts.repair=false")
    says(found, "experts.repair is false", "leave the option out")
    says(refuse(*target, "--set=experts.combine=softmax"), "'softmax'", "'unit'")
    for share in ("0.01", "-1", "nan"):
        found = refuse(*bootstrap, f"--flops={share}")
        says(found, f"--flops is {share}", "the least that can be had is", "(K = 1 in")
    least = re.search(r"can be had is (\d\.\d+)", found)
    assert least is not None
    with pytest.raises(AssertionError, match="long work began"):
        main([*bootstrap, f"--flops={least[1]}"])
    says(refuse(*bootstrap, "--flops=50"), "--flops is 50", "a share such as 0.5")
    assert not Path("out").exists()
    found = refuse("bootstrap", str(tiny_bootstrapped), "--output", "out", *SETS)
    says(found, str(tiny_bootstrapped), "an expert graph already", "samv2 train")
    found = refuse(*bootstrap, "--output", str(tiny_bootstrapped))
    says(found, str(tiny_bootstrapped), "exists", "--overwrite")


def test_bootstrap_text(refuse: Callable[..., str], tiny_llama_folder: Path) -> None:
    bootstrap = ("bootstrap", str(tiny_llama_folder), "--output", "out", *SETS)
    found = refuse(*bootstrap, "--also-score", "math,pydog")
    says(found, "'pydog'", "pydoc", "NAME=PATH")
    found = refuse(*bootstrap, "--also-score", "python")
    says(found, "'python'", "rename one")
    found = refuse(*bootstrap, "--also-score=own=missing.txt")
    says(found, "missing.txt", "check the path")
    Path("small.txt").write_text("One short line.\n" * 9)
    says(refuse(*bootstrap, "--also-score", "own=small.txt"), "own", "too small")
    found = refuse(*bootstrap, "--set=train.sequence_length=30000")
    says(found, "domain python has", "30000", "data.heldout_bytes")
    assert not Path("out").exists()


def test_own_texts(
    refuse: Callable[..., str], run_folder: Path, tiny_llama_folder: Path
) -> None:
    evaluate = ("eval", str(run_folder), "--text")
    Path("own.txt").write_text("Some words.\n")
    Path("blank.txt").write_text("\n\n")
    says(refuse(*evaluate, "own.txt"), "own.txt")
    says(refuse(*evaluate, "python"), "NAME=FILE")
    says(refuse(*evaluate, "own=none.txt"), "none.txt")
    says(refuse(*evaluate, "own=blank.txt"), "blank.txt")
    says(refuse(*evaluate, "own=own.txt"), "own", "64")
    found = refuse(*evaluate, "own=own.txt", "--text", "own=own.txt")
    says(found, "'own' twice")
    found = refuse("eval", str(tiny_llama_folder), "--experts", "4")
    says(found, "--experts is 4", "no experts")


def test_a_checkpoint_of_another_model(
    refuse: Callable[..., str], run_folder: Path
) -> None:
    shutil.copytree(run_folder, "copy")
    path = Path("copy/checkpoints/round_0001/state.json")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"model_fingerprint": "feed"}))
    for verb in (["eval", "copy"], ["export", "copy", "--output", "out"]):
        says(refuse(*verb), "belongs to model feed", "--log-dir")
    found = refuse("train", "--resume", "--log-dir", "copy")
    says(found, "belongs to model feed")
    path.write_text("{")
    says(refuse("eval", "copy"), "damaged", "round_0001")
    Path("copy/prepared.json").write_text("{}")
    says(refuse("train", "--resume", "--log-dir", "copy"), "prepared.json", "damaged")


def test_a_folder_that_cannot_be_written(refuse: Callable[..., str]) -> None:
    Path("file").write_text("")
    found = refuse("train", "--log-dir", "file/logs")
    says(found, "file")
