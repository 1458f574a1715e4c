"""The files a run leaves for people and tools: merges, sizes, masks, traces, summary."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samv2.common.files import write_bytes, write_json
from samv2.common.settings import Settings
from samv2.experts.moe_layers import WalkOptions
from samv2.federated.client_rows import refused_by_reason
from samv2.federated.drift import SiblingChange
from samv2.federated.server_merge import MergeReport
from samv2.federated.strategy import RoundReport
from samv2.models.expert_model import ExpertModel
from samv2.models.perplexity import Score
from samv2.updates.packing import Manifest, inspect
from samv2.updates.sparsify import VALUE_BITS
from samv2.updates.stored import read_frame
from samv2_kernels import Walk

USAGE = "usage.jsonl"
PACK_COLUMNS = (
    "round",
    "client",
    "experts_sent",
    "experts_all",
    "dense_all_B",
    "dense_sent_B",
    "codec_B",
    "frame_B",
    "x_selection",
    "x_codec",
    "x_index",
    "x_total",
)


def write_merge(
    root: Path, report: MergeReport, changes: Sequence[SiblingChange] = ()
) -> None:
    """``merge_round{N}.json``, with what was done about changed text as ``siblings``."""
    content = report.to_json() | {"siblings": [asdict(change) for change in changes]}
    write_json(Path(root) / f"merge_round{report.round}.json", content)


def metrics_row(report: RoundReport) -> dict[str, Any]:
    """A round's object of ``metrics.jsonl``."""
    replies = report.merge.replies
    tokens = sum(reply.tokens for reply in replies)
    loss = sum(reply.train_loss * reply.tokens for reply in replies) / max(tokens, 1)
    return {
        "round": report.merge.round,
        "clients": len(replies),
        "refused": len(report.merge.refusals),
        "refused_by_reason": refused_by_reason(report.merge.refusals),
        "train_loss": loss,
        "perplexity": perplexities(report.scores),
        "bytes_up": sum(reply.bytes_up for reply in replies)
        + sum(report.drift.bytes_up.values()),
        "bytes_up_per_client": max((reply.bytes_up for reply in replies), default=0),
        "bytes_down": report.bytes_down_all,
        "bytes_down_per_client": report.bytes_down,
        "edits": len(report.merge.edits),
        "experts_updated": len(report.merge.contributors),
        "sibling_changes": len(report.drift.changes),
        "graph_version": report.merge.graph_version,
        "seconds": dict(report.seconds),
    }


def perplexities(scores: Mapping[str, Score]) -> dict[str, float | None]:
    """Perplexity by domain; None where it is beyond what a float holds."""
    found = {name: score.perplexity for name, score in scores.items()}
    return {key: x if math.isfinite(x) else None for key, x in found.items()}


def append_pack_sizes(root: Path, report: MergeReport, manifest: Manifest) -> None:
    """Add a round to ``pack_sizes.txt``: what each stage saved, kept apart.

    ``x_selection`` is what sending some experts instead of all saved, ``x_codec`` what
    the value codec saved, ``x_index`` what leaving out zeros saved less the frame's own
    bytes; their product is ``x_total``.
    """
    path = Path(root) / "pack_sizes.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in lines if _round_of(line) < report.round]
    if not lines:
        lines = ["# bytes of updates; dense is float32", " ".join(PACK_COLUMNS)]
    dense_all = sum(4 * manifest.numel(key) for key in manifest.ids)
    for reply in report.replies:
        info = inspect(reply.contribution.read())
        dense_sent = sum(4 * tensor.numel for tensor in info.tensors)
        coded = sum(t.numel * VALUE_BITS[t.codec] / 8 for t in info.tensors)
        row = (
            report.round,
            reply.contribution.client,
            len(info.tensors),
            len(manifest.ids),
            dense_all,
            dense_sent,
            round(coded),
            info.total_bytes,
            f"{dense_all / dense_sent:.3f}",
            f"{dense_sent / coded:.3f}",
            f"{coded / info.total_bytes:.3f}",
            f"{dense_all / info.total_bytes:.3f}",
        )
        lines.append(" ".join(str(value) for value in row))
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def usage_row(report: MergeReport) -> dict[str, Any]:
    """A round's object of ``usage.jsonl``: how often each edge was walked, and wanted.

    Per converted layer the upper triangle of (E, E), row by row: on the diagonal how
    often a walk entered at an expert, beside it how often it went from one to the next.
    """
    experts = report.counts.usage_LEE.shape[1]
    rows, columns = torch.triu_indices(experts, experts)
    return {
        "round": report.round,
        "experts": experts,
        "usage": report.counts.usage_LEE[:, rows, columns].tolist(),
        "demand": report.counts.demand_LEE[:, rows, columns].tolist(),
    }


def keep_counts(
    root: Path, frames: Mapping[int, bytes], *, round: int | None = None
) -> None:
    """``frames/client_{I}.counts.bin``: the token counts that clients sent.

    Those that were asked for after a round, because text may have changed, are
    ``frames/round_{N}_client_{I}.counts.bin``.
    """
    when = "" if round is None else f"round_{round:04d}_"
    for client, frame in frames.items():
        name = f"{when}client_{client:04d}.counts.bin"
        write_bytes(Path(root) / "frames" / name, frame)


def keep_frames(root: Path, report: MergeReport) -> None:
    """``frames/round_{N}_client_{I}.bin``: the updates of a round, byte for byte.

    The counts that came with an update are beside it, ``….usage.bin``.
    """
    for reply in report.replies:
        item = reply.contribution
        name = f"round_{report.round:04d}_client_{item.client:04d}"
        write_bytes(Path(root) / "frames" / f"{name}.bin", item.read())
        write_bytes(
            Path(root) / "frames" / f"{name}.usage.bin", read_frame(reply.usage)
        )


def _round_of(line: str) -> int:
    first = line.split(" ", 1)[0]
    return int(first) if first.isdigit() else -1


def write_mask_debug(root: Path, model: ExpertModel, tokens_BS: Tensor) -> None:
    """``mask_debug.npy``: (L, B, E, E) bool, the first effective masks of the run.

    One mask per converted layer and sequence, as the assembler emits them for the
    sequence's prefix; without an assembler, the server graph with B = 1.
    """
    masks: list[Tensor] = []
    if model.assembler is None:
        masks = [layer.edge_mask_EE.unsqueeze(0) for layer in model.expert_layers]
    else:
        contexts = prefix_contexts(model, tokens_BS)
        for index, layer in enumerate(model.expert_layers):
            made = model.assembler(contexts[index], index, layer.edge_mask_EE)
            masks.append(made.detach() > 0.5)
    stacked = torch.stack(masks).numpy()
    path = Path(root) / "mask_debug.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, stacked)


@torch.no_grad()
def prefix_contexts(model: ExpertModel, tokens_BS: Tensor) -> list[Tensor]:
    """Each converted layer's context (B, D): the mean FFN input of the prefix."""
    contexts: list[Tensor] = []
    hooks = []
    for layer in model.expert_layers:

        def keep(module: Any, args: tuple[Any, ...]) -> None:
            head_BSD = args[0][:, : module.prefix_tokens]
            contexts.append(head_BSD.float().mean(dim=1))

        hooks.append(layer.register_forward_pre_hook(keep))
    try:
        model.hidden_states(tokens_BS)
    finally:
        for hook in hooks:
            hook.remove()
    return contexts


@torch.no_grad()
def write_call_trace(
    root: Path, model: ExpertModel, sequences: Mapping[str, Tensor]
) -> None:
    """``expert_call_trace.json``: which experts fired, per sequence and layer.

    For each sequence and converted layer: how many tokens each expert served, and the
    walk of the last token, in order, with parents and depths.

    Args:
        root: the run directory.
        model: the expert model, walking its current graph.
        sequences: {name: (S,) token ids}.
    """
    trace = []
    for name, tokens_S in sequences.items():
        layers: list[dict[str, Any]] = []

        def record(layer: int, walked: Walk) -> None:
            layers.append(_layer_trace(layer, walked))

        options = WalkOptions(recorder=record)
        model.hidden_states(tokens_S.unsqueeze(0), options)
        trace.append({"sequence": name, "tokens": len(tokens_S), "layers": layers})
    write_json(Path(root) / "expert_call_trace.json", trace)


def _layer_trace(layer: int, walked: Walk) -> dict[str, Any]:
    ids = walked.expert_ids_TK
    fired = Counter(ids[ids >= 0].tolist())
    last = []
    rows = zip(
        ids[-1].tolist(),
        walked.parent_slot_TK[-1].tolist(),
        walked.depth_TK[-1].tolist(),
    )
    for expert, parent_slot, depth in rows:
        if expert < 0:
            break
        parent = int(ids[-1, parent_slot]) if parent_slot >= 0 else None
        last.append({"expert": expert, "parent": parent, "depth": depth})
    return {
        "layer": layer,
        "fired": {str(expert): count for expert, count in sorted(fired.items())},
        "walk_of_last_token": last,
    }


def fedit_bytes(
    *, model_width: int, ffn_width: int, num_layers: int, rank: int = 8
) -> int:
    """Bytes a FedIT client uploads a round: rank-8 LoRA on the same FFNs, float32."""
    return num_layers * 3 * rank * (model_width + ffn_width) * 4


def build_summary(
    *,
    model: str,
    dense: Mapping[str, float | None],
    start: Mapping[str, float | None],
    final: Mapping[str, float | None],
    flops_fraction: float,
    rows: Sequence[Mapping[str, Any]],
    refusals: Mapping[str, Mapping[str, int]],
    fedit: int,
    settings: Settings,
    seconds: Mapping[str, float],
    heterogeneity: Mapping[str, float],
) -> dict[str, Any]:
    """The content of ``summary.json``; a perplexity that is not known is null.

    ``refusals`` is {client: {reason: how often}}.
    """
    parts = {"dense": dense, "start": start, "final": final}
    return {
        "model": model,
        "domains": {
            name: {part: values.get(name) for part, values in parts.items()}
            for name in sorted(start.keys() | final.keys())
        },
        "ffn_flops_fraction": flops_fraction,
        "experts": {
            "num_experts": settings.experts.num_experts,
            "experts_per_token": settings.experts.experts_per_token,
            "layers": settings.experts.layers,
        },
        "bytes_up_per_client_round": max(
            (row["bytes_up_per_client"] for row in rows), default=0
        ),
        "bytes_down_per_client_round": max(
            (row["bytes_down_per_client"] for row in rows), default=0
        ),
        "fedit_bytes_per_client_round": fedit,
        "rounds": len(rows),
        "clients": settings.federation.clients,
        "edits": sum(row["edits"] for row in rows),
        "refused": sum(row["refused"] for row in rows),
        "refusals": {client: dict(counts) for client, counts in refusals.items()},
        "heterogeneity": dict(heterogeneity),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def read_summary(root: Path) -> dict[str, Any]:
    """``summary.json`` of a run."""
    return json.loads((Path(root) / "summary.json").read_text(encoding="utf-8"))
