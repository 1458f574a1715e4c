"""``samv2 inspect``: what a packed update holds, tensor by tensor."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samv2.cli import existing_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from samv2.common.errors import FrameError
    from samv2.updates.frame_info import FrameInfo, TensorInfo

DESCRIPTION = """\
Describes a frame, the packed form of an update: header, and for each tensor how many
elements are stored, how their positions are coded, and what every part costs in bytes.
No model is needed. Index streams and values are checked as a receiver checks them, so a
damaged frame is refused here too, with exit status 1 and the reason that a server would
log; only ids, sizes and round, which a server knows better, are not compared.
"""
EPILOG = """\
frames of a run:
  samv2 train --set federation.keep_frames=true --log-dir runs/1
  samv2 inspect runs/1/frames/round_0001_client_0000.bin

words of the table:
  dtype     of the decoded tensor
  codec     of the values: raw is bit for bit
  stored    elements that have a value in the frame; all others are zero
  blocks    how positions are coded, a block of up to 65,536 elements at a time: absent
            (all zero), dense (all stored), bitmap, Rice gaps (between stored elements),
            Rice zeros (gaps between the others), Rice runs (lengths of both in turn)
  index, values, scales, header
            bytes; header: directory entry, block descriptors and padding
  x dense   bytes of the dense tensor over bytes in the frame
"""
COLUMNS = ("id", "dtype", "codec", "stored", "of", "share", "blocks") + (
    "index",
    "values",
    "scales",
    "header",
    "x dense",
)
TEXT_COLUMNS = ("id", "dtype", "codec", "blocks")
DTYPE_WORDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BLOCK_WORDS = {
    "absent": "absent",
    "dense": "dense",
    "bitmap": "bitmap",
    "rice": "Rice gaps",
    "rice_zeros": "Rice zeros",
    "runs": "Rice runs",
}
DIRECTORY_ENTRY_BYTES = 32


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "inspect",
        help="what a packed update holds, tensor by tensor",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", type=existing_file, metavar="FILE", help="a file that holds one frame"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    from samv2.common.errors import FrameError
    from samv2.common.telemetry import make_console
    from samv2.updates.frame_info import inspect, verify

    path: Path = arguments.file
    frame = path.read_bytes()
    info, refusal = None, None
    try:
        info = inspect(frame)
        verify(frame)
    except FrameError as error:
        refusal = error
    if arguments.json:
        print(json.dumps(_to_json(path, len(frame), info, refusal), indent=1))
    else:
        if info is not None:
            _show(path, info, make_console())
        if refusal is not None:
            _show_refusal(path, refusal, make_console(stderr=True))
    return 0 if refusal is None else 1


def _show(path: Path, info: FrameInfo, console: Console) -> None:
    header = {
        "version": ".".join(map(str, info.version)),
        "values": "lossless, bit for bit" if info.lossless else "rounded by a codec",
        "sender": (
            "keeps what was lost for a later round (error feedback)"
            if info.error_feedback
            else "keeps nothing for a later round"
        ),
        "round": str(info.round),
        "manifest": f"fingerprint {info.fingerprint:016x}",
        "bytes": f"{info.total_bytes:,}",
    }
    console.print(path, style="bold", markup=False, soft_wrap=True)
    for name, text in header.items():
        console.print(f"  {name:<9} {text}")
    console.print()
    console.print(_table(info))


def _table(info: FrameInfo) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0))
    for name in COLUMNS:
        side = "left" if name in TEXT_COLUMNS else "right"
        table.add_column(name, justify=side, overflow="fold")
    for tensor in info.tensors:
        table.add_row(*_row(tensor))
    table.add_section()
    table.add_row(*_totals(info), style="bold")
    return table


def _row(tensor: TensorInfo) -> list[str]:
    blocks = [
        f"{count:,} {BLOCK_WORDS[mode]}"
        for mode, count in tensor.modes.items()
        if count
    ]
    return [
        str(tensor.id),
        DTYPE_WORDS[_dtype(tensor)],
        tensor.codec,
        f"{tensor.nnz:,}",
        f"{tensor.numel:,}",
        _share(tensor.nnz, tensor.numel),
        "\n".join(blocks) or "-",
        f"{tensor.index_bytes:,}",
        f"{tensor.value_bytes:,}",
        f"{tensor.scale_bytes:,}",
        f"{_header_bytes(tensor):,}",
        _times(_dense_bytes(tensor), tensor.body_bytes + DIRECTORY_ENTRY_BYTES),
    ]


def _totals(info: FrameInfo) -> list[str]:
    """Header and trailer of the frame count as header."""
    nnz, numel, index, values, scales = (
        sum(getattr(tensor, name) for tensor in info.tensors)
        for name in ("nnz", "numel", "index_bytes", "value_bytes", "scale_bytes")
    )
    header = info.total_bytes - index - values - scales
    dense = sum(_dense_bytes(tensor) for tensor in info.tensors)
    return [
        "all",
        "",
        "",
        f"{nnz:,}",
        f"{numel:,}",
        _share(nnz, numel),
        "",
        *(f"{size:,}" for size in (index, values, scales, header)),
        _times(dense, info.total_bytes),
    ]


def _show_refusal(path: Path, refusal: FrameError, console: Console) -> None:
    from rich.markup import escape

    console.print(
        f"[bold red]error:[/bold red] {escape(f'{path} is refused: {refusal}')}",
        f"{refusal.reason}: {escape(_meaning(refusal))}. If this is a frame at all, get "
        "it from its sender again; docs/wire_format.md has the rules.",
        sep="\n",
        soft_wrap=True,
    )


def _to_json(
    path: Path, size: int, info: FrameInfo | None, refusal: FrameError | None
) -> dict[str, Any]:
    from dataclasses import asdict

    found: dict[str, Any] = {"file": str(path), "bytes": size, "refused": None}
    if refusal is not None:
        found["refused"] = {
            "reason": refusal.reason,
            "meaning": _meaning(refusal),
            "message": str(refusal),
        }
    if info is None:
        return found
    return found | {
        "version": list(info.version),
        "lossless": info.lossless,
        "error_feedback": info.error_feedback,
        "round": info.round,
        "fingerprint": f"{info.fingerprint:016x}",
        "tensors": [
            asdict(tensor)
            | {
                "dtype": _dtype(tensor),
                "header_bytes": _header_bytes(tensor),
                "dense_bytes": _dense_bytes(tensor),
            }
            for tensor in info.tensors
        ],
    }


def _meaning(refusal: FrameError) -> str:
    from samv2.updates.frame_reasons import REASONS

    return REASONS.get(refusal.reason, "a reason that this version does not know")


def _dtype(tensor: TensorInfo) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _header_bytes(tensor: TensorInfo) -> int:
    content = tensor.index_bytes + tensor.value_bytes + tensor.scale_bytes
    return DIRECTORY_ENTRY_BYTES + tensor.body_bytes - content


def _dense_bytes(tensor: TensorInfo) -> int:
    return tensor.numel * tensor.dtype.itemsize


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g}%" if whole else "-"


def _times(dense: int, packed: int) -> str:
    return f"{dense / packed:,.2f}" if dense else "-"
