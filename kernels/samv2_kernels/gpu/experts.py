"""The expert op on a GPU: launches of the Triton kernels, forward and backward.

Nothing is read back from the device and grids depend on shapes alone, so a call can be
captured in a CUDA graph. Rows stay where they are: kernels read them through the visit
order, and add their results to the tokens, slot after slot.

Shapes: T tokens, D model width, E experts, B stored blocks, F rows an expert, K slots,
N = T K visits, R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from samv2_kernels.gpu.along_rows import to_tokens_kernel
from samv2_kernels.gpu.along_width import gate_up_kernel, hidden_grad_kernel
from samv2_kernels.gpu.blocks import Blocks, blocks_of
from samv2_kernels.gpu.configs import Config, choose
from samv2_kernels.gpu.low_rank import adapter_grad_kernel, project_kernel
from samv2_kernels.gpu.sort import tile_table_gpu

LEAST_RANK_BLOCK = 16
"""Tensor cores multiply 16 columns at least."""


@dataclass(frozen=True)
class Call:
    """Shapes and the visit order that all launches of one call share."""

    x_TD: Tensor
    combine_TK: Tensor
    order_N: Tensor
    offsets: Tensor
    blocks: Blocks
    base_E: Tensor | None
    F: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.x_TD.shape[0]

    @property
    def D(self) -> int:
        """Model width."""
        return self.x_TD.shape[1]

    @property
    def slots(self) -> int:
        """K."""
        return self.combine_TK.shape[1]

    @property
    def num_experts(self) -> int:
        """E."""
        return (self.offsets.shape[0] - 1) // self.slots

    @cached_property
    def _tables(self) -> dict[tuple[int, bool], Tensor]:
        return {}

    def tiles(self, rows: int, by_slot: bool) -> Tensor:
        """(S, L, 3) tile table, made once for each height."""
        if (rows, by_slot) not in self._tables:
            self._tables[rows, by_slot] = tile_table_gpu(
                self.offsets,
                num_experts=self.num_experts,
                slots=self.slots,
                tokens=self.tokens,
                rows_per_tile=rows,
                by_slot=by_slot,
            )
        return self._tables[rows, by_slot]

    def config(self, kernel: str, weights: str, by_slot: bool) -> Config:
        """The tile for the mean number of rows that an expert gets."""
        rows = self.tokens * (1 if by_slot else self.slots) / self.num_experts
        return choose(kernel, weights, rows, D=self.D, F=self.F, E=self.num_experts)


def expert_mlp_forward(
    x_TD: Tensor,
    combine_TK: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    ffn_width: int,
    base_E: Tensor | None,
    low_gate_TR: Tensor | None,
    low_up_TR: Tensor | None,
    gate_EFR: Tensor | None,
    up_EFR: Tensor | None,
    down_ERF: Tensor | None,
    low_TQ: Tensor | None,
    out_EQD: Tensor | None,
    reached_TK: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`samv2_kernels.expert_mlp.expert_mlp`.

    Raises:
        ValueError: NF4 weights and inputs that are not bfloat16, or a model width that
            is not a multiple of 64.
    """
    x_TD, combine_TK = x_TD.contiguous(), combine_TK.float().contiguous()
    blocks = blocks_of(weights, x_TD.dtype)
    call = Call(x_TD, combine_TK, order_N, offsets, blocks, base_E, ffn_width)
    rank = 0 if down_ERF is None else down_ERF.shape[1]
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    low_down_TR = x_TD.new_zeros((call.tokens, rank), dtype=torch.float32)
    rows = order_N.shape[0]
    hidden_NF = x_TD.new_empty((rows, ffn_width), dtype=blocks.hidden_dtype(x_TD.dtype))
    kept = (rows if save else 0, ffn_width)
    gate_NF, up_NF = x_TD.new_empty(kept), x_TD.new_empty(kept)
    if rows:
        lows = (low_gate_TR, low_up_TR, gate_EFR, up_EFR)
        _gate_up(call, lows, hidden_NF, gate_NF, up_NF, save)
        surrogate = (low_TQ, out_EQD, reached_TK)
        _to_tokens(call, "to_tokens", (hidden_NF,), surrogate, y_TD)
        if down_ERF is not None:
            # Hidden units are stored at a quarter beside NF4.
            scale = combine_TK / blocks.hidden_share
            _project(
                call, hidden_NF, down_ERF, (1, ffn_width), scale, low_down_TR, x_TD
            )
    return y_TD, low_down_TR, gate_NF, up_NF


def expert_mlp_backward(
    grad_y_TD: Tensor,
    grad_low_down_TR: Tensor,
    x_TD: Tensor,
    combine_TK: Tensor,
    order_N: Tensor,
    offsets: Tensor,
    weights: Sequence[Tensor],
    ffn_width: int,
    base_E: Tensor | None,
    low_gate_TR: Tensor | None,
    low_up_TR: Tensor | None,
    gate_EFR: Tensor | None,
    up_EFR: Tensor | None,
    down_ERF: Tensor | None,
    low_TQ: Tensor | None,
    out_EQD: Tensor | None,
    reached_TK: Tensor | None,
    gate_NF: Tensor,
    up_NF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`samv2_kernels.expert_mlp.expert_mlp_backward`.

    Beside NF4, rows of the output's gradient are divided by a power of two first and
    what comes of them is multiplied by it in the end: exact, and float16 suffices for
    any size of gradients.
    """
    dtype, none = x_TD.dtype, x_TD.new_empty(0)
    combine_TK32 = combine_TK.float().contiguous()
    blocks = blocks_of(weights, dtype)
    call = Call(
        x_TD.contiguous(), combine_TK32, order_N, offsets, blocks, base_E, ffn_width
    )
    adapters, surrogates = down_ERF is not None, low_TQ is not None
    dx_TD = torch.zeros_like(call.x_TD, dtype=torch.float32)
    dcombine_TK = torch.zeros_like(combine_TK32)
    dlow_gate, dlow_up, dgate, dup, ddown, dlow_TQ, dreached = [none] * 7
    if adapters:
        assert low_gate_TR is not None and gate_EFR is not None and up_EFR is not None
        dlow_gate = torch.zeros_like(low_gate_TR, dtype=torch.float32)
        dlow_up = torch.zeros_like(dlow_gate)
        dgate, dup, ddown = (
            bank.new_empty(bank.shape) if order_N.shape[0] else torch.zeros_like(bank)
            for bank in (gate_EFR, up_EFR, down_ERF)
        )
    if surrogates:
        assert reached_TK is not None
        dlow_TQ = torch.zeros_like(low_TQ, dtype=torch.float32)
        dreached = torch.zeros_like(reached_TK, dtype=torch.float32)
    if order_N.shape[0]:
        power_T1 = blocks.row_power(grad_y_TD, grad_low_down_TR)
        dy_TD = (grad_y_TD / power_T1).to(dtype)
        q_TR = (grad_low_down_TR / power_T1).to(dtype) if adapters else None
        grads = _hidden_grad(call, dy_TD, q_TR, down_ERF, gate_NF, up_NF)
        dgate_NF, dup_NF, part_NY = grads
        dcombine_N = torch.zeros_like(dcombine_TK.view(-1))
        dcombine_N[order_N.long()] = part_NY.sum(dim=1)
        dcombine_TK = dcombine_N.view_as(dcombine_TK) * power_T1
        _to_tokens(call, "input_grad", (dgate_NF, dup_NF), (None, None, None), dx_TD)
        dx_TD *= power_T1
        if adapters:
            for rows_NF, bank_EFR, out_TR in (
                (dgate_NF, gate_EFR, dlow_gate),
                (dup_NF, up_EFR, dlow_up),
            ):
                rank = bank_EFR.shape[2]
                _project(call, rows_NF, bank_EFR, (rank, 1), None, out_TR, x_TD)
                out_TR *= power_T1
            lows = [(low * power_T1).to(dtype) for low in (low_gate_TR, low_up_TR)]
            lows.append(grad_low_down_TR.to(dtype))
            _adapter_grad(call, grads[:2], gate_NF, up_NF, lows, (dgate, dup, ddown))
        if surrogates:
            _surrogate_grad(
                call,
                grad_y_TD.to(dtype),
                low_TQ,
                out_EQD,
                reached_TK,
                dlow_TQ,
                dreached,
            )
    return (
        dx_TD.to(dtype),
        dcombine_TK.to(combine_TK.dtype),
        dlow_gate.to(dtype),
        dlow_up.to(dtype),
        dgate,
        dup,
        ddown,
        dlow_TQ.to(dtype),
        dreached if reached_TK is None else dreached.to(reached_TK.dtype),
    )


def _rank_block(rank: int) -> int:
    return max(LEAST_RANK_BLOCK, triton.next_power_of_2(max(rank, 1)))


def _gate_up(
    call: Call,
    lows: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    hidden_NF: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    save: bool,
) -> None:
    config = call.config("gate_up", call.blocks.kind, by_slot=False)
    tiles_L3 = call.tiles(config.rows, by_slot=False)[0]
    gate, up, _ = call.blocks.parts
    absent = call.x_TD
    rank = 0 if lows[0] is None else lows[0].shape[1]
    given = [absent if low is None else low.contiguous() for low in lows]
    grid = (triton.cdiv(call.F, config.columns // 2), tiles_L3.shape[0])
    gate_up_kernel[grid](
        call.x_TD,
        call.order_N,
        tiles_L3,
        absent if call.base_E is None else call.base_E,
        gate.weights,
        up.weights,
        gate.absmax,
        up.absmax,
        gate.second,
        up.second,
        gate.offset,
        up.offset,
        call.blocks.table,
        *given,
        hidden_NF,
        gate_NF,
        up_NF,
        call.F,
        call.D,
        SLOTS=call.slots,
        D=call.D,
        R=rank,
        RANK_BLOCK=_rank_block(rank),
        NF4=call.blocks.nf4,
        NESTED=call.blocks.nested,
        SECONDS=call.blocks.seconds,
        HAS_BASE=call.base_E is not None,
        SAVE=save,
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=config.step,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _hidden_grad(
    call: Call,
    dy_TD: Tensor,
    q_TR: Tensor | None,
    down_ERF: Tensor | None,
    gate_NF: Tensor,
    up_NF: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of g and u, and (N, Y) parts of that of the combine weights."""
    config = call.config("hidden_grad", call.blocks.kind, by_slot=False)
    tiles_L3 = call.tiles(config.rows, by_slot=False)[0]
    down = call.blocks.parts[2]
    rank = 0 if down_ERF is None else down_ERF.shape[1]
    columns = triton.cdiv(call.F, config.columns)
    rows = call.order_N.shape[0]
    hidden = call.blocks.hidden_dtype(dy_TD.dtype)
    dgate_NF = gate_NF.new_empty(gate_NF.shape, dtype=hidden)
    dup_NF = gate_NF.new_empty(gate_NF.shape, dtype=hidden)
    # Rows of unused visits are in no tile; their gradient is 0.
    part_NY = dy_TD.new_zeros((rows, columns), dtype=torch.float32)
    absent = call.x_TD
    hidden_grad_kernel[columns, tiles_L3.shape[0]](
        dy_TD,
        call.order_N,
        tiles_L3,
        absent if call.base_E is None else call.base_E,
        down.weights,
        down.absmax,
        down.second,
        down.offset,
        call.blocks.table,
        absent if q_TR is None else q_TR,
        absent if down_ERF is None else down_ERF.contiguous(),
        call.combine_TK,
        gate_NF,
        up_NF,
        dgate_NF,
        dup_NF,
        part_NY,
        call.F,
        call.D,
        SLOTS=call.slots,
        D=call.D,
        R=rank,
        RANK_BLOCK=_rank_block(rank),
        NF4=call.blocks.nf4,
        NESTED=call.blocks.nested,
        SECONDS=call.blocks.seconds,
        HAS_BASE=call.base_E is not None,
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=config.step,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dgate_NF, dup_NF, part_NY


def _to_tokens(
    call: Call,
    kernel: str,
    rows: tuple[Tensor, ...],
    surrogate: tuple[Tensor | None, Tensor | None, Tensor | None],
    out_TD: Tensor,
) -> None:
    """Add rows times the down projection, or two times gate and up, to their tokens."""
    two = len(rows) == 2
    first, second = call.blocks.parts[:2] if two else call.blocks.parts[2:] * 2
    config = call.config(kernel, call.blocks.kind, by_slot=True)
    tiles_KL3 = call.tiles(config.rows, by_slot=True)
    low_TQ, out_EQD, reached_TK = surrogate
    rank = 0 if low_TQ is None else low_TQ.shape[1]
    absent = call.x_TD
    for tiles_L3 in tiles_KL3:
        to_tokens_kernel[triton.cdiv(call.D, config.columns), tiles_L3.shape[0]](
            rows[0],
            call.order_N,
            tiles_L3,
            absent if call.base_E is None else call.base_E,
            first.weights,
            first.absmax,
            first.second,
            first.offset,
            call.blocks.table,
            rows[-1],
            second.weights,
            second.absmax,
            second.second,
            second.offset,
            call.combine_TK if two else call.combine_TK / call.blocks.hidden_share,
            absent if reached_TK is None else reached_TK.float().contiguous(),
            absent if low_TQ is None else low_TQ.contiguous(),
            absent if out_EQD is None else out_EQD.contiguous(),
            out_TD,
            call.F,
            SLOTS=call.slots,
            F=call.F,
            D=call.D,
            Q=rank,
            RANK_BLOCK=_rank_block(rank),
            NF4=call.blocks.nf4,
            NESTED=call.blocks.nested,
            SECONDS=call.blocks.seconds,
            HAS_BASE=call.base_E is not None,
            TWO=two,
            COMBINE=not two,
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            BLOCK_F=config.step,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def _project(
    call: Call,
    rows: Tensor,
    bank: Tensor,
    strides: tuple[int, int],
    weight_TK: Tensor | None,
    out_TR: Tensor,
    like: Tensor,
    low_TR: Tensor | None = None,
    dots_TK: Tensor | None = None,
) -> None:
    """Add rows times a small matrix of their expert to their tokens.

    With ``low_TR``, rows are tokens' own, the result is subtracted, and ``dots_TK`` gets
    minus its product with ``low_TR``.
    """
    rank, negate = out_TR.shape[1], low_TR is not None
    config = call.config("project", "float", by_slot=True)
    for tiles_L3 in call.tiles(config.rows, by_slot=True):
        project_kernel[(tiles_L3.shape[0],)](
            rows,
            call.order_N,
            tiles_L3,
            bank.contiguous(),
            like if weight_TK is None else weight_TK,
            like if low_TR is None else low_TR,
            out_TR if dots_TK is None else dots_TK,
            out_TR,
            rows.shape[1],
            *strides,
            SLOTS=call.slots,
            R=rank,
            RANK_BLOCK=_rank_block(rank),
            BY_TOKEN=negate,
            WEIGHTED=weight_TK is not None,
            NEGATE=negate,
            BLOCK_M=config.rows,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def _adapter_grad(
    call: Call,
    grads: tuple[Tensor, ...],
    gate_NF: Tensor,
    up_NF: Tensor,
    lows: list[Tensor],
    outs: tuple[Tensor, Tensor, Tensor],
) -> None:
    config = call.config("adapter_grad", "float", by_slot=False)
    rank = lows[0].shape[1]
    adapter_grad_kernel[triton.cdiv(call.F, config.columns), call.num_experts](
        *grads,
        gate_NF,
        up_NF,
        call.combine_TK,
        call.order_N,
        call.offsets,
        *(low.contiguous() for low in lows),
        *outs,
        call.F,
        SLOTS=call.slots,
        R=rank,
        RANK_BLOCK=_rank_block(rank),
        BLOCK_M=config.rows,
        BLOCK_F=config.columns,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _surrogate_grad(
    call: Call,
    dy_TD: Tensor,
    low_TQ: Tensor,
    out_EQD: Tensor,
    reached_TK: Tensor,
    dlow_TQ: Tensor,
    dreached_TK: Tensor,
) -> None:
    _project(
        call,
        dy_TD,
        out_EQD,
        (1, call.D),
        reached_TK.float().contiguous(),
        dlow_TQ,
        low_TQ,
        low_TQ.contiguous(),
        dreached_TK,
    )
