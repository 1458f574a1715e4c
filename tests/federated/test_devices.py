"""A client's round on another device than the CPU gives what it gives on the CPU."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.errors import ConfigError
from samv2.common.settings import Settings
from samv2.experts.sub_graph import SubGraph
from samv2.federated.client_round import RoundRequest, TrainReply, load_runtime
from samv2.federated.graph_message import GraphMessage, pack_graph
from samv2.federated.usage import unpack_usage
from samv2.federated.workers import worker_count
from samv2.models.perplexity import Score
from samv2.models.save import save_expert_model
from samv2.updates.packing import pack, unpack
from tests.federated.runs import SMALL, save_one_client, small_settings, toy_settings
from tests.helpers import TOLERANCES, convert, stir
from tests.second_device import Job, do

Done = tuple[TrainReply, dict[str, Score]]

# What a model is made with; the experts a client holds (None: all). "chains" takes the way
# that all models take on a GPU, visits grouped by expert. 4-bit blocks are left out: a GPU
# reads them with kernels of its own, which tests/kernels has.
CASES: dict[str, tuple[Sequence[str], SubGraph | None]] = {
    "whole": ((), None),
    "siblings": (("adapter.siblings=2", "assembler.width=0"), None),
    "chains": (("experts.chain_degree=2", "experts.chains=true"), None),
    "part": (
        (),
        SubGraph(
            kept=((0, 2, 3, 5),) * 3,
            num_experts=8,
            experts_per_token=3,
            micro_batch=2,
        ),
    ),
}
EXACT = ("train.local_steps=2", "federation.codec=raw", "train.keep_optimizer=true")


@pytest.fixture(scope="module")
def rounds(
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_tokens: Tensor,
    tiny_calibration: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Job, Done, Done]]:
    """For each case the job, what the CPU gave, and what the other device gave."""
    root = tmp_path_factory.mktemp("devices")
    save_one_client(tiny_tokens, root / "shards")
    jobs = {}
    for name, (overrides, part) in CASES.items():
        llama = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()
        model = stir(convert(llama, tiny_calibration, (*SMALL, *overrides)).model)
        save_expert_model(model, tiny_tokenizer, root / name)
        settings = small_settings(
            root / name, *overrides, *EXACT, "federation.update_budget_bytes=9999999"
        )
        jobs[name] = job_of(root, name, settings, part)
    (root / "jobs").write_bytes(pickle.dumps(list(jobs.values())))
    subprocess.run(
        [sys.executable, "-m", "tests.second_device", root / "jobs", root / "result"],
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=300,
    )
    far = pickle.loads((root / "result").read_bytes())
    near = [do(replace(job, states=root / "near" / n)) for n, job in jobs.items()]
    return {n: (jobs[n], *both) for n, *both in zip(jobs, near, far)}


def job_of(root: Path, name: str, settings: Settings, part: SubGraph | None) -> Job:
    """A first round of a model in ``root / name``."""
    cpu = replace(settings, train=replace(settings.train, device="cpu"))
    runtime = load_runtime(root / name, root / "shards", root / "far", cpu)
    graph = pack_graph(runtime.model.graph)
    return Job(
        model=root / name,
        shards=root / "shards",
        states=root / "far" / name,
        settings=cpu,
        request=RoundRequest(
            round=1,
            graph=GraphMessage(version=0, full=graph, edits=()),
            parameters=pack({}, runtime.manifest, round=1),
            part=part,
        ),
        part=part,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_round_elsewhere_is_the_round_here(
    rounds: dict[str, tuple[Job, Done, Done]], name: str
) -> None:
    job, (near, near_scores), (far, far_scores) = rounds[name]
    runtime = load_runtime(job.model, job.shards, job.states, job.settings)
    expected = unpack(near.update, runtime.manifest, round=1)
    found = unpack(far.update, runtime.manifest, round=1)
    # Two AdamW steps of at most the learning rate each; sums in another order give other
    # signs to gradients that are next to nothing.
    step = 2 * job.settings.train.learning_rate
    both = [(expected[key], found[key]) for key in expected if key in found]
    assert len(both) > 0.9 * len(expected)
    apart = torch.cat([(left - right).abs() for left, right in both])
    assert float((apart > 0.05 * step).float().mean()) < 0.01
    assert far.train_loss == pytest.approx(near.train_loss, rel=TOLERANCES["logits"])
    assert far_scores["python"].nll == pytest.approx(
        near_scores["python"].nll, rel=TOLERANCES["logits"]
    )
    layers, experts = runtime.model.graph.edge_mask_LEE.shape[:2]
    counts = [
        unpack_usage(reply.usage, layers, experts, round=1, max_count=reply.tokens)
        for reply in (near, far)
    ]
    walked = int(counts[0].usage_LEE.sum())
    assert walked > 0
    moved = (counts[0].usage_LEE - counts[1].usage_LEE).abs().sum()
    assert int(moved) < 0.002 * walked
    kept = [
        sorted(path.name for path in states.rglob("*.safetensors"))
        for states in (job.states, job.states.parents[1] / "near" / name)
    ]
    assert kept[0] == kept[1] and kept[0]


def test_there_is_a_worker_a_core_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert worker_count(toy_settings("train.device=cpu")) == 5
    assert worker_count(toy_settings("federation.workers=2")) == 2


def test_there_is_a_worker_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert worker_count(toy_settings()) == 4
    assert worker_count(toy_settings("train.device=cuda:2")) == 1
    # A device that is not there is noticed before anything else is done.
    with pytest.raises(ConfigError, match="sees 4 GPUs"):
        worker_count(toy_settings("train.device=cuda:7", "federation.workers=2"))
