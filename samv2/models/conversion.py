"""The third pass of a bootstrap: layers become expert graphs, repaired K by K.

The dense stream and one stream a K run through the layers together. Each layer is
repaired for each K on the stream of its own converted layers, to bring it back to the
dense one, and its *repaired* output feeds the next layer.

Shapes: B sequences, S positions, D model width, M FFN rows, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samv2.experts.moe_layers import WalkOptions
from samv2.experts.repair import START
from samv2.models.convert_layer import Surveyed, build_layer, fit_repair
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.expert_model import ExpertDecoderLayer
from samv2.models.text_stream import DenseSource, TextStream


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What the conversion of one layer found."""

    layer: int
    """Index of the decoder layer."""
    visits: dict[int, int]
    """By K: visits that this layer makes."""
    error: dict[int, float]
    """By K: mean over calibration tokens of ||converted - dense|| / ||dense|| of the
    stream after the layer."""
    left: dict[int, float]
    """By K: share of the squared residual that the repair leaves, judged on the half of
    the text that it was not fitted to."""
    ridges: dict[int, tuple[float, float]]
    """By K: the repair's penalties, as shares of the mean diagonals."""
    seconds: float


class Conversion:
    """Dense layers to expert graphs, on one stream a K.

    Args:
        source: the dense model.
        calibration_BS: (B, S) int64 token ids that repairs are fitted to.
        config: of the model to be made, with its visits.
        others_HS: (H, S) int64 text that is not fitted to; carried along so that every K
            can be measured on it when all layers are done, without loading the model.
            K = E is carried too then.
    """

    def __init__(
        self,
        source: DenseSource,
        calibration_BS: Tensor,
        config: ExpertModelConfig,
        others_HS: Tensor | None = None,
    ) -> None:
        self.source, self.config = source, config
        self.fitted = len(calibration_BS)
        """The first so many sequences of a stream are calibration text."""
        tokens = [calibration_BS] if others_HS is None else [calibration_BS, others_HS]
        hidden_BSD = source.embed(torch.cat(tokens))
        inputs = source.attention_inputs(calibration_BS.shape[1])
        self.dense = TextStream(hidden_BSD, inputs)
        self.streams = {k: TextStream(hidden_BSD, inputs) for k in self.streamed}
        if others_HS is not None:
            whole = TextStream(hidden_BSD[self.fitted :], inputs)
            self.streams[config.num_experts] = whole
        self.ridges: dict[int, tuple[float, float]] = {}
        self.next_layer = 0

    @property
    def streamed(self) -> tuple[int, ...]:
        """Values of K below E that have a stream of their own."""
        config = self.config
        wanted = {config.experts_per_token, *config.repaired} - {config.num_experts}
        return tuple(sorted(wanted))

    @torch.no_grad()
    def run(
        self, surveyed: Sequence[Surveyed], *, whole: bool = False
    ) -> Iterator[tuple[int, nn.Module, LayerReport | None]]:
        """Convert the layers that are left, in order.

        Args:
            surveyed: of every layer to convert.
            whole: go on through the dense layers behind the last converted one.

        Yields:
            (index, decoder layer, report); the report is None, and the layer as it was,
            where it stays dense.
        """
        last = self.config.layers[-1] + 1
        if whole:
            last = self.source.config.num_hidden_layers
        for index in range(self.next_layer, last):
            layer = self.source.layer(index)
            report = None
            if index in self.config.layers:
                position = self.config.layers.index(index)
                layer, report = self._convert(position, layer, surveyed[position])
            else:
                for stream in (self.dense, *self.streams.values()):
                    stream.advance(*stream.attend(layer, index), layer.mlp)
            self.next_layer = index + 1
            yield index, layer, report

    def _convert(
        self, position: int, layer: nn.Module, surveyed: Surveyed
    ) -> tuple[ExpertDecoderLayer, LayerReport]:
        start = time.perf_counter()
        config, index = self.config, self.config.layers[position]
        visits = config.layer_visits(position)
        mlp = build_layer(position, layer.mlp, surveyed, visits, config)
        self.dense.advance(*self.dense.attend(layer, index), layer.mlp)
        error, left, ridges = {}, {}, {}
        for k, stream in self.streams.items():
            x_BSD, after_BSD = stream.attend(layer, index)
            if k in config.repaired:
                fit, stream.hidden_BSD = fit_repair(
                    mlp,
                    k,
                    x_BSD,
                    after_BSD,
                    self.dense.hidden_BSD[: self.fitted],
                    rank=config.repair_rank,
                    near=self.ridges.get(k, START),
                )
                self.ridges[k] = ridges[k] = fit.ridges
                left[k] = fit.left
            else:
                options = WalkOptions(experts_per_token=k, use_assembler=False)
                stream.advance(x_BSD, after_BSD, lambda x: mlp(x, options)[0])
            if k in self.streamed:
                error[k] = self._error(stream)
        report = LayerReport(
            layer=index,
            visits={k: mlp.visits_at(k) for k in self.streamed},
            error=error,
            left=left,
            ridges=ridges,
            seconds=time.perf_counter() - start,
        )
        return ExpertDecoderLayer(layer, mlp), report

    def _error(self, stream: TextStream) -> float:
        total, count = 0.0, 0
        rows = zip(
            stream.hidden_BSD[: self.fitted].split(8),
            self.dense.hidden_BSD[: self.fitted].split(8),
        )
        for found, wanted in rows:
            gap = (found.float() - wanted.float()).norm(dim=2)
            share = gap / wanted.float().norm(dim=2).clamp(min=1e-12)
            total, count = total + float(share.double().sum()), count + share.numel()
        return total / max(1, count)
