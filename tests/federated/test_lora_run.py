"""Runs of the LoRA baselines on the tiny model: means, bytes, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from samv2.common.errors import CheckpointError, ConfigError, FederationError
from samv2.common.settings import Settings
from samv2.common.telemetry import read_metrics
from samv2.data.shards import load_client
from samv2.federated import local_step as sam
from samv2.federated import lora_round, lora_run
from samv2.federated.client_round import round_seed
from samv2.federated.lora_methods import METHODS
from samv2.federated.lora_round import (
    LoraPlace,
    LoraRuntime,
    load_lora_runtime,
    train_lora_round,
)
from samv2.federated.lora_run import ADAPTER, run_lora
from samv2.federated.run_folder import load_model_or_run
from samv2.federated.sampling import sample_nodes
from samv2.federated.server_app import run_embedded
from samv2.models.bootstrap import bootstrap
from samv2.models.lora import write_lora
from tests.federated.runs import assert_same_bits, quiet, small_settings

LEARNING = ("train.learning_rate=3e-3", "train.local_steps=2", "federation.rounds=2")


def run(settings: Settings, root: Path, method: str, **flags: Any) -> dict[str, Any]:
    """A run in this process."""
    return run_lora(settings, root, method=method, console=quiet(), **flags)


@pytest.fixture(scope="module")
def settings(tiny_llama_folder: Path) -> Settings:
    """Two clients, two rounds of two steps."""
    return small_settings(tiny_llama_folder, *LEARNING)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, settings: Settings
) -> dict[str, Path]:
    """The directory of a finished run of every method."""
    root = tmp_path_factory.mktemp("lora")
    for name in METHODS:
        run(settings, root / name, name)
    return {name: root / name for name in METHODS}


def adapters(root: Path, round: int) -> dict[str, Tensor]:
    """The server's adapters after a round."""
    return load_file(root / "checkpoints" / f"round_{round:04d}/adapter.safetensors")


def runtime_of(root: Path, settings: Settings, method: str) -> LoraRuntime:
    """A client process of a run, with a memory of its own."""
    place = LoraPlace(
        shards=root / "shards",
        states=root / "other-clients",
        settings=settings,
        method=method,
    )
    return load_lora_runtime(place)


@pytest.mark.parametrize("method", ["fedit", "ffa-lora"])
def test_the_server_keeps_the_mean_of_its_clients(
    finished: dict[str, Path], settings: Settings, method: str
) -> None:
    runtime = runtime_of(finished[method], settings, method)
    server = runtime.start
    for round in (1, 2):
        sent = [
            train_lora_round(runtime, [client], round, server).adapters
            for client in (0, 1)
        ]
        server = adapters(finished[method], round)
        for name, value in server.items():
            # Halves are exact in binary, so the mean of two is rounded once.
            assert torch.equal(value, (sent[0][name] + sent[1][name]) / 2)


def test_ffa_lora_never_changes_or_sends_a(
    finished: dict[str, Path], settings: Settings
) -> None:
    root = finished["ffa-lora"]
    runtime = runtime_of(root, settings, "ffa-lora")
    assert all("lora_B" in name for name in adapters(root, 2))
    trained = load_file(root / ADAPTER / "adapter_model.safetensors")
    frozen = {
        name: parameter.detach()
        for name, parameter in runtime.model.named_parameters()
        if "lora_A" in name
    }
    assert len(frozen) == 9
    for name, value in frozen.items():
        stored = "base_model.model." + name.replace(".default.", ".")
        assert torch.equal(trained[stored], value)
    assert any(value.any() for name, value in trained.items() if "lora_B" in name)


def test_sent_bytes_are_those_of_the_arrays(finished: dict[str, Path]) -> None:
    width, ffn, rank, layers = 64, 128, 4, 3
    of_a = layers * rank * (2 * width + ffn) * 4
    of_b = layers * rank * (2 * ffn + width) * 4
    expected = {"fedit": of_a + of_b, "ffa-lora": of_b, "local": 0, "central": 0}
    for name, root in finished.items():
        for row in read_metrics(root):
            assert row["bytes_up_per_client"] == expected[name]
            assert row["bytes_down_per_client"] == expected[name]
            assert row["bytes_up"] == 2 * expected[name]


def test_every_method_learns(finished: dict[str, Path]) -> None:
    for root in finished.values():
        summary = json.loads((root / "summary.json").read_text())
        assert summary["rounds"] == 2 and set(summary["domains"]) == {"python", "pydoc"}
        for values in summary["domains"].values():
            assert values["final"] < values["start"]
        assert set(summary["seconds"]) == {"prepare", "train", "merge", "evaluate"}


def test_a_local_client_goes_on_where_it_was(
    finished: dict[str, Path], settings: Settings
) -> None:
    """Two rounds of two steps are four steps of one optimiser."""
    runtime = runtime_of(finished["local"], settings, "local")
    for round in (1, 2):
        train_lora_round(runtime, [1], round, {})
    kept = load_file(finished["local"] / "clients/client_0001/round_0002.safetensors")
    again = load_file(runtime.place.states / "client_0001/round_0002.safetensors")
    assert_same_bits(kept, again)
    steps = [value for name, value in kept.items() if name.startswith("step/")]
    assert len(steps) == 18 and all(step == 4 for step in steps)


def test_central_takes_every_clients_steps_in_turn(finished: dict[str, Path]) -> None:
    kept = load_file(finished["central"] / "clients/pooled/round_0002.safetensors")
    steps = [value for name, value in kept.items() if name.startswith("step/")]
    assert steps and all(step == 8 for step in steps)
    assert len(list((finished["central"] / "clients").iterdir())) == 1


def test_clients_draw_the_batches_of_a_sam_run(
    finished: dict[str, Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {"lora": [], "sam": []}

    def watch(module: Any, key: str) -> None:
        plain = module.next_token_loss

        def loss(model: Any, batch_BS: Tensor, *rest: Any) -> Tensor:
            seen[key].append(batch_BS)
            return plain(model, batch_BS, *rest)

        monkeypatch.setattr(module, "next_token_loss", loss)

    watch(lora_round, "lora")
    watch(sam, "sam")
    root = finished["fedit"]
    runtime = runtime_of(root, settings, "fedit")
    train_lora_round(runtime, [1], 2, runtime.start)
    shard = load_client(root / "shards", 1)
    llama = LlamaForCausalLM.from_pretrained(settings.model.path).eval()
    model = bootstrap(llama, shard.train[:1024].view(16, 64), settings).model
    sam.local_step(
        model, shard.train, settings.train, seed=round_seed(0, 2, 1), temperature=1.0
    )
    assert len(seen["lora"]) == len(seen["sam"]) == 2
    assert all(torch.equal(*pair) for pair in zip(seen["lora"], seen["sam"]))


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_ends_in_the_same_bits(
    finished: dict[str, Path],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    plain = lora_run.save_adapters

    def stop_after_one(folder: Path, round: int, *rest: Any, **facts: Any) -> None:
        if round == 2:
            raise KeyboardInterrupt
        plain(folder, round, *rest, **facts)

    monkeypatch.setattr(lora_run, "save_adapters", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", method)
    monkeypatch.undo()
    run(settings, tmp_path / "run", method, resume=True)
    assert_same_bits(adapters(tmp_path / "run", 2), adapters(finished[method], 2))
    for path in sorted(finished[method].rglob("clients/*/*")):
        other = tmp_path / "run" / path.relative_to(finished[method])
        assert_same_bits(load_file(other), load_file(path))
    rows, expected = read_metrics(tmp_path / "run"), read_metrics(finished[method])
    assert [row["perplexity"] for row in rows] == [
        row["perplexity"] for row in expected
    ]


def test_workers_give_the_same_bits(
    finished: dict[str, Path], settings: Settings, tmp_path: Path
) -> None:
    text = finished["fedit"] / "shards"
    changed = small_settings(settings.model.path, *LEARNING, "federation.workers=2")
    summary = run(changed, tmp_path, "fedit", text=text, start={"python": 3.0})
    assert_same_bits(adapters(tmp_path, 2), adapters(finished["fedit"], 2))
    assert not (tmp_path / "shards").exists()
    assert summary["domains"]["python"]["start"] == 3.0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_reads_the_trained_adapter(
    finished: dict[str, Path], settings: Settings, tiny_batch: Tensor
) -> None:
    llama = LlamaForCausalLM.from_pretrained(settings.model.path).eval()
    model = PeftModel.from_pretrained(llama, finished["fedit"] / ADAPTER)
    runtime = runtime_of(finished["fedit"], settings, "fedit")
    write_lora(runtime.model, adapters(finished["fedit"], 2))
    with torch.no_grad():
        assert torch.equal(model(tiny_batch).logits, runtime.model(tiny_batch).logits)


def test_another_method_or_model_is_refused(
    finished: dict[str, Path], settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="fedsam.*fedit, ffa-lora, local, central"):
        run(settings, tmp_path, "fedsam")
    with pytest.raises(CheckpointError, match="method 'fedit', not 'local'"):
        run(settings, finished["fedit"], "local", resume=True)
    other = finished["fedit"].parent / "other-text"
    run(small_settings(settings.model.path, *LEARNING, "seed=1"), other, "fedit")
    with pytest.raises(CheckpointError, match="started with corpus_sha256"):
        run(settings, finished["fedit"], "fedit", resume=True, text=other / "shards")
    sampled = small_settings(settings.model.path, "federation.clients_per_round=1")
    with pytest.raises(ConfigError, match="'local' trains all clients each round"):
        run(sampled, tmp_path, "local")
    with pytest.raises(CheckpointError, match="--resume"):
        run(settings, finished["fedit"], "fedit")


def test_a_baseline_is_no_sam_run(
    finished: dict[str, Path], settings: Settings
) -> None:
    with pytest.raises(CheckpointError, match="baseline 'fedit', which has no expert"):
        load_model_or_run(finished["fedit"])
    with pytest.raises(CheckpointError, match="baseline 'local'"):
        run_embedded(settings, finished["local"], resume=True, console=quiet())


def test_a_sampled_round_averages_the_clients_that_were_asked(
    settings: Settings, tmp_path: Path
) -> None:
    """As in a SAM-v2 run, seed and round choose them."""
    one = small_settings(
        settings.model.path, *LEARNING, "federation.clients_per_round=1"
    )
    run(one, tmp_path, "fedit")
    runtime = runtime_of(tmp_path, one, "fedit")
    sent = [train_lora_round(runtime, [c], 1, runtime.start).adapters for c in (0, 1)]
    (chosen,) = sample_nodes({100: 0, 101: 1}, 1, one.seed, 1).values()
    assert_same_bits(adapters(tmp_path, 1), sent[chosen])
    row = read_metrics(tmp_path)[0]
    assert row["clients"] == 1 and row["bytes_up"] == row["bytes_up_per_client"]


def test_a_client_that_fails_twice_stops_the_run(
    settings: Settings, tmp_path: Path
) -> None:
    hot = small_settings(settings.model.path, *LEARNING, "train.learning_rate=1e30")
    with pytest.raises(FederationError, match="round 1 had 0 replies.*learning_rate"):
        run(hot, tmp_path, "fedit")
