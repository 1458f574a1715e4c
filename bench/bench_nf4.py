"""NF4 experts against bitsandbytes' own linear layers on the rows that they touch.

Run with ``pytest bench/bench_nf4.py --benchmark-enable -s``. Two of sixteen experts of
Llama-2-7B's FFN run forward, on weights in NF4, and bitsandbytes runs the linear layers
of the touched experts on the same rows: each projection by itself, gate and up side by
side, and each of these in training and in evaluation mode; of these forms the fastest
that runs at all is the baseline. Both sides are compared with the unpacked weights
first. ``peak`` is the largest memory that unpacked weights held at a time, in bfloat16
experts. On a machine that is not quiet, ``SAMV2_BENCH_CPU=1`` counts CPU seconds of one
thread instead of time on the clock. With a GPU the same runs on it.

Shapes: T tokens, D model width, E experts, F rows an expert, K visits a token, n rows of
one expert.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.bench_experts import CPU_SECONDS, DEVICE, TOLERANCE, medians, report
from samv2_kernels import (
    DecodingWeights,
    Nf4Weights,
    Visits,
    can_decode,
    for_decoding,
    grouped_experts,
    visit,
)
from samv2_kernels.cpu import blocks as cpu_blocks
from samv2_kernels.nf4 import quantise

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes as bnb  # noqa: E402

WIDTH, ROWS, EXPERTS, VISITS = 4_096, 688, 16, 2
REPEATS = 15


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if CPU_SECONDS else before)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def blocks() -> list[Tensor]:
    """Gate, up and transposed down projection, (E, F, D) bfloat16."""
    source = torch.Generator().manual_seed(0)
    shape = (EXPERTS, ROWS, WIDTH)
    return [
        (torch.randn(shape, generator=source) * WIDTH**-0.5).bfloat16()
        for _ in range(3)
    ]


@pytest.fixture(scope="module")
def packed(blocks: list[Tensor]) -> Nf4Weights:
    gate, up, down = (quantise(block.to(DEVICE)) for block in blocks)
    return Nf4Weights(gate=gate, up=up, down=down)


def inputs(tokens: int) -> tuple[Tensor, Visits]:
    source = torch.Generator().manual_seed(1)
    x_TD = torch.randn(tokens, WIDTH, generator=source).bfloat16().to(DEVICE)
    scores_TE = torch.randn(tokens, EXPERTS, generator=source).to(DEVICE)
    mask_MEE = torch.ones(1, EXPERTS, EXPERTS, dtype=torch.bool, device=DEVICE).triu()
    return x_TD, visit(scores_TE, mask_MEE, experts_per_token=VISITS)


def linear(weight_OI: Tensor, training: bool) -> nn.Module:
    """bitsandbytes' NF4 layer, quantised by itself."""
    layer = bnb.nn.Linear4bit(
        weight_OI.shape[1],
        weight_OI.shape[0],
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=False,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        weight_OI.contiguous(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
    )
    return layer.to(DEVICE).train(training)


def runs_at_all(layer: nn.Module) -> bool:
    try:
        layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16, device=DEVICE))
    except (AssertionError, RuntimeError):
        return False  # Evaluation mode repacks, which some widths do not allow.
    return True


def forms(make: Callable[[bool], list[nn.Module]]) -> dict[str, list[nn.Module]]:
    """In either mode, if every expert's layer runs."""
    found = {"train": make(True), "eval": make(False)}
    return {mode: made for mode, made in found.items() if all(map(runs_at_all, made))}


@torch.no_grad()
def bitsandbytes_halves(
    blocks: list[Tensor], rows: list[tuple[int, Tensor]]
) -> dict[str, Callable[[], None]]:
    """Every form of the two halves, the SwiGLU in the first."""
    experts = [e for e, _ in rows]
    gate, up, down = blocks
    enter = {
        **{
            f"side by side, {mode}": made
            for mode, made in forms(
                lambda training: [
                    linear(torch.cat([gate[e], up[e]]), training) for e in experts
                ]
            ).items()
        },
        **{
            f"apart, {mode}": made
            for mode, made in forms(
                lambda training: [
                    linear(part[e], training) for e in experts for part in (gate, up)
                ]
            ).items()
        },
    }
    leave = forms(lambda training: [linear(down[e].T, training) for e in experts])
    hidden = [F.silu(x_nD @ gate[e].T) * (x_nD @ up[e].T) for e, x_nD in rows]

    def run_enter(layers: list[nn.Module]) -> None:
        each = len(layers) // len(rows)
        for at, (_, x_nD) in enumerate(rows):
            parts = [layer(x_nD) for layer in layers[at * each : (at + 1) * each]]
            gate_nF, up_nF = parts if each == 2 else parts[0].chunk(2, dim=1)
            F.silu(gate_nF) * up_nF

    def run_leave(layers: list[nn.Module]) -> None:
        for layer, hidden_nF in zip(layers, hidden):
            layer(hidden_nF)

    return {
        **{f"enter {n}": partial(run_enter, made) for n, made in enter.items()},
        **{f"leave {n}": partial(run_leave, made) for n, made in leave.items()},
    }


@torch.no_grad()
def run(x_TD: Tensor, visits: Visits, weights: Nf4Weights | DecodingWeights) -> Tensor:
    return grouped_experts(
        x_TD, visits, visits.reached_TE, weights, experts_per_token=VISITS
    )


def check(found_TD: Tensor, x_TD: Tensor, visits: Visits, packed: Nf4Weights) -> None:
    unpacked = packed.unpack(torch.float32)
    wanted_TD = grouped_experts(
        x_TD.float(), visits, visits.reached_TE, unpacked, experts_per_token=VISITS
    )
    error = float((found_TD - wanted_TD).abs().max() / wanted_TD.abs().max())
    assert error < TOLERANCE, f"outputs are off by {error:.3g}"


@pytest.mark.parametrize("tokens", [1, 64])
def test_touched_experts(
    benchmark: Callable[..., object],
    blocks: list[Tensor],
    packed: Nf4Weights,
    tokens: int,
) -> None:
    x_TD, visits = inputs(tokens)
    forms_of_ours: dict[str, Nf4Weights | DecodingWeights] = {"nf4": packed}
    if DEVICE.type == "cpu" and can_decode(ROWS, WIDTH):
        forms_of_ours["decoding"] = for_decoding(packed)
    for weights in forms_of_ours.values():
        check(run(x_TD, visits, weights), x_TD, visits, packed)
    visited_TE = visits.visited_TE
    rows = [
        (e, x_TD[visited_TE[:, e]].contiguous())
        for e in range(EXPERTS)
        if bool(visited_TE[:, e].any())
    ]
    halves = bitsandbytes_halves([block.to(DEVICE) for block in blocks], rows)
    ours = {n: partial(run, x_TD, visits, w) for n, w in forms_of_ours.items()}
    with torch.no_grad():
        seconds = medians(halves | ours, REPEATS)
    enter, leave = (
        min((n for n in halves if n.startswith(half)), key=seconds.__getitem__)
        for half in ("enter", "leave")
    )
    baseline = seconds[enter] + seconds[leave]
    print(f"\n{len(rows)} experts touched; {enter}; {leave}")
    found = {f"x_{name}": baseline / seconds[name] for name in ours}
    report(
        benchmark,
        their_enter=seconds[enter],
        their_leave=seconds[leave],
        **{name: seconds[name] for name in ours},
        **found,
    )
    benchmark.pedantic(  # type: ignore[attr-defined]
        partial(run, x_TD, visits, list(forms_of_ours.values())[-1]), rounds=REPEATS
    )
    assert max(found.values()) >= 1.0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of the CPU kernels")
def test_no_more_than_the_touched_expert_is_unpacked(
    benchmark: Callable[..., object],
    packed: Nf4Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes of unpacked parts that are alive at once, in experts."""
    alive: dict[int, int] = {}
    peak = 0
    original = cpu_blocks.unpack

    def watched(*arguments: object) -> Tensor:
        nonlocal peak
        weights = original(*arguments)
        storage = weights.untyped_storage()
        alive[id(storage)] = storage.nbytes()
        weakref.finalize(storage, alive.pop, id(storage))
        peak = max(peak, sum(alive.values()))
        return weights

    monkeypatch.setattr(cpu_blocks, "unpack", watched)
    x_TD, visits = inputs(64)
    benchmark.pedantic(  # type: ignore[attr-defined]
        partial(run, x_TD, visits, packed), rounds=1
    )
    share = peak / (3 * ROWS * WIDTH * x_TD.element_size())
    report(benchmark, peak=share)
    assert 0 < share <= 1.0
