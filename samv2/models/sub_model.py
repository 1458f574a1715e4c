"""The part of a bootstrapped model that one client holds, read without the rest.

Tensors of experts that are not kept are never read from disk. What stands in for them is
what stands in for any expert that is not visited: the repair of the client's K, which
knows nothing of which experts there are, or the sum of their surrogates.

Shapes: E experts of the whole, P of the part, Q surrogate rank, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from samv2.common.errors import ModelError
from samv2.experts.graph import ExpertGraph
from samv2.experts.sub_graph import SubGraph
from samv2.models.assembler import Assembler
from samv2.models.bootstrap import make_assembler
from samv2.models.dense_layers import opened_weights
from samv2.models.expert_config import ExpertModelConfig
from samv2.models.expert_model import ExpertModel
from samv2.models.save import build_model, misfit, read_expert_config

_REPAIR = re.compile(r"repair_(\d+)_")
_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")


class PartAssembler(nn.Module):
    """The whole's assembler, looked at through the experts that are kept.

    Args:
        assembler: of the whole.
        part: what is kept.
        graph: of the whole.
    """

    def __init__(
        self, assembler: Assembler, part: SubGraph, graph: ExpertGraph
    ) -> None:
        super().__init__()
        self.whole = assembler
        self._part = part
        self.set_graph(graph)

    def set_graph(self, graph: ExpertGraph) -> None:
        """Follow another graph of the whole."""
        self._graph = graph

    def forward(
        self,
        context_BD: Tensor,
        layer: int,
        server_mask_PP: Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Masks (B, P, P) between the kept experts; as :class:`Assembler`'s.

        A mask whose entries are all outside the part keeps the part's own.
        """
        made_BEE = self.whole(
            context_BD,
            layer,
            self._graph.edge_mask_LEE[layer].to(context_BD.device),
            temperature=temperature,
            generator=generator,
        )
        position_P = self._part.positions(self._graph, layer).to(context_BD.device)
        made_BPP = made_BEE[:, position_P][:, :, position_P]
        closed_B = ~(made_BPP.detach().diagonal(dim1=1, dim2=2) > 0).any(dim=1)
        entries_PP = torch.diag(server_mask_PP.diagonal()).to(made_BPP.dtype)
        return torch.where(closed_B.view(-1, 1, 1), entries_PP, made_BPP)


def load_sub_model(folder: Path, part: SubGraph) -> tuple[ExpertModel, ExpertGraph]:
    """The part of a bootstrapped model, and the graph of the whole.

    Raises:
        ModelError: the folder is no bootstrapped model or is damaged, or the part is not
            one of it.
    """
    folder = Path(folder)
    config, dense = read_expert_config(folder)
    if (len(config.layers), config.num_experts) != (len(part.kept), part.num_experts):
        raise ModelError(
            f"the sub-graph is one of {len(part.kept)} layers of {part.num_experts} "
            f"experts, but {folder} has {len(config.layers)} of {config.num_experts}"
        )
    shared = tuple(range(config.num_shared))
    if any(layer[: config.num_shared] != shared for layer in part.kept):
        raise ModelError(
            f"the sub-graph leaves out one of the {config.num_shared} shared experts"
        )
    weights: dict[str, Tensor] = {}
    graphs: dict[str, dict[int, Tensor]] = {"edge_mask_EE": {}, "order_E": {}}
    dropped: dict[int, tuple[Tensor, Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with opened_weights(file) as stored:
            for name in stored.keys():
                match = _MLP.fullmatch(name)
                if match is None or int(match[1]) not in config.layers:
                    weights[name] = stored.get_tensor(name)
                    continue
                position, own = config.layers.index(int(match[1])), match[2]
                if own in graphs:
                    graphs[own][position] = stored.get_tensor(name)
                elif not _of_larger_k(own, part.size):
                    kept = part.kept[position]
                    weights[name] = _kept_rows(stored.get_slice(name), own, kept)
            for position, layer in enumerate(config.layers):
                prefix = f"model.layers.{layer}.mlp.surrogate_"
                if prefix + "out_EQD" in stored.keys():
                    rest = [
                        expert
                        for expert in range(part.num_experts)
                        if expert not in part.kept[position]
                    ]
                    dropped[position] = (
                        _sum_rows(stored.get_slice(prefix + "out_EQD"), rest),
                        _sum_rows(stored.get_slice(prefix + "bias_ED"), rest),
                    )
    order = range(len(config.layers))
    try:
        whole = ExpertGraph(
            edge_mask_LEE=torch.stack([graphs["edge_mask_EE"][i] for i in order]),
            order_LE=torch.stack([graphs["order_E"][i] for i in order]),
        )
    except KeyError as error:
        raise ModelError(f"{folder} lacks the graph of layer {error}") from None
    inner = part.graph(whole)
    for position, layer in enumerate(config.layers):
        prefix = f"model.layers.{layer}.mlp."
        weights[prefix + "edge_mask_EE"] = inner.edge_mask_LEE[position]
        weights[prefix + "order_E"] = inner.order_LE[position]
    assembler = make_assembler(dense.hidden_size, config)
    seen = PartAssembler(assembler, part, whole) if assembler is not None else None
    own = {
        name: (f"assembler.whole.{name.removeprefix('assembler.')}", tensor)
        for name, tensor in weights.items()
        if name.startswith("assembler.")
    }
    weights = {k: v for k, v in weights.items() if k not in own} | dict(own.values())
    try:
        model = build_model(
            weights,
            part_config(config, part),
            dense,
            assembler=seen,
            is_part=not part.whole,
        )
    except (ModelError, RuntimeError) as error:
        raise misfit(folder, error) from None
    for position, (out_QD, bias_D) in dropped.items():
        model.expert_layers[position].add_dropped(out_QD, bias_D)
    model.set_experts_per_token(part.experts_per_token)
    return model, whole


def part_config(config: ExpertModelConfig, part: SubGraph) -> ExpertModelConfig:
    """The config of a part: its number of experts, and the repairs of a K that fits."""
    fits = [index for index, k in enumerate(config.repaired) if k <= part.size]

    def those(values: Sequence[object]) -> tuple[object, ...]:
        return tuple(values[index] for index in fits) if values else ()

    return replace(
        config,
        num_experts=part.size,
        experts_per_token=part.experts_per_token,
        repaired=those(config.repaired),
        logit_scales=those(config.logit_scales),
        visits=tuple(
            tuple(min(own, part.size) for own in row) for row in those(config.visits)
        ),
    )


def _of_larger_k(name: str, size: int) -> bool:
    """Whether a tensor is of a repair for more visits than the part can make."""
    match = _REPAIR.match(name)
    return match is not None and int(match[1]) > size


def _kept_rows(stored: object, name: str, kept: tuple[int, ...]) -> Tensor:
    """A tensor with an axis for experts (an E behind its name's last underscore), cut."""
    axes = name.rsplit("_", 1)[-1]
    if "E" not in axes:
        return stored[:]
    rows = torch.cat([stored[first:last].clone() for first, last in _runs(kept)])
    return rows[:, list(kept)] if axes == "EE" else rows


def _sum_rows(stored: object, rest: list[int]) -> Tensor:
    parts = [stored[first:last].float().sum(dim=0) for first, last in _runs(rest)]
    if not parts:
        return torch.zeros(stored.get_shape()[1:])
    return torch.stack(parts).sum(dim=0)


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Rising ids as spans [first, last)."""
    runs: list[tuple[int, int]] = []
    for item in ids:
        if runs and runs[-1][1] == item:
            runs[-1] = (runs[-1][0], item + 1)
        else:
            runs.append((item, item + 1))
    return runs
