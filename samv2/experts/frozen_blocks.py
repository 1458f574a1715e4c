"""What a converted layer computes with and does not train: blocks, surrogates, repairs.

Blocks are (E, F, D) tensors: gate, up and down projection, and each repair's own down
projection. They are floats or NF4. Grouped experts take NF4 as it is; for the masked
dense FFN it is unpacked for one pass at a time.

Shapes: T tokens, D model width, E experts, F rows an expert, Q rank, K visits a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor, nn

from samv2.common.errors import ModelError
from samv2.experts.nf4 import check_packed, packed_name, saved_packed
from samv2.experts.repair import Repair, repair_name
from samv2_kernels import ExpertWeights, Nf4Weights, Surrogates, WordWeights
from samv2_kernels.nf4 import BLOCK, Nf4Experts, dequantise, quantise
from samv2_kernels.nf4_layout import Nf4Words, to_words

GATE, UP, DOWN = "gate_EFD", "up_EFD", "down_EFD"


class FrozenBlocks(nn.Module):
    """The frozen part of a layer, as buffers.

    Args:
        weights: base blocks, (E, F, D) each.
        surrogates: linear stand-ins, or None.
    """

    def __init__(self, weights: ExpertWeights, surrogates: Surrogates | None) -> None:
        super().__init__()
        self.shape: tuple[int, int, int] = tuple(weights.gate_EFD.shape)
        """(E, F, D) of every block."""
        for name in (GATE, UP, DOWN):
            self.register_buffer(name, getattr(weights, name))
        for name in ("shared_QD", "out_EQD", "bias_ED"):
            value = getattr(surrogates, name) if surrogates is not None else None
            self.register_buffer(f"surrogate_{name}", value)
        self.register_buffer("dropped_out_QD", None, persistent=False)
        self.register_buffer("dropped_bias_D", None, persistent=False)
        self.repaired: tuple[int, ...] = ()
        """Values of K that have a repair, rising."""
        self.is_part = False
        """Whether the whole has more experts, so that K = E loses something, too."""
        self.packed: tuple[str, ...] = ()
        """Names of the blocks that are NF4."""
        self._words: dict[str, tuple[Tensor, Nf4Words]] = {}

    @property
    def num_experts(self) -> int:
        """E."""
        return self.shape[0]

    @property
    def block_names(self) -> tuple[str, ...]:
        """All blocks, those of the repairs last."""
        return (GATE, UP, DOWN, *(repair_name(k, DOWN) for k in self.repaired))

    @property
    def surrogates(self) -> Surrogates | None:
        """The stand-ins of experts that are not visited."""
        if self.surrogate_shared_QD is None:
            return None
        return Surrogates(
            shared_QD=self.surrogate_shared_QD,
            out_EQD=self.surrogate_out_EQD,
            bias_ED=self.surrogate_bias_ED,
        )

    def add_dropped(self, out_QD: Tensor, bias_D: Tensor) -> None:
        """Let the surrogates of experts that are not held stand in for them.

        Args:
            out_QD: (Q, D) float32 sum of their V.
            bias_D: (D,) float32 sum of their b.
        """
        self.dropped_out_QD, self.dropped_bias_D = out_QD, bias_D

    def add_repair(self, k: int, repair: Repair) -> None:
        """Store what to compute with when a token makes ``k`` visits.

        Raises:
            ModelError: K = E, which needs no repair.
        """
        most = self.num_experts - (not self.is_part)
        if not 0 < k <= most:
            raise ModelError(
                f"a repair for K = {k} of {self.num_experts} experts was given; only a K "
                f"in 1..{most} loses anything to repair"
            )
        for part in fields(Repair):
            self.register_buffer(repair_name(k, part.name), getattr(repair, part.name))
        self.repaired = tuple(sorted({*self.repaired, k}))

    def repair(self, k: int) -> Repair | None:
        """The repair that was fitted for ``k`` visits, if there is one."""
        if k not in self.repaired:
            return None
        own = {
            part.name: getattr(self, repair_name(k, part.name))
            for part in fields(Repair)
            if part.name != DOWN
        }
        dtype = own["in_QD"].dtype
        return Repair(down_EFD=self.block(repair_name(k, DOWN), dtype), **own)

    def stand_in(self, x_TD: Tensor, k: int) -> Tensor:
        """What K's repair adds for all experts that are not visited, (T, D) in x's dtype."""
        in_QD, out_QD, bias_D = (
            getattr(self, repair_name(k, part)).to(x_TD.dtype)
            for part in ("in_QD", "out_QD", "bias_D")
        )
        return (x_TD @ in_QD.T) @ out_QD + bias_D

    def stand_in_for_dropped(self, x_TD: Tensor) -> Tensor:
        """What experts that are not held add by their surrogates, (T, D) in x's dtype."""
        shared_QD, out_QD, bias_D = (
            part.to(x_TD.dtype)
            for part in (
                self.surrogate_shared_QD,
                self.dropped_out_QD,
                self.dropped_bias_D,
            )
        )
        return (x_TD @ shared_QD.T) @ out_QD + bias_D

    def block(self, name: str, dtype: torch.dtype) -> Tensor:
        """One of :attr:`block_names`, (E, F, D) in a dtype; unpacked where it is NF4."""
        if name in self.packed:
            return dequantise(self.packed_block(name), dtype)
        return getattr(self, name).to(dtype)

    def packed_block(self, name: str) -> Nf4Experts:
        """The NF4 form of one of :attr:`packed`."""
        return Nf4Experts(
            codes_EH=getattr(self, packed_name(name, "codes_EH")),
            absmax_EN=getattr(self, packed_name(name, "absmax_EN")),
            shape=self.shape,
        )

    def words(self, name: str) -> Nf4Words:
        """One of :attr:`packed` as GPU kernels read it; reordered once, then kept.

        The codes stay as well, so on a GPU an NF4 block takes its half byte a weight
        twice.
        """
        codes_EH = self.packed_block(name).codes_EH
        kept = self._words.get(name)
        if kept is None or kept[0] is not codes_EH:
            kept = (codes_EH, to_words(self.packed_block(name)))
            self._words[name] = kept
        return kept[1]

    def pack(self, name: str, packed: Nf4Experts) -> None:
        """Put an NF4 form in a float block's place.

        Raises:
            ModelError: it has not the shape of this layer's blocks, or is damaged.
        """
        if packed.shape != self.shape:
            raise ModelError(
                f"{name} is packed as {packed.shape}; the blocks of this layer are "
                f"{self.shape}"
            )
        check_packed(name, packed)
        delattr(self, name)
        self.register_buffer(packed_name(name, "codes_EH"), packed.codes_EH)
        self.register_buffer(packed_name(name, "absmax_EN"), packed.absmax_EN)
        self.packed = (*self.packed, name)

    def quantise(self) -> None:
        """Turn every float block into NF4."""
        for name in self.block_names:
            if name not in self.packed:
                self.pack(name, quantise(getattr(self, name)))

    def blocks(
        self, k: int, dtype: torch.dtype
    ) -> ExpertWeights | Nf4Weights | WordWeights:
        """The blocks to compute K visits with, packed where all of them are NF4.

        On a GPU, packed means words (:meth:`words`), for bfloat16 and widths that are a
        multiple of 64; others are unpacked there.

        Args:
            k: K; its repair's down projection takes the base's place.
            dtype: of float blocks.
        """
        names = self.names_at(k)
        packed = all(name in self.packed for name in names)
        if packed and not self.packed_block(GATE).codes_EH.is_cuda:
            gate, up, down = map(self.packed_block, names)
            return Nf4Weights(gate=gate, up=up, down=down)
        if packed and dtype == torch.bfloat16 and self.shape[2] % BLOCK == 0:
            gate, up, down = map(self.words, names)
            return WordWeights(gate=gate, up=up, down=down)
        gate_EFD, up_EFD, down_EFD = (self.block(name, dtype) for name in names)
        return ExpertWeights(gate_EFD=gate_EFD, up_EFD=up_EFD, down_EFD=down_EFD)

    def names_at(self, k: int) -> tuple[str, str, str]:
        """Names of the blocks of gate, up and down projection at K."""
        return GATE, UP, repair_name(k, DOWN) if k in self.repaired else DOWN

    @contextmanager
    def unpacked(self, k: int, dtype: torch.dtype) -> Iterator[ExpertWeights]:
        """The blocks to compute K visits with; autograd keeps NF4 and no copy of them.

        Args:
            k: K; its repair's down projection takes the base's place.
            dtype: of the blocks.
        """
        names = self.names_at(k)
        blocks = [self.block(name, dtype) for name in names]
        pairs = [
            (block, self.packed_block(name))
            for name, block in zip(names, blocks)
            if name in self.packed
        ]
        weights = ExpertWeights(
            gate_EFD=blocks[0], up_EFD=blocks[1], down_EFD=blocks[2]
        )
        if not pairs:
            yield weights
            return
        with saved_packed(pairs):
            yield weights
