"""Bounds that every run must keep, checked on the files it left.

Nothing here asks the code that ran: files are read as they are, and sums are formed
again. A check returns what is wrong as sentences; none means the bound holds.

Shapes: L converted layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from samv2.ablation.multiply_adds import (
    counted_fraction,
    traced_visits,
    trained_visits,
)
from samv2.ablation.run_files import RunFiles
from samv2.common.errors import SamError
from samv2.models.save import read_expert_config
from samv2.updates.frame_info import inspect, squared_norms

OK = "ok"
REPLY_NUMBERS_BYTES = 5 * 8
"""A reply has two frames and five numbers: version, examples, tokens, loss, seconds."""
_DAMAGE = (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError)


def check_bounds(root: Path) -> dict[str, str]:
    """Every bound of a finished run: ``ok``, or what violates it.

    Args:
        root: run directory of a run with ``federation.keep_frames``.
    """
    files = RunFiles(root=Path(root))
    found = {}
    for name, check in CHECKS.items():
        try:
            faults = list(check(files))
        except (*_DAMAGE, SamError) as error:
            faults = [f"cannot be checked: {type(error).__name__}: {error}"]
        text = "; ".join(faults[:3])
        if len(faults) > 3:
            text += f"; and {len(faults) - 3} more"
        found[name] = " ".join(text.split()) or OK
    return found


def masks_are_triangular(files: RunFiles) -> Iterator[str]:
    """Edge masks everywhere are bool and upper triangular."""
    root = files.root
    yield from _mask_faults("mask_debug.npy", np.load(root / "mask_debug.npy"))
    stored = [*sorted(files.model.glob("*.safetensors"))]
    stored += sorted(root.glob("checkpoints/*/state.safetensors"))
    stored += sorted(root.glob("clients/*/round_*.safetensors"))
    checkpoints = 0
    for path in stored:
        place = path.relative_to(root) if path.is_relative_to(root) else path
        checkpoints += path.parent.parent.name == "checkpoints"
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name.rpartition(".")[2] in ("edge_mask_EE", "edge_mask_LEE"):
                    mask = file.get_tensor(name).numpy()
                    yield from _mask_faults(f"{name} of {place}", mask)
    if not checkpoints:
        yield "there is no checkpoint"


def _mask_faults(name: str, mask: np.ndarray) -> Iterator[str]:
    if mask.dtype != np.bool_:
        yield f"{name} is {mask.dtype}, not bool"
    elif mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        yield f"{name} has shape {mask.shape}, not (..., E, E)"
    elif below := int(np.tril(mask, -1).sum()):
        yield f"{name} has {below} edges below the diagonal"


def edits_are_few(files: RunFiles) -> Iterator[str]:
    """At most ``rho_max`` edits a round, and the graph changed by them alone."""
    limit = files.settings.edits.rho_max
    replayed = _initial_masks(files)
    graphs = {0: replayed.clone()}
    for number in files.rounds():
        if number not in files.merges:
            yield f"merge_round{number}.json is missing"
            return
        edits = files.merges[number]["edits"]
        if len(edits) > limit:
            yield f"round {number} has {len(edits)} edits, rho_max is {limit}"
        reported = files.metrics[number]["edits"]
        if reported != len(edits):
            yield f"round {number} reports {reported} edits and made {len(edits)}"
        for edit in edits:
            edge = (edit["layer"], edit["src"], edit["dst"])
            replayed[edge] = edit["kind"] == "promote"
        graphs[number] = replayed.clone()
    for path in sorted((files.root / "checkpoints").glob("round_*")):
        number = int(path.name.removeprefix("round_"))
        with safe_open(path / "state.safetensors", framework="pt") as file:
            found = file.get_tensor("graph.edge_mask_LEE")
        if number in graphs and not torch.equal(found, graphs[number]):
            changed = int((found != graphs[number]).sum())
            yield f"the graph of {path.name} has {changed} edges that no edit explains"


def _initial_masks(files: RunFiles) -> torch.Tensor:
    """(L, E, E) bool, as the run's model was made."""
    masks: dict[int, torch.Tensor] = {}
    for path in files.model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name.endswith(".edge_mask_EE"):
                    masks[int(name.split(".")[2])] = file.get_tensor(name)
    return torch.stack([mask for _, mask in sorted(masks.items())])


def sent_experts_are_few(files: RunFiles) -> Iterator[str]:
    """At most ``send_experts`` experts of a layer in any update."""
    yield from _missing_frames(files)
    limit = files.settings.federation.send_experts
    config, _ = read_expert_config(files.model)
    layers, experts = len(config.layers), config.num_experts
    for (number, client), frame in files.frames.items():
        ids = [tensor.id for tensor in inspect(frame).tensors]
        sent = [0] * layers
        for id_ in ids:
            if id_ == layers * experts:  # the assembler's
                continue
            of_sibling = (id_ - (id_ > layers * experts)) % (layers * experts)
            sent[of_sibling // experts] += 1
        if limit and max(sent) > limit:
            layer = sent.index(max(sent))
            yield (
                f"client {client} sent {max(sent)} experts of layer {layer} in round "
                f"{number}, send_experts is {limit}"
            )
        told = files.merges[number]["clients"][str(client)]["experts_sent"]
        changed = sum(norm > 0 for norm in squared_norms(frame).values())
        if told != changed:
            yield (
                f"round {number} reports {told} blocks of client {client}, its frame "
                f"changes {changed}"
            )


def updates_are_small(files: RunFiles) -> Iterator[str]:
    """No update has more bytes than ``update_budget_bytes``."""
    yield from _missing_frames(files)
    limit = files.settings.federation.update_budget_bytes
    for (number, client), frame in files.frames.items():
        if len(frame) > limit:
            yield (
                f"client {client} sent {len(frame)} bytes in round {number}, "
                f"update_budget_bytes is {limit}"
            )


def reported_bytes_were_sent(files: RunFiles) -> Iterator[str]:
    """Bytes reported are those of the frames that were kept, and of the numbers.

    Token counts that were sent before round 1 count as that round's and as their client's,
    those that were asked for after a round, as drift has it, as the round's alone.
    """
    yield from _missing_frames(files)
    largest = 0
    for number in files.rounds():
        sizes = {}
        for client in map(int, files.merges[number]["clients"]):
            name = f"round_{number:04d}_client_{client:04d}.usage.bin"
            usage = (files.root / "frames" / name).stat().st_size
            update = len(files.frames.get((number, client), b""))
            sizes[client] = update + usage + REPLY_NUMBERS_BYTES
            counts = files.root / "frames" / f"client_{client:04d}.counts.bin"
            if number == 1 and counts.is_file():
                sizes[client] += counts.stat().st_size
            told = files.merges[number]["clients"][str(client)]["bytes_up"]
            if told != sizes[client]:
                yield (
                    f"round {number} reports {told} bytes of client {client}, "
                    f"{sizes[client]} were sent"
                )
        row = files.metrics[number]
        asked_for = (files.root / "frames").glob(f"round_{number:04d}_*.counts.bin")
        told_later = sum(path.stat().st_size for path in asked_for)
        for key, measured in (
            ("bytes_up", sum(sizes.values()) + told_later),
            ("bytes_up_per_client", max(sizes.values(), default=0)),
        ):
            if row[key] != measured:
                yield f"round {number} reports {key} {row[key]}, sent were {measured}"
        largest = max(largest, *sizes.values()) if sizes else largest
    told = files.summary["bytes_up_per_client_round"]
    if told != largest:
        yield f"summary.json reports {told} bytes a client and round, sent were {largest}"


def _missing_frames(files: RunFiles) -> Iterator[str]:
    """Frames that should have been kept, and others that nobody merged."""
    merged = {
        (number, int(client))
        for number, merge in files.merges.items()
        for client in merge["clients"]
    }
    for number, client in sorted(merged - files.frames.keys()):
        yield f"the update of client {client} in round {number} was not kept"
    for number, client in sorted(files.frames.keys() - merged):
        yield f"an update of client {client} in round {number} was kept, none was merged"
    for (number, client), frame in files.frames.items():
        if (found := inspect(frame).round) != number:
            yield f"the update of client {client} in round {number} is of round {found}"


def reported_flops_are_counted(files: RunFiles) -> Iterator[str]:
    """The FLOPs fraction is what the visits of the call trace cost, by tensor shapes.

    Nor do tokens visit more experts when they train.
    """
    visits = traced_visits(files)
    counted = counted_fraction(files, visits)
    told = files.summary["ffn_flops_fraction"]
    if abs(told - counted) > 1e-9 * max(told, counted):
        yield (
            f"summary.json reports {told:.6g} of the dense FFN's multiply-adds, the "
            f"experts that fired take {counted:.6g}"
        )
    for number, walked in trained_visits(files).items():
        for layer, (found, allowed) in enumerate(zip(walked, visits)):
            if found > allowed * (1 + 1e-9):
                yield (
                    f"tokens visit {found:.4g} experts of layer {layer} in round "
                    f"{number}, the reported cost is of {allowed:.4g}"
                )


CHECKS: dict[str, Callable[[RunFiles], Iterator[str]]] = {
    "check_masks": masks_are_triangular,
    "check_edits": edits_are_few,
    "check_sent_experts": sent_experts_are_few,
    "check_update_bytes": updates_are_small,
    "check_reported_bytes": reported_bytes_were_sent,
    "check_reported_flops": reported_flops_are_counted,
}
"""Columns of ``ablation.csv`` by the check behind them."""
