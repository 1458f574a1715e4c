"""Launches of the expert kernels; :mod:`samv2_kernels.gpu.experts` puts them together.

Grids depend on shapes alone. Row tiles follow each other slowest, so that the programs
that run together read the same few rows and sweep an expert's weights.

Shapes: T tokens, D model width, E experts, B stored blocks, F rows an expert, K slots,
N = T K visits, R adapter rank, Q surrogate rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from samv2_kernels.gpu.along_rows import to_tokens_kernel
from samv2_kernels.gpu.along_width import gate_up_kernel, hidden_grad_kernel
from samv2_kernels.gpu.blocks import Blocks
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

    def config(self, kernel: str, weights: str, rank: int, by_slot: bool) -> Config:
        """The tile for the mean number of rows that an expert gets."""
        rows = self.tokens * (1 if by_slot else self.slots) / self.num_experts
        shape = {"D": self.D, "F": self.F, "E": self.num_experts}
        return choose(kernel, weights, rows, rank=rank, **shape)

    @property
    def base(self) -> Tensor:
        """The block of each expert, or anything where kernels do not look."""
        return self.x_TD if self.base_E is None else self.base_E

    @property
    def constants(self) -> dict[str, int | bool]:
        """What kernels that read weights are compiled for."""
        return {
            "SLOTS": self.slots,
            "D": self.D,
            "NF4": self.blocks.nf4,
            "NESTED": self.blocks.nested,
            "SECONDS": self.blocks.seconds,
            "HAS_BASE": self.base_E is not None,
        }


def _rank_block(rank: int) -> int:
    return max(LEAST_RANK_BLOCK, triton.next_power_of_2(max(rank, 1)))


def _schedule(config: Config) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}


def gate_up(
    call: Call,
    lows: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    hidden_NF: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    save: bool,
) -> None:
    rank = 0 if lows[0] is None else lows[0].shape[1]
    config = call.config("gate_up", call.blocks.kind, rank, by_slot=False)
    tiles_L3 = call.tiles(config.rows, by_slot=False)[0]
    gate, up, _ = call.blocks.parts
    absent = call.x_TD
    given = [absent if low is None else low.contiguous() for low in lows]
    columns = triton.cdiv(call.F, config.columns // 2)
    gate_up_kernel[(columns * tiles_L3.shape[0],)](
        call.x_TD,
        call.order_N,
        tiles_L3,
        call.base,
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
        **call.constants,
        R=rank,
        RANK_BLOCK=_rank_block(rank),
        SAVE=save,
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=config.step,
        **_schedule(config),
    )


def hidden_grad(
    call: Call,
    dy_TD: Tensor,
    q_TR: Tensor,
    down_ERF: Tensor | None,
    gate_NF: Tensor,
    up_NF: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of g and u without combine weights, (N, F), and of those, (N,)."""
    rank = 0 if down_ERF is None else down_ERF.shape[1]
    config = call.config("hidden_grad", call.blocks.kind, rank, by_slot=False)
    tiles_L3 = call.tiles(config.rows, by_slot=False)[0]
    down = call.blocks.parts[2]
    columns = triton.cdiv(call.F, config.columns)
    rows = call.order_N.shape[0]
    hidden = call.blocks.hidden_dtype(dy_TD.dtype)
    dgate_NF = gate_NF.new_empty(gate_NF.shape, dtype=hidden)
    dup_NF = gate_NF.new_empty(gate_NF.shape, dtype=hidden)
    # Rows of unused visits are in no tile; their gradient is 0.
    part_NY = dy_TD.new_zeros((rows, columns), dtype=torch.float32)
    absent = call.x_TD
    hidden_grad_kernel[(columns * tiles_L3.shape[0],)](
        dy_TD,
        call.order_N,
        tiles_L3,
        call.base,
        down.weights,
        down.absmax,
        down.second,
        down.offset,
        call.blocks.table,
        q_TR,
        absent if down_ERF is None else down_ERF.contiguous(),
        gate_NF,
        up_NF,
        dgate_NF,
        dup_NF,
        part_NY,
        call.F,
        call.D,
        **call.constants,
        R=rank,
        RANK_BLOCK=_rank_block(rank),
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=config.step,
        **_schedule(config),
    )
    return dgate_NF, dup_NF, part_NY.sum(dim=1)


def to_tokens(
    call: Call,
    kernel: str,
    rows: tuple[Tensor, ...],
    weight_TK: Tensor,
    surrogate: tuple[Tensor | None, Tensor | None, Tensor | None],
    out_TD: Tensor,
) -> None:
    """Add weighted rows times the down projection, or two times gate and up, to tokens."""
    two = len(rows) == 2
    first, second = call.blocks.parts[:2] if two else call.blocks.parts[2:] * 2
    low_TQ, out_EQD, reached_TK = surrogate
    rank = 0 if low_TQ is None else low_TQ.shape[1]
    config = call.config(kernel, call.blocks.kind, rank, by_slot=True)
    tiles_KL3 = call.tiles(config.rows, by_slot=True)
    columns = triton.cdiv(call.D, config.columns)
    absent = call.x_TD
    low = absent if low_TQ is None else low_TQ.contiguous()
    out = absent if out_EQD is None else out_EQD.contiguous()
    reached = absent if reached_TK is None else reached_TK.float().contiguous()
    for tiles_L3 in tiles_KL3:
        to_tokens_kernel[(columns * tiles_L3.shape[0],)](
            rows[0],
            call.order_N,
            tiles_L3,
            call.base,
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
            weight_TK,
            reached,
            low,
            out,
            out_TD,
            call.F,
            **call.constants,
            F=call.F,
            Q=rank,
            RANK_BLOCK=_rank_block(rank),
            TWO=two,
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            BLOCK_F=config.step,
            **_schedule(config),
        )


def project(
    call: Call,
    rows: Tensor,
    bank: Tensor,
    strides: tuple[int, int],
    weight_TK: Tensor,
    out_TR: Tensor,
    low_TR: Tensor | None = None,
    dots_TK: Tensor | None = None,
) -> None:
    """Add weighted rows times a small matrix of their expert to their tokens.

    With ``low_TR``, rows are tokens' own, the result is subtracted, and ``dots_TK`` gets
    minus its product with ``low_TR``.
    """
    rank, negate = out_TR.shape[1], low_TR is not None
    config = call.config("project", "float", rank, by_slot=True)
    bank = bank.contiguous()
    for tiles_L3 in call.tiles(config.rows, by_slot=True):
        project_kernel[(tiles_L3.shape[0],)](
            rows,
            call.order_N,
            tiles_L3,
            bank,
            weight_TK,
            call.x_TD if low_TR is None else low_TR,
            out_TR if dots_TK is None else dots_TK,
            out_TR,
            rows.shape[1],
            *strides,
            SLOTS=call.slots,
            R=rank,
            RANK_BLOCK=_rank_block(rank),
            BY_TOKEN=negate,
            NEGATE=negate,
            BLOCK_M=config.rows,
            **_schedule(config),
        )


def adapter_grad(
    call: Call,
    hidden_grads: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    lows: list[Tensor],
    banks: list[Tensor],
) -> None:
    """Write the gradients of all experts' adapter rows."""
    rank = lows[0].shape[1]
    config = call.config("adapter_grad", "float", rank, by_slot=False)
    adapter_grad_kernel[triton.cdiv(call.F, config.columns), call.num_experts](
        *hidden_grads,
        *saved,
        call.combine_TK,
        call.order_N,
        call.offsets,
        *(low.contiguous() for low in lows),
        *banks,
        call.F,
        SLOTS=call.slots,
        R=rank,
        RANK_BLOCK=_rank_block(rank),
        BLOCK_M=config.rows,
        BLOCK_F=config.columns,
        **_schedule(config),
    )
