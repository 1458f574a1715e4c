"""What the experts of one layer compute with: base blocks, adapters, surrogates.

Shapes: T tokens, D model width, E experts, B stored base blocks, F rows an expert, R
adapter rank, G siblings, P = G R, Q surrogate rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samv2_kernels.nf4 import Nf4Experts, dequantise
from samv2_kernels.nf4_layout import Nf4Words
from samv2_kernels.nf4_nested import nested_values


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Base blocks in whichever form, and which of them each expert has."""

    base_E: Tensor | None = None
    """(E,) int64, the block of each expert: spawned ones share their parent's. None
    where expert e has block e."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, F, D)."""
        raise NotImplementedError

    @property
    def num_experts(self) -> int:
        """E."""
        return self.shape[0] if self.base_E is None else len(self.base_E)

    @property
    def ffn_width(self) -> int:
        """F."""
        return self.shape[1]


@dataclass(frozen=True, kw_only=True)
class ExpertWeights(_Stored):
    """The frozen base blocks of one layer; B = E unless experts share blocks."""

    gate_EFD: Tensor
    """(B, F, D) rows of the gate projection."""
    up_EFD: Tensor
    """(B, F, D) rows of the up projection."""
    down_EFD: Tensor
    """(B, F, D) columns of the down projection, transposed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, F, D)."""
        return tuple(self.gate_EFD.shape)

    @property
    def tensors(self) -> list[Tensor]:
        """What the op takes: gate, up, down."""
        return [self.gate_EFD, self.up_EFD, self.down_EFD]

    @property
    def per_expert(self) -> ExpertWeights:
        """The same with a block of its own for every expert, copied where shared."""
        if self.base_E is None:
            return self
        return ExpertWeights(
            gate_EFD=self.gate_EFD[self.base_E],
            up_EFD=self.up_EFD[self.base_E],
            down_EFD=self.down_EFD[self.base_E],
        )


@dataclass(frozen=True, kw_only=True)
class Nf4Weights(_Stored):
    """The base blocks of one layer in NF4."""

    gate: Nf4Experts
    """B packed blocks of the gate projection."""
    up: Nf4Experts
    """Of the up projection."""
    down: Nf4Experts
    """Of the down projection, transposed: F x D as the others."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, F, D)."""
        return self.gate.shape

    @property
    def tensors(self) -> list[Tensor]:
        """What the op takes: the codes of gate, up and down, then their magnitudes."""
        parts = (self.gate, self.up, self.down)
        codes = [part.codes_EH for part in parts]
        return codes + [part.absmax_EN for part in parts]

    def unpack(self, dtype: torch.dtype) -> ExpertWeights:
        """All blocks as floats: four times the memory in bfloat16."""
        return ExpertWeights(
            gate_EFD=dequantise(self.gate, dtype),
            up_EFD=dequantise(self.up, dtype),
            down_EFD=dequantise(self.down, dtype),
            base_E=self.base_E,
        )


@dataclass(frozen=True, kw_only=True)
class DecodingWeights(_Stored):
    """The base blocks of one layer, for inference on a CPU.

    See :func:`samv2_kernels.decoding.for_decoding`.
    """

    gate_up_codes: Tensor
    """(B, 2 F, D / 2) uint8, gate rows first, in bitsandbytes' CPU order."""
    gate_up_absmax: Tensor
    """(B, D / 64, 2 F) bfloat16."""
    down: Nf4Experts
    """As in :class:`Nf4Weights`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, F, D)."""
        return self.down.shape

    @property
    def tensors(self) -> list[Tensor]:
        """What the op takes."""
        own = [self.gate_up_codes, self.gate_up_absmax]
        return own + [self.down.codes_EH, self.down.absmax_EN]


@dataclass(frozen=True, kw_only=True)
class WordWeights(_Stored):
    """The base blocks of one layer in the order that GPU kernels read NF4 in.

    :func:`samv2_kernels.nf4_layout.to_words` makes the parts. ``Nf4Weights`` on a GPU
    are reordered anew in every call; these are not.
    """

    gate: Nf4Words
    """B packed blocks of the gate projection."""
    up: Nf4Words
    """Of the up projection."""
    down: Nf4Words
    """Of the down projection, transposed: F x D as the others."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, F, D)."""
        return self.gate.shape

    @property
    def tensors(self) -> list[Tensor]:
        """What the op takes: words, magnitudes and, if nested, what they stand for.

        Raises:
            ValueError: some parts are nested and others are not.
        """
        parts = (self.gate, self.up, self.down)
        plain = [part.words_BFW for part in parts] + [part.absmax_BFA for part in parts]
        nested = [part.nested for part in parts if part.nested is not None]
        if not nested:
            return plain
        if len(nested) < len(parts):
            raise ValueError("gate, up and down must be nested alike")
        second = [part.second_ES for part in nested]
        offset = [part.offset_E for part in nested]
        return [*plain, *second, *offset, nested_values(second[0].device)]


Blocks = ExpertWeights | Nf4Weights | WordWeights | DecodingWeights
"""What the experts of a layer may be given as."""


@dataclass(frozen=True, kw_only=True)
class ExpertAdapters:
    """Row-LoRA: frozen factors common to all experts, trainable rows per expert.

    An expert may have G *siblings*: sets of rows over the one base block, of which each
    token takes the mixture ``share_TG``. The rows of sibling g are columns g R to
    (g + 1) R of P = G R; what follows is P wide where it is said to be R.
    """

    shared_gate_RD: Tensor
    """A_g."""
    shared_up_RD: Tensor
    """A_u."""
    shared_down_DR: Tensor
    """B_d."""
    gate_EFR: Tensor
    """B_g, trainable; (E, F, P)."""
    up_EFR: Tensor
    """B_u, trainable; (E, F, P)."""
    down_ERF: Tensor
    """A_d, trainable; (E, P, F)."""
    scale: float
    """s."""
    share_TG: Tensor | None = None
    """(T, G) weights of the siblings; None: there is one, and it counts fully."""

    @property
    def siblings(self) -> int:
        """G."""
        return 1 if self.share_TG is None else self.share_TG.shape[1]

    def for_rows(self, token_N: Tensor) -> ExpertAdapters:
        """The same for rows that are tokens ``token_N``, (N,) int64."""
        if self.share_TG is None:
            return self
        return replace(self, share_TG=self.share_TG[token_N])

    def low_inputs(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """s A_g x and s A_u x, each sibling's by its share: (T, P) in x's dtype."""
        factors = (self.shared_gate_RD, self.shared_up_RD)
        gate_TP, up_TP = (self._spread(x_TD, factor_RD) for factor_RD in factors)
        return gate_TP, up_TP

    def down(self, low_down_TP: Tensor, dtype: torch.dtype) -> Tensor:
        """s B_d l, of l = sum over experts of A_d h: the siblings' by their shares.

        Args:
            low_down_TP: (T, P) l.
            dtype: of the product and the result.

        Returns:
            (T, D), what adapters add to the down projection.
        """
        low_TR = low_down_TP.to(dtype) * self.scale
        if self.share_TG is not None:
            low_TGR = low_TR.unflatten(1, (self.siblings, -1))
            low_TR = (low_TGR * self.share_TG.to(dtype).unsqueeze(2)).sum(1)
        return low_TR @ self.shared_down_DR.to(dtype).T

    def _spread(self, x_TD: Tensor, factor_RD: Tensor) -> Tensor:
        low_TR = x_TD @ factor_RD.to(x_TD.dtype).T * self.scale
        if self.share_TG is None:
            return low_TR
        share_TG1 = self.share_TG.to(x_TD.dtype).unsqueeze(2)
        return (share_TG1 * low_TR.unsqueeze(1)).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Surrogates:
    """Linear stand-ins S_e(x) = V_e (U x) + b_e."""

    shared_QD: Tensor
    """U, common to the layer's experts."""
    out_EQD: Tensor
    """V_e, transposed."""
    bias_ED: Tensor
    """b_e."""
