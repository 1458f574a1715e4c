"""Held-out scores from residual streams, without a whole model in memory.

Shapes: N windows of one domain, H of all domains, S positions, D model width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from samv2.experts.moe_layers import ExpertGraphMLP, WalkOptions
from samv2.models.dense_layers import DenseLayers
from samv2.models.logit_scale import scaled
from samv2.models.perplexity import Score, score_hidden
from samv2.models.stored_layers import StoredLayers
from samv2.models.text_stream import TextStream


def score_streams(
    source: DenseLayers,
    streams_HSD: Mapping[int, Tensor],
    heldout: Mapping[str, Tensor],
    scale_of: Callable[[int], float] = lambda key: 1.0,
) -> dict[int, dict[str, Score]]:
    """Next-token scores of streams behind the last layer.

    Args:
        source: gives the final norm and the head.
        streams_HSD: (H, S, D) each, by any key, e.g. K.
        heldout: by domain, (N, S) int64; the streams' windows in this order.
        scale_of: a key's factor on the logits.

    Returns:
        By the same key, by domain.
    """
    norm, head_VD = source.final_norm(), source.head_weight()
    counts = [len(windows) for windows in heldout.values()]

    def of(hidden_HSD: Tensor, scale: float) -> dict[str, Score]:
        parts = zip(heldout.items(), hidden_HSD.split(counts), strict=True)
        return {
            name: score_hidden(scaled(norm(hidden_NSD), scale), head_VD, tokens_NS)
            for (name, tokens_NS), hidden_NSD in parts
        }

    return {
        key: of(hidden_HSD, scale_of(key)) for key, hidden_HSD in streams_HSD.items()
    }


@torch.no_grad()
def score_folder(
    folder: Path,
    source: DenseLayers,
    heldout: Mapping[str, Tensor],
    ks: Sequence[int],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, dict[str, Score]]:
    """Score a bootstrapped folder on the server graph, one layer in memory at a time.

    Args:
        folder: the expert graph.
        source: the dense model it was made of, which gives all but the expert graphs.
        heldout: by domain, (N, S) int64 windows of the same length S.
        ks: values of K.
        progress: called with layers done and layers in all.

    Returns:
        By K, by domain.

    Raises:
        ModelError: a layer is damaged.
    """
    stored, total = StoredLayers(folder), source.num_layers
    tokens_HS = torch.cat(list(heldout.values()))
    hidden_HSD = source.embed(tokens_HS)
    inputs = source.attention_inputs(tokens_HS.shape[1])
    streams = {k: TextStream(hidden_HSD, inputs) for k in ks}
    for index in range(total):
        layer = source.layer(index)
        experts = None
        if index in stored.config.layers:
            experts = stored.experts(index, stored.layer(index))
        for k, stream in streams.items():
            ffn = layer.mlp if experts is None else _at(experts, k)
            stream.advance(*stream.attend(layer, index), ffn)
        progress(index + 1, total)
    hidden = {k: stream.hidden_BSD for k, stream in streams.items()}
    return score_streams(source, hidden, heldout, stored.config.logit_scale)


def _at(experts: ExpertGraphMLP, k: int) -> Callable[[Tensor], Tensor]:
    """The FFN that a layer is at K on the server graph."""
    options = WalkOptions(experts_per_token=k, use_assembler=False)
    return lambda x_BSD: experts(x_BSD, options)[0]
