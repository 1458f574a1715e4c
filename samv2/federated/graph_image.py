"""A round's expert graph in pixels: the use of every layer's edges, one layer drawn.

Shapes: L layers, E experts, (H, W, 3) uint8 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from samv2.experts.graph import Edit, ExpertGraph

HEIGHT, WIDTH, DPI = 800, 1280, 100
MAPS = (16, 44, 800, 740)
"""Pixels that the layers' maps may take: left, top, width, height."""
GAP, LABEL, LEAST_NAMED = 4, 12, 24
"""Pixels between maps, above each for its number, and of a side that has a number."""
KEPT, PRUNED, PROMOTED = (0.9, 0.9, 0.9), (0.84, 0.19, 0.15), (0.17, 0.63, 0.17)
"""Colours of an edge that is there and was not walked, and of this round's edits."""
INK = "#333333"
MOST_EDGES = 160
"""Arcs of the layer that is drawn; the busiest are kept."""
MOST_LABELS = 32
"""Experts of a layer that is drawn with their ids."""
POINTS = np.linspace(0.0, 1.0, 24)
"""Along an arc."""


def draw_graph(
    usage_LEE: Tensor, graph: ExpertGraph, edits: Sequence[Edit], *, round: int
) -> np.ndarray:
    """A picture of how a round's walks used the graph.

    On the left a map a layer: from row to column, darker where an edge was walked more
    (logarithmic, each layer by itself), on the diagonal where walks began. On the right
    the layer with most steps, experts in topological order.

    Args:
        usage_LEE: (L, E, E) counts, in positions.
        graph: after the round's edits.
        edits: of the round.
        round: its number.

    Returns:
        (HEIGHT, WIDTH, 3) uint8.
    """
    used_LEE = usage_LEE.numpy().astype(np.float64)
    colours_LEE3 = edge_colours(used_LEE, graph.edge_mask_LEE.numpy(), edits)
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    what = (
        f"Round {round}: edges walked, a map a layer (row to column; darker: more; grey: "
        "never; green: added now, red: removed now)"
    )
    _write(figure, MAPS[0], 20, what)
    maps = list(_maps(colours_LEE3))
    for layer, (x, y, tile) in enumerate(maps):
        if len(tile) >= LEAST_NAMED:
            _write(figure, x, y - 2, str(layer), 7)
    layer = int(np.triu(used_LEE, k=1).sum(axis=(1, 2)).argmax())
    _draw_layer(figure, layer, used_LEE[layer], graph.order_LE[layer].tolist())
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    for x, y, tile in maps:
        pixels[y : y + len(tile), x : x + len(tile)] = np.round(255 * tile)
    return pixels


def edge_colours(
    used_LEE: np.ndarray, kept_LEE: np.ndarray, edits: Sequence[Edit]
) -> np.ndarray:
    """(L, E, E, 3) colours in 0..1 of every edge; white where there is none."""
    scale_LEE = np.log1p(used_LEE)
    most_L11 = scale_LEE.max(axis=(1, 2), keepdims=True)
    part_LEE = np.divide(
        scale_LEE, most_L11, out=np.zeros_like(scale_LEE), where=most_L11 > 0
    )
    colours_LEE3 = np.ones((*used_LEE.shape, 3))
    colours_LEE3[kept_LEE] = KEPT
    walked_LEE = used_LEE > 0
    blues = matplotlib.colormaps["Blues"]
    colours_LEE3[walked_LEE] = blues(0.15 + 0.85 * part_LEE[walked_LEE])[:, :3]
    for edit in edits:
        colour = PROMOTED if edit.kind == "promote" else PRUNED
        colours_LEE3[edit.layer, edit.src, edit.dst] = colour
    return colours_LEE3


def _maps(colours_LEE3: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """x and y of each layer's map, and its colours; whole pixels an edge."""
    left, top, _, _ = MAPS
    layers, experts = colours_LEE3.shape[:2]
    columns, side = grid_of(layers, experts)
    for layer, tile in enumerate(colours_LEE3):
        row, column = divmod(layer, columns)
        if side < experts:
            tile = _shrunk(tile, -(-experts // side))
        else:
            scale = side // experts
            tile = tile.repeat(scale, axis=0).repeat(scale, axis=1)
        x = left + column * (side + GAP)
        yield x, top + row * (side + GAP + LABEL) + LABEL, tile


def grid_of(layers: int, experts: int) -> tuple[int, int]:
    """Columns of the maps, and the pixels of a map's side; as large as they fit."""
    _, _, width, height = MAPS
    best = (1, 0)
    for columns in range(1, layers + 1):
        rows = -(-layers // columns)
        side = min(width // columns - GAP, height // rows - GAP - LABEL)
        if side >= experts:
            side -= side % experts
        if side > best[1]:
            best = (columns, side)
    return best


def _shrunk(tile_EE3: np.ndarray, steps: int) -> np.ndarray:
    """The darkest of every ``steps`` x ``steps`` cells."""
    missing = -len(tile_EE3) % steps
    padded = np.pad(tile_EE3, ((0, missing), (0, missing), (0, 0)), constant_values=1)
    side = len(padded) // steps
    return padded.reshape(side, steps, side, steps, 3).min(axis=(1, 3))


def _draw_layer(
    figure: Figure, layer: int, used_EE: np.ndarray, order: Sequence[int]
) -> None:
    experts = len(order)
    axes = figure.add_axes((0.66, 0.03, 0.32, 0.88))
    axes.set_axis_off()
    src, dst = np.nonzero(np.triu(used_EE, k=1))
    counts = used_EE[src, dst]
    chosen = np.argsort(-counts, kind="stable")[:MOST_EDGES][::-1]
    src, dst, counts = src[chosen], dst[chosen], counts[chosen]
    if len(counts):
        part = counts / counts.max()
        along = src[:, None] + (dst - src)[:, None] * POINTS
        out = (dst - src)[:, None] / 2 * np.sin(np.pi * POINTS)
        blues = matplotlib.colormaps["Blues"](0.35 + 0.65 * np.sqrt(part))
        widest = min(4.0, 64 / experts)
        lines = LineCollection(
            np.stack([out, along], axis=-1),
            linewidths=0.3 + widest * np.sqrt(part),
            colors=blues,
        )
        axes.add_collection(lines)
    visits = used_EE.sum(axis=0)
    sizes = 8 + (2400 / experts) * np.sqrt(visits / max(float(visits.max()), 1.0))
    axes.scatter(np.zeros(experts), np.arange(experts), s=sizes, c=INK, zorder=3)
    if experts <= MOST_LABELS:
        for place, expert in enumerate(order):
            axes.text(-0.06 * experts, place, str(expert), fontsize=8, ha="right")
    axes.set_xlim(-0.12 * experts, max(1.0, 0.52 * experts))
    axes.set_ylim(experts - 0.5, -0.5)
    left_out = int((np.triu(used_EE, k=1) > 0).sum()) - len(counts)
    rest = f"; its {left_out} rarest edges left out" if left_out else ""
    _write(figure, 0.66 * WIDTH, 20, f"Layer {layer}, with most steps{rest}")


def _write(figure: Figure, x: float, y: float, words: str, size: int = 9) -> None:
    """Text whose baseline begins at a pixel, counted from the upper left."""
    figure.text(x / WIDTH, 1 - y / HEIGHT, words, fontsize=size, color=INK)
