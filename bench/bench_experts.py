"""The layer of experts against the dense FFN it came from and a loop over experts.

Run with ``pytest bench/bench_experts.py --benchmark-enable -s``. A pass is forward and
backward to the inputs, with frozen base weights; the layer's includes gate, visits and
dispatch. Outputs and gradients are compared with the reference before anything is timed.
Contenders take turns, and ``x_dense`` and ``x_loop`` are ratios of median times of the
same run. On a machine that is not quiet, ``SAMV2_BENCH_CPU=1`` counts CPU seconds of one
thread instead of time on the clock. With a GPU the same runs on it.

Shapes: T tokens, D model width, E experts, F rows an expert, Q surrogate rank, R adapter
rank, K visits a token.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samv2.experts.calibration import Gate
from samv2.experts.moe_layers import ExpertGraphMLP, FrozenFactors, WalkOptions
from samv2_kernels import ExpertWeights, Surrogates

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU_SECONDS = os.environ.get("SAMV2_BENCH_CPU") == "1"
EXPERTS, VISITS, SURROGATE_RANK, ADAPTER_RANK = 16, 2, 64, 8
NOISE = 0.02
"""By which medians of the same work differ."""
TOLERANCE = 0.03
"""Of bfloat16, as in the tests: largest error over the largest expected value."""


@dataclass(frozen=True)
class Shape:
    """An FFN, and how many tokens pass through it."""

    name: str
    model_width: int
    ffn_width: int
    tokens: int
    least: float
    """Times the dense FFN, without surrogates."""
    least_with_surrogates: float
    repeats: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-2-7b", 4096, 11_008, 512, 5.5, 4.5, 5),
        Shape("smollm2", 576, 1_536, 1_024, 4.0, 3.0, 25),
    )
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread where CPU seconds are counted: others would spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if CPU_SECONDS else before)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Problem:
    """A layer, its inputs and the gradient of its outputs."""

    layer: ExpertGraphMLP
    x_TD: Tensor
    grad_TD: Tensor

    @property
    def weights(self) -> ExpertWeights:
        return self.layer.blocks(self.layer.experts_per_token, self.x_TD.dtype)

    def finish(self, y_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Backward; the outputs and the inputs' gradient."""
        self.x_TD.grad = None
        y_TD.backward(self.grad_TD)
        return y_TD.detach(), self.x_TD.grad


def make(
    shape: Shape,
    *,
    tokens: int | None = None,
    visits: int = VISITS,
    surrogates: bool = False,
    adapters: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Random weights of the usual size; gate and adapters learn only with adapters."""
    source = torch.Generator().manual_seed(0)
    model, width = shape.model_width, shape.ffn_width // EXPERTS

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=source) * scale).to(DEVICE, dtype)

    blocks = [normal(EXPERTS, width, model, scale=model**-0.5) for _ in range(3)]
    rank = SURROGATE_RANK
    stand_ins = Surrogates(
        shared_QD=normal(rank, model, scale=model**-0.5),
        out_EQD=normal(EXPERTS, rank, model, scale=rank**-0.5),
        bias_ED=normal(EXPERTS, model),
    )
    layer = ExpertGraphMLP(
        layer=0,
        weights=ExpertWeights(gate_EFD=blocks[0], up_EFD=blocks[1], down_EFD=blocks[2]),
        gate=Gate(
            weight_ED=normal(EXPERTS, model, scale=model**-0.5),
            bias_E=torch.zeros(EXPERTS, device=DEVICE),
        ),
        surrogates=stand_ins if surrogates else None,
        factors=FrozenFactors(
            gate_RD=normal(ADAPTER_RANK, model, scale=model**-0.5),
            up_RD=normal(ADAPTER_RANK, model, scale=model**-0.5),
            down_DR=normal(model, ADAPTER_RANK, scale=ADAPTER_RANK**-0.5),
            scale=1.0,
        ),
        edge_mask_EE=torch.ones(EXPERTS, EXPERTS, dtype=torch.bool).triu(),
        order_E=torch.arange(EXPERTS),
        num_shared=0,
        experts_per_token=visits,
    ).to(DEVICE)
    if adapters:
        for name in ("gate_EFR", "up_EFR", "down_ERF"):
            rows = getattr(layer, f"adapter_{name}").data
            rows.copy_(0.1 * torch.randn(rows.shape, generator=source))
    else:
        layer.requires_grad_(False)
    count = tokens or shape.tokens
    x_TD = normal(count, model).requires_grad_()
    return Problem(layer, x_TD, normal(count, model))


def run_layer(problem: Problem) -> tuple[Tensor, Tensor]:
    y_BSD, _ = problem.layer(problem.x_TD.unsqueeze(0), WalkOptions())
    return problem.finish(y_BSD.squeeze(0))


def run_dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """The FFN in plain autograd."""
    weights = problem.weights
    gate, up, down = (part.flatten(0, 1) for part in weights.tensors)
    hidden_TM = F.silu(F.linear(problem.x_TD, gate)) * F.linear(problem.x_TD, up)
    return problem.finish(hidden_TM @ down)


def chosen(problem: Problem) -> Tensor:
    """(T, E) bool: what the layer visits."""
    layer = problem.layer
    return layer.visited(problem.x_TD.detach(), layer.experts_per_token)


def run_loop(problem: Problem) -> tuple[Tensor, Tensor]:
    """Expert by expert: index rows, FFN, add; base experts alone."""
    weights, x_TD = problem.weights, problem.x_TD
    visited_TE = chosen(problem)
    y_TD = torch.zeros_like(x_TD)
    for e in range(EXPERTS):
        token_n = visited_TE[:, e].nonzero().squeeze(1)
        x_nD = x_TD[token_n]
        hidden_nF = F.silu(x_nD @ weights.gate_EFD[e].T) * (x_nD @ weights.up_EFD[e].T)
        y_TD = y_TD.index_add(0, token_n, hidden_nF @ weights.down_EFD[e])
    return problem.finish(y_TD)


def expected(problem: Problem) -> tuple[Tensor, Tensor]:
    """The layer in float32, by the masked dense reference in plain autograd."""
    layer = copy.deepcopy(problem.layer).float()
    layer._groups = lambda x_TD, visits: False
    x_TD = problem.x_TD.detach().float().requires_grad_()
    return run_layer(Problem(layer, x_TD, problem.grad_TD.float()))


def check(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for name, one, other in zip(("outputs", "gradient of x"), found, wanted):
        error = float((one.float() - other.float()).abs().max() / other.abs().max())
        assert error < TOLERANCE, f"{name} are off by {error:.3g}"


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, taking turns; the first turn is not counted."""
    clock = time.process_time if CPU_SECONDS else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(clock() - begin)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def report(benchmark: Callable[..., object], **found: float) -> None:
    benchmark.extra_info.update(found)  # type: ignore[attr-defined]
    print("\n" + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("surrogates", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_two_of_sixteen_experts(
    benchmark: Callable[..., object], name: str, surrogates: bool, adapters: bool
) -> None:
    shape = SHAPES[name]
    problem = make(shape, surrogates=surrogates, adapters=adapters)
    check(run_layer(problem), expected(problem))
    runs = {"layer": run_layer, "dense": run_dense, "loop": run_loop}
    found = medians(
        {n: partial(run, problem) for n, run in runs.items()}, shape.repeats
    )
    x_dense = found["dense"] / found["layer"]
    report(
        benchmark,
        **found,
        x_dense=x_dense,
        x_loop=found["loop"] / found["layer"],
    )
    benchmark.pedantic(  # type: ignore[attr-defined]
        partial(run_layer, problem), rounds=shape.repeats
    )
    if DEVICE.type == "cpu" and not adapters:
        least = shape.least_with_surrogates if surrogates else shape.least
        assert x_dense >= least


@pytest.mark.parametrize("tokens", [16, 64, 256, 1024])
@pytest.mark.parametrize("name", SHAPES)
def test_never_slower_than_dense(
    benchmark: Callable[..., object], name: str, tokens: int
) -> None:
    """Every K below E, against one dense FFN; a figure a K."""
    shape = SHAPES[name]
    repeats = max(3, shape.repeats // 2)
    share: dict[str, float] = {}
    for visits in range(1, EXPERTS):
        problem = make(shape, tokens=tokens, visits=visits)
        runs = {
            "layer": partial(run_layer, problem),
            "dense": partial(run_dense, problem),
        }
        found = medians(runs, repeats)
        share[f"K{visits}"] = found["layer"] / found["dense"]
    report(benchmark, **share)
    benchmark.pedantic(  # type: ignore[attr-defined]
        partial(run_layer, problem), rounds=3
    )
    assert max(share.values()) <= 1 + NOISE
