"""Expert layers at real shapes: what the tuner times and the roofline script reports.

Cases are found, not listed: every workload runs once while the kernels' own look-ups of
their configurations are recorded, so that a new kernel or key needs no change here. A
candidate is timed within its whole workload, whose other kernels stay as they are.

Shapes: T tokens, D model width, E experts, F rows an expert, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

import samv2_kernels as kernels
from samv2_kernels import tuned
from samv2_kernels.nf4 import quantise
from samv2_kernels.nf4_layout import to_words
from samv2_kernels.tune import Case

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
FORMS = ("bf16", "nf4")
RANK = 16

Weights = kernels.ExpertWeights | kernels.Nf4Weights | kernels.WordWeights


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One FFN layer, split into experts."""

    name: str
    model_width: int
    ffn_width: int
    """Of the dense layer."""
    num_experts: int
    experts_per_token: int = 2

    @property
    def expert_rows(self) -> int:
        """F."""
        return self.ffn_width // self.num_experts


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="SmolLM2-135M", model_width=576, ffn_width=1536, num_experts=8),
        Shape(name="Llama-2-7B", model_width=4096, ffn_width=11008, num_experts=16),
    )
}


@dataclass(frozen=True)
class Layer:
    """Weights and adapters of one shape."""

    weights: Weights
    plain: kernels.ExpertWeights
    """The same weights in bfloat16, for the reference."""
    adapters: kernels.ExpertAdapters


@dataclass(frozen=True)
class Batch:
    """Inputs of one token count."""

    x_TD: Tensor
    walked: kernels.Visits
    combine_TE: Tensor
    experts_touched: int


def normal(*shape: int, seed: int, device: str, scale: float = 1.0) -> Tensor:
    """bfloat16 normal numbers."""
    source = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=source, device=device) * scale
    return values.to(torch.bfloat16)


@lru_cache(maxsize=2)
def layer(shape: Shape, form: str, device: str = "cuda") -> Layer:
    """A layer of random weights, in ``bf16`` or ``nf4``."""
    size = (shape.num_experts, shape.expert_rows, shape.model_width)
    scale = shape.model_width**-0.5
    gate, up, down = (
        normal(*size, seed=seed, device=device, scale=scale) for seed in range(3)
    )
    plain = kernels.ExpertWeights(gate_EFD=gate, up_EFD=up, down_EFD=down)
    weights: Weights = plain
    if form == "nf4":
        packed = kernels.Nf4Weights(
            gate=quantise(gate), up=quantise(up), down=quantise(down)
        )
        plain, weights = packed.unpack(torch.bfloat16), packed
        if device != "cpu":
            parts = map(to_words, (packed.gate, packed.up, packed.down))
            gate_words, up_words, down_words = parts
            weights = kernels.WordWeights(gate=gate_words, up=up_words, down=down_words)
    return Layer(weights, plain, adapters(shape, device))


def adapters(shape: Shape, device: str) -> kernels.ExpertAdapters:
    """Trainable adapter rows of rank :data:`RANK`."""
    experts, rows, width = shape.num_experts, shape.expert_rows, shape.model_width

    def rows_of(*size: int, seed: int) -> Tensor:
        return normal(*size, seed=seed, device=device, scale=0.01).requires_grad_()

    return kernels.ExpertAdapters(
        shared_gate_RD=normal(RANK, width, seed=3, device=device, scale=width**-0.5),
        shared_up_RD=normal(RANK, width, seed=4, device=device, scale=width**-0.5),
        shared_down_DR=normal(width, RANK, seed=5, device=device, scale=RANK**-0.5),
        gate_EFR=rows_of(experts, rows, RANK, seed=6),
        up_EFR=rows_of(experts, rows, RANK, seed=7),
        down_ERF=rows_of(experts, RANK, rows, seed=8),
        scale=1.0,
    )


def batch(shape: Shape, tokens: int, device: str = "cuda") -> Batch:
    """Random inputs, routed by random scores on the complete graph."""
    source = torch.Generator(device).manual_seed(9)
    size = (tokens, shape.num_experts)
    scores_TE = torch.randn(size, generator=source, device=device)
    mask_EE = torch.ones(size[1], size[1], device=device, dtype=torch.bool).triu()
    walked = kernels.walk(
        scores_TE, mask_EE[None], experts_per_token=shape.experts_per_token
    )
    return Batch(
        x_TD=normal(tokens, shape.model_width, seed=10, device=device),
        walked=walked,
        combine_TE=torch.ones(size, device=device),
        experts_touched=int(walked.visited_TE.any(dim=0).sum()),
    )


def forward(found: Layer, given: Batch) -> Tensor:
    """(T, D) output of the layer."""
    return kernels.grouped_experts(
        given.x_TD,
        given.walked,
        given.combine_TE,
        found.weights,
        adapters=found.adapters,
    )


def train_step(found: Layer, given: Batch, grad_TD: Tensor) -> None:
    """Forward and the gradients of inputs and adapter rows."""
    rows = found.adapters
    wanted = [given.x_TD, rows.gate_EFR, rows.up_EFR, rows.down_ERF]
    torch.autograd.grad(forward(found, given), wanted, grad_TD)


@dataclass(frozen=True)
class Workload:
    """A forward and backward pass of one layer."""

    shape: Shape
    form: str
    tokens: int
    device: str = "cuda"

    def prepare(self) -> Callable[[], None]:
        """Makes weights and inputs; returns what runs the passes on them."""
        given = batch(self.shape, self.tokens, self.device)
        given.x_TD.requires_grad_()
        found = layer(self.shape, self.form, self.device)
        return partial(train_step, found, given, torch.randn_like(given.x_TD))


def workloads() -> list[Workload]:
    """Every shape, form and token count."""
    return [
        Workload(shape, form, tokens)
        for shape in SHAPES.values()
        for form in FORMS
        for tokens in TOKENS
    ]


def cases(wanted: Sequence[Workload] | None = None) -> list[Case]:
    """One case for every kernel and key that a workload looks up, in order, each once.

    Args:
        wanted: what to run; default: :func:`workloads`, which needs a GPU.
    """
    found: list[Case] = []
    for workload in workloads() if wanted is None else wanted:
        run = workload.prepare()
        with tuned.recorded() as asked:
            run()
        for kernel, key in asked:
            if not any(kernel == case.kernel and key == case.key for case in found):
                found.append(Case(kernel=kernel, key=key, prepare=workload.prepare))
    return found
