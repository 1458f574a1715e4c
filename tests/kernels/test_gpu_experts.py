"""The Triton expert kernels, in the interpreter, against float64 written from the equations.

Every case checks the forward pass and all gradients. What kernels allocate is filled
with NaN first; tokens without visits and experts without tokens hold NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samv2_kernels import cpu, grouped_experts, sort_visits, tuned
from samv2_kernels.gpu.blocks import aligned
from samv2_kernels.gpu.configs import TABLE
from samv2_kernels.gpu.experts import expert_mlp_backward, expert_mlp_forward
from samv2_kernels.nf4 import dequantise, quantise
from samv2_kernels.nf4_layout import from_words, to_words
from samv2_kernels.nf4_nested import nested_values
from tests.helpers import generator, randn
from tests.kernels.guarded import guarded
from tests.kernels.interpreter import exact
from tests.kernels.test_grouped_mlp import make_problem

NAMES = ("x", "combine", "low gate", "low up", "gate", "up", "down", "low", "reached")
LARGEST = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Norm of the error over that of the result: float32 sums in another order; bfloat16
rounds inputs of products, hidden units and results, 1.7e-3 each."""


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with exact():
        yield


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of the op."""

    x_TD: Tensor
    ids_TK: Tensor
    combine_TK: Tensor
    weights: list[Tensor]
    meaning: list[Tensor]
    """The three matrices that the weights stand for, float64."""
    base_E: Tensor | None
    rank: tuple[Tensor | None, ...]
    """low_gate_TR, low_up_TR, gate_EFR, up_EFR, down_ERF."""
    stand_in: tuple[Tensor | None, ...]
    """low_TQ, out_EQD, reached_TK."""
    experts: int

    @property
    def width(self) -> int:
        return self.meaning[0].shape[1]

    def arguments(self) -> list[Any]:
        order = sort_visits(self.ids_TK, self.experts)
        return [
            self.x_TD,
            self.combine_TK,
            order.order_N,
            order.offsets,
            self.weights,
            self.width,
            self.base_E,
            *self.rank,
            *self.stand_in,
        ]

    def order_N(self) -> Tensor:
        return sort_visits(self.ids_TK, self.experts).order_N.long()


def make(
    tokens: int,
    experts: int,
    k: int,
    *,
    kind: str = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    model: int = 128,
    width: int = 40,
    rank: int = 3,
    stand_in: int = 5,
    shared_blocks: bool = False,
    ids_TK: Tensor | None = None,
    scale: float = 1.0,
) -> Problem:
    """Random visits of which some slots are unused; every tensor has its own seed."""
    if ids_TK is None:
        order = torch.rand((tokens, experts), generator=generator(0)).argsort(dim=1)
        ids_TK = order[:, :k].clone()
        ids_TK[torch.rand((tokens, k), generator=generator(1)) < 0.15] = -1
    blocks = max(1, experts // 2) if shared_blocks else experts
    meaning = [scale * 0.1 * randn(blocks, width, model, seed=2 + i) for i in range(3)]
    if kind == "float":
        weights = [each.to(dtype) for each in meaning]
        meaning = [each.double() for each in weights]
    else:
        words = [to_words(quantise(each), nested=kind == "nested") for each in meaning]
        meaning = [
            dequantise(from_words(each), torch.float32).double() for each in words
        ]
        weights = [each.words_BFW for each in words]
        weights += [each.absmax_BFA for each in words]
        if kind == "nested":
            weights += [each.nested.second_ES for each in words]
            weights += [each.nested.offset_E for each in words]
            weights.append(nested_values())
    x_TD = randn(tokens, model, seed=6, dtype=dtype)
    x_TD[(ids_TK < 0).all(dim=1)] = torch.nan
    lows = [randn(tokens, rank, seed=7 + i, dtype=dtype) for i in range(2)]
    banks = [0.2 * randn(experts, width, rank, seed=9 + i) for i in range(2)]
    banks.append(0.2 * randn(experts, rank, width, seed=11))
    return Problem(
        x_TD=x_TD,
        ids_TK=ids_TK,
        combine_TK=randn(tokens, k, seed=12),
        weights=weights,
        meaning=meaning,
        base_E=torch.arange(experts) % blocks if shared_blocks else None,
        rank=(*lows, *(bank.to(dtype) for bank in banks)) if rank else (None,) * 5,
        stand_in=(
            (
                randn(tokens, stand_in, seed=13, dtype=dtype),
                (0.3 * randn(experts, stand_in, model, seed=14)).to(dtype),
                (randn(tokens, k, seed=15) > -1).float(),
            )
            if stand_in
            else (None,) * 3
        ),
        experts=experts,
    )


def expected(problem: Problem, dy_TD: Tensor, dl_TR: Tensor) -> dict[str, Any]:
    """Results and gradients in float64, visit by visit, with autograd."""
    leaves = [problem.x_TD.nan_to_num(), problem.combine_TK]
    leaves += [*problem.rank, problem.stand_in[0], problem.stand_in[2]]
    doubles = [None if leaf is None else leaf.double() for leaf in leaves]
    for leaf in doubles:
        if leaf is not None:
            leaf.requires_grad_()
    x_TD, combine_TK, low_gate, low_up, gate_EFR, up_EFR, down_ERF, low, reached = (
        doubles
    )
    gate_BFD, up_BFD, down_BFD = problem.meaning
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    l_TR = torch.zeros(dl_TR.shape, dtype=torch.float64)
    slots = problem.ids_TK.shape[1]
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for t, row in enumerate(problem.ids_TK.tolist()):
        for s, e in enumerate(row):
            if e < 0:
                continue
            b = e if problem.base_E is None else int(problem.base_E[e])
            gate, up = gate_BFD[b] @ x_TD[t], up_BFD[b] @ x_TD[t]
            if low_gate is not None:
                gate = gate + gate_EFR[e] @ low_gate[t]
                up = up + up_EFR[e] @ low_up[t]
            kept[t * slots + s] = (gate.detach(), up.detach())
            hidden = F.silu(gate) * up
            hidden = combine_TK[t, s] * hidden
            y_TD[t] += hidden @ down_BFD[b]
            if down_ERF is not None:
                l_TR[t] += down_ERF[e] @ hidden
            if low is not None:
                y_TD[t] -= reached[t, s] * low[t] @ problem.stand_in[1][e].double()
    found: dict[str, Any] = {"y": y_TD.detach(), "l": l_TR.detach(), "kept": kept}
    loss = (y_TD * dy_TD.double()).sum() + (l_TR * dl_TR.double()).sum()
    wanted = [leaf for leaf in doubles if leaf is not None]
    if loss.requires_grad:
        grads = list(torch.autograd.grad(loss, wanted, allow_unused=True))
    else:
        grads = [None] * len(wanted)
    for name, leaf in zip(NAMES, doubles):
        if leaf is not None:
            grad = grads.pop(0)
            found[name] = torch.zeros_like(leaf) if grad is None else grad
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what is wanted."""
    gap = float((found.double() - wanted).norm())
    return gap / max(float(wanted.norm()), 1e-30) if gap else 0.0


def check(problem: Problem) -> None:
    """Forward and backward against float64."""
    tokens, rank = len(problem.x_TD), 0 if problem.rank[0] is None else 3
    dy_TD, dl_TR = randn(tokens, problem.x_TD.shape[1], seed=20), randn(
        tokens, rank, seed=21
    )
    wanted = expected(problem, dy_TD, dl_TR)
    # Of a single row, a sum of 40 terms may be a fraction of their size.
    most = LARGEST[problem.x_TD.dtype] * (1 if tokens > 1 else 8)
    with guarded(-7):
        y_TD, l_TR, gate_NF, up_NF = expert_mlp_forward(*problem.arguments(), True)
    assert y_TD.dtype == l_TR.dtype == torch.float32
    assert error(y_TD, wanted["y"]) <= most and error(l_TR, wanted["l"]) <= most
    used = [n for n, v in enumerate(problem.order_N().tolist()) if v in wanted["kept"]]
    for found, which in ((gate_NF, 0), (up_NF, 1)):
        kept = [wanted["kept"][int(problem.order_N()[n])][which] for n in used]
        assert not used or error(found[used], torch.stack(kept)) <= most
    # What no kernel wrote belongs to unused visits and may hold anything.
    with guarded(-7):
        grads = expert_mlp_backward(dy_TD, dl_TR, *problem.arguments(), gate_NF, up_NF)
    for name, grad in zip(NAMES, grads):
        if name not in wanted:
            assert grad.numel() == 0, name
            continue
        assert grad.shape == wanted[name].shape, name
        assert error(grad, wanted[name]) <= most, name


CASES = [
    (0, 16, 2),
    (1, 1, 1),
    (1, 16, 4),
    (15, 16, 3),
    (16, 4, 2),
    (17, 65, 2),
    (63, 16, 2),
    (64, 64, 1),
    (65, 3, 3),
]
"""(T, E, K): ragged numbers of rows, many empty experts, one expert, all experts."""


@pytest.mark.parametrize("tokens, experts, k", CASES)
def test_nf4_forward_and_gradients(tokens: int, experts: int, k: int) -> None:
    check(make(tokens, experts, k))


@pytest.mark.parametrize("tokens, experts, k", CASES[1::2])
def test_bfloat16_forward_and_gradients(tokens: int, experts: int, k: int) -> None:
    check(make(tokens, experts, k, kind="float"))


@pytest.mark.parametrize("tokens, experts, k", [CASES[1], *CASES[::2]])
def test_float32_forward_and_gradients(tokens: int, experts: int, k: int) -> None:
    check(make(tokens, experts, k, kind="float", dtype=torch.float32))


@pytest.mark.parametrize("kind", ["nf4", "float"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"stand_in": 0},
        {"rank": 0, "stand_in": 0},
        {"shared_blocks": True},
        {"model": 64, "width": 96},
        {"model": 192, "width": 65},
        {"width": 1},
    ],
    ids=str,
)
def test_every_combination_of_parts(kind: str, options: dict[str, Any]) -> None:
    check(make(19, 4, 2, kind=kind, **options))


@pytest.mark.parametrize("tokens", [5, 70])
def test_nested_magnitudes(tokens: int) -> None:
    check(make(tokens, 3, 2, kind="nested", model=192, width=96))


def test_a_model_width_that_is_no_multiple_of_anything() -> None:
    check(make(9, 3, 2, kind="float", dtype=torch.float32, model=37, width=11))


@pytest.mark.parametrize("kind", ["nf4", "float"])
def test_all_tokens_on_one_expert(kind: str) -> None:
    ids_TK = torch.full((37, 2), -1)
    ids_TK[:, 1] = 2
    check(make(37, 5, 2, kind=kind, ids_TK=ids_TK))


@pytest.mark.parametrize("kernel, kind", list(TABLE), ids="-".join)
def test_every_shipped_configuration(kernel: str, kind: str) -> None:
    """Whatever the rule chooses: each tile of the table gives the right result."""
    problem_kind = "nf4" if kernel in ("project", "adapter_grad") else kind
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    problem_kind = problem_kind.removesuffix("32")
    for config in TABLE[kernel, kind]:
        chosen = {
            "rows": config.rows,
            "columns": config.columns,
            "step": config.step,
            "warps": config.warps,
            "stages": config.stages,
        }
        with tuned.forced(kernel, chosen):
            check(make(21, 2, 2, kind=problem_kind, dtype=dtype))
            check(make(150, 1, 1, kind=problem_kind, dtype=dtype, width=33, model=64))


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e9])
def test_gradients_of_any_size_keep_their_accuracy(size: float) -> None:
    """Rows are divided by powers of two, so scaling by one changes no bit."""
    problem = make(18, 3, 2)
    y_TD, l_TR, gate_NF, up_NF = expert_mlp_forward(*problem.arguments(), True)
    power = 2.0 ** round(torch.log2(torch.tensor(size)).item())
    dy_TD = randn(*y_TD.shape, seed=20)
    plain = expert_mlp_backward(dy_TD, 0 * l_TR, *problem.arguments(), gate_NF, up_NF)
    scaled = expert_mlp_backward(
        power * dy_TD, 0 * l_TR, *problem.arguments(), gate_NF, up_NF
    )
    for name, small, large in zip(NAMES, plain, scaled):
        assert torch.equal(power * small, large), name


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_combine_weights_of_any_size_keep_the_accuracy(size: float) -> None:
    problem = make(18, 3, 2, stand_in=0)
    check(replace(problem, combine_TK=size * problem.combine_TK))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_shows(value: float) -> None:
    """In its row, and in no other."""
    ids_TK = torch.arange(30).unsqueeze(1) % 2
    problem = make(30, 2, 1, rank=0, stand_in=0, width=8, ids_TK=ids_TK)
    y_TD, l_TR, gate_NF, up_NF = expert_mlp_forward(*problem.arguments(), True)
    dy_TD = torch.ones_like(y_TD)
    dy_TD[::3, 3] = value
    dx_TD = expert_mlp_backward(dy_TD, l_TR, *problem.arguments(), gate_NF, up_NF)[0]
    whole = torch.arange(30) % 3 != 0
    assert dx_TD[whole].isfinite().all()
    assert not dx_TD[~whole].isfinite().all(dim=1).any()


def test_an_input_that_is_not_finite_shows() -> None:
    problem = make(6, 2, 1, rank=0, stand_in=0, ids_TK=torch.zeros(6, 1).long())
    problem.x_TD[2, 5] = torch.inf
    y_TD = expert_mlp_forward(*problem.arguments(), False)[0]
    assert not y_TD[2].isfinite().any() and y_TD[[0, 1, 3, 4, 5]].isfinite().all()


def strided(tensor: Tensor | None) -> Tensor | None:
    """The same values, transposed in memory."""
    if tensor is None or tensor.dim() < 2:
        return tensor
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("kind", ["nf4", "float"])
def test_strides_do_not_matter(kind: str) -> None:
    problem = make(11, 3, 2, kind=kind)
    other = replace(
        problem,
        x_TD=strided(problem.x_TD),
        combine_TK=strided(problem.combine_TK),
        weights=[strided(each) for each in problem.weights],
        rank=tuple(map(strided, problem.rank)),
        stand_in=tuple(map(strided, problem.stand_in)),
    )
    dy_TD, dl_TR = randn(11, 128, seed=20), randn(11, 3, seed=21)
    outcomes = []
    for each, dy, dl in (
        (problem, dy_TD, dl_TR),
        (other, strided(dy_TD), strided(dl_TR)),
    ):
        found = expert_mlp_forward(*each.arguments(), True)
        grads = expert_mlp_backward(dy, dl, *each.arguments(), *found[2:])
        assert all(grad.is_contiguous() for grad in grads)
        used = slice(0, int((problem.ids_TK >= 0).sum()))
        outcomes.append((*found[:2], found[2][used], found[3][used], *grads))
    for one, two in zip(*outcomes):
        assert torch.equal(one, two)


def test_an_expanded_gradient_is_read_as_what_it_stands_for() -> None:
    problem = make(7, 2, 1, kind="float", dtype=torch.float32)
    y_TD, l_TR, gate_NF, up_NF = expert_mlp_forward(*problem.arguments(), True)
    one, zero = torch.ones(1, 1), torch.zeros_like(l_TR)
    outcomes = [
        expert_mlp_backward(dy_TD, zero, *problem.arguments(), gate_NF, up_NF)
        for dy_TD in (one.expand(7, 128), torch.ones(7, 128))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("surrogates", [False, True])
@pytest.mark.parametrize("chains", [False, True])
def test_through_the_op_and_autograd(
    adapters: bool, surrogates: bool, chains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With these kernels as the op's, the public function gives what the CPU gives."""
    monkeypatch.setattr(cpu, "is_plain_eager", lambda _: False)
    monkeypatch.setattr(cpu, "expert_mlp_forward", expert_mlp_forward)
    monkeypatch.setattr(cpu, "expert_mlp_backward", expert_mlp_backward)
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64:
            monkeypatch.undo()
        problem = make_problem(
            9,
            4,
            2,
            width=5,
            model=32,
            adapters=adapters,
            surrogates=surrogates,
            chains=chains,
            dtype=dtype,
        )
        frozen = (problem.weights, problem.surrogates)
        for part in frozen:
            for field in () if part is None else fields(part):
                tensor = getattr(part, field.name)
                if tensor is not None:
                    tensor.requires_grad_(False)
        y_TD = grouped_experts(
            problem.x_TD,
            problem.walked,
            problem.combine_TE,
            problem.weights,
            edge_strength_EE=problem.edge_strength_EE,
            **problem.arguments(),
        )
        leaves = problem.leaves()
        loss = (y_TD * y_TD.detach()).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found = {"y": y_TD.detach(), **dict(zip(leaves, grads))}
        outcomes.append({n: value for n, value in found.items() if value is not None})
    single, double = outcomes
    assert single.keys() == double.keys() and {"x", "combine"} < single.keys()
    for name, found in single.items():
        assert error(found, double[name]) < 1e-5, name


@pytest.mark.parametrize("kind", ["nf4", "float"])
def test_results_do_not_depend_on_the_other_rows(kind: str) -> None:
    """Permuting tokens permutes the bits; half a batch gives half the bits."""
    problem = make(34, 3, 2, kind=kind)

    def run(rows: Tensor) -> list[Tensor]:
        part = replace(
            problem,
            x_TD=problem.x_TD[rows],
            ids_TK=problem.ids_TK[rows],
            combine_TK=problem.combine_TK[rows],
            rank=(*(low[rows] for low in problem.rank[:2]), *problem.rank[2:]),
            stand_in=(
                problem.stand_in[0][rows],
                problem.stand_in[1],
                problem.stand_in[2][rows],
            ),
        )
        y_TD, l_TR, gate_NF, up_NF = expert_mlp_forward(*part.arguments(), True)
        dy_TD, dl_TR = randn(*y_TD.shape[:0], 34, 128, seed=3)[rows], l_TR
        grads = expert_mlp_backward(dy_TD, dl_TR, *part.arguments(), gate_NF, up_NF)
        return [y_TD, l_TR, *grads[:4], *grads[7:]]

    smallest = {
        kernel: TABLE[kernel, which][0]
        for kernel, which in TABLE
        if which == (kind if (kernel, kind) in TABLE else "float")
    }
    whole, order = torch.arange(34), torch.randperm(34, generator=generator(5))
    with _configured(smallest):
        plain, again = run(whole), run(whole)
        shuffled, half = run(order), run(whole[:11])
    for one, two, three, four in zip(plain, again, shuffled, half):
        assert torch.equal(one, two)
        assert torch.equal(one[order], three)
        assert torch.equal(one[:11], four)


def _configured(table: dict[str, Any]) -> Any:
    from contextlib import ExitStack
    from dataclasses import asdict

    stack = ExitStack()
    for kernel, config in table.items():
        stack.enter_context(tuned.forced(kernel, asdict(config)))
    return stack


def test_nf4_loses_little_more_than_dequantising_first() -> None:
    """At most 1.1 of the error of bfloat16 weights, at every stage, measured here."""
    problem = make(48, 2, 2, model=256, width=128)
    assert (problem.ids_TK < 0).any()
    tokens = 48
    dy_TD, dl_TR = randn(tokens, 256, seed=20), randn(tokens, 3, seed=21)
    wanted = expected(problem, dy_TD, dl_TR)
    plain = replace(problem, weights=[each.bfloat16() for each in problem.meaning])
    errors = []
    for each in (problem, plain):
        y_TD, l_TR, gate_NF, up_NF = expert_mlp_forward(*each.arguments(), True)
        grads = expert_mlp_backward(dy_TD, dl_TR, *each.arguments(), gate_NF, up_NF)
        found = {"y": y_TD.bfloat16(), "l": l_TR.bfloat16()}
        found |= dict(zip(NAMES, grads))
        errors.append({name: error(found[name], wanted[name]) for name in found})
    for name in ("y", "l", *NAMES[:7]):
        assert 0 < errors[0][name] <= 1.1 * errors[1][name], (name, errors)


def test_blocks_beyond_two_to_the_31_elements() -> None:
    """The last of a million blocks; memory that is not touched is not taken."""
    blocks, width, model = 2**31 // (32 * 64) + 2, 32, 64
    last = make(3, 1, 1, kind="float", model=model, width=width, rank=0, stand_in=0)
    stored = torch.empty((blocks, width, model), dtype=torch.bfloat16)
    stored[-1] = last.weights[0][0]
    last = replace(last, weights=[last.weights[0]] * 3)
    far = replace(last, weights=[stored] * 3, base_E=torch.tensor([blocks - 1]))
    dy_TD = randn(3, model, seed=1)
    outcomes = []
    for each in (last, far):
        y_TD, l_TR, gate_NF, up_NF = expert_mlp_forward(*each.arguments(), True)
        grads = expert_mlp_backward(dy_TD, l_TR, *each.arguments(), gate_NF, up_NF)
        outcomes.append((y_TD, grads[0], grads[1]))
    for near, distant in zip(*outcomes):
        assert near.any() and torch.equal(near, distant)


def test_what_cannot_be_multiplied_is_refused() -> None:
    problem = make(4, 2, 1)
    wrong = problem.arguments()
    wrong[0] = wrong[0].float()
    with pytest.raises(ValueError, match="float32; NF4 kernels multiply bfloat16"):
        expert_mlp_forward(*wrong, False)
    wrong = problem.arguments()
    wrong[4] = wrong[4][:4]
    with pytest.raises(ValueError, match="got 4 weight tensors"):
        expert_mlp_forward(*wrong, False)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    packed = [quantise(randn(2, 6, 96, seed=i)) for i in range(3)]
    weights = [each.codes_EH for each in packed] + [each.absmax_EN for each in packed]
    problem = make(4, 2, 1, rank=0, stand_in=0, width=6)
    narrow = replace(problem, x_TD=problem.x_TD[:, :96], weights=weights)
    with pytest.raises(ValueError, match="width is 96; NF4 kernels need a multiple"):
        expert_mlp_forward(*narrow.arguments(), False)
    other = replace(problem, weights=make(4, 2, 1, width=8).weights)
    with pytest.raises(ValueError, match="a block has 1024 codes"):
        expert_mlp_forward(*other.arguments(), False)


def test_weights_at_odd_addresses_are_moved() -> None:
    """16-byte loads need addresses that are multiples of 16."""
    problem = make(6, 2, 1, kind="float", rank=0, stand_in=0)
    shifted = []
    for each in problem.weights:
        store = torch.empty(each.numel() + 1, dtype=each.dtype)
        view = store[1:].view(each.shape).copy_(each)
        assert view.data_ptr() % 16
        shifted.append(view)
    assert all(aligned(each).data_ptr() % 16 == 0 for each in shifted)
    assert aligned(problem.weights[0]) is problem.weights[0]
    moved = replace(problem, weights=shifted)
    outcomes = [expert_mlp_forward(*p.arguments(), False)[0] for p in (problem, moved)]
    assert torch.equal(*outcomes)


def test_bytes_of_bitsandbytes_are_taken_too() -> None:
    problem = make(6, 2, 1)
    y_TD = expert_mlp_forward(*problem.arguments(), False)[0]
    matrices = [quantise(0.1 * randn(2, 40, 128, seed=2 + i)) for i in range(3)]
    weights = [each.codes_EH for each in matrices]
    weights += [each.absmax_EN for each in matrices]
    other = replace(problem, weights=weights)
    assert torch.equal(expert_mlp_forward(*other.arguments(), False)[0], y_TD)
