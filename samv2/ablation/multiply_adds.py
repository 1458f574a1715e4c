"""What visits cost, counted anew: from the traces of walks and the shapes of tensors.

A product with a matrix takes one multiply-add an element of the matrix and token.

Shapes: E experts, F rows an expert, D model width, Q rank.
"""

from __future__ import annotations

import math

from samv2.ablation.run_files import RunFiles
from samv2.models.save import read_expert_config


def traced_visits(files: RunFiles) -> list[float]:
    """Experts that a token visits in each converted layer, by the call trace."""
    trace = files.trace
    tokens = sum(item["tokens"] for item in trace)
    layers = len(trace[0]["layers"])
    return [
        sum(sum(item["layers"][layer]["fired"].values()) for item in trace) / tokens
        for layer in range(layers)
    ]


def trained_visits(files: RunFiles) -> dict[int, list[float]]:
    """The same in each round's training, by the clients' usage counts."""
    return {
        number: [
            visits / max(1, sum(one["tokens"] for one in merge["clients"].values()))
            for visits in merge["usage_per_layer"]
        ]
        for number, merge in files.merges.items()
    }


def counted_fraction(files: RunFiles, visits: list[float]) -> float:
    """Multiply-adds of all FFNs over the dense model's.

    Args:
        files: of the run.
        visits: experts that a token visits in each converted layer.
    """
    config, dense = read_expert_config(files.model)
    k = files.settings.experts.experts_per_token
    made = whole = 0.0
    for index in range(dense.num_hidden_layers):
        prefix = f"model.layers.{index}.mlp."
        sizes = {
            name.removeprefix(prefix): math.prod(shape)
            for name, shape in files.shapes.items()
            if name.startswith(prefix)
        }
        if index not in config.layers:
            plain = sum(sizes[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
            made, whole = made + plain, whole + plain
            continue
        walked = visits[config.layers.index(index)]
        blocks = sum(_block(sizes, name) for name in ("gate", "up", "down"))
        made += sizes["gate_weight_ED"] + walked * blocks / config.num_experts
        made += _stand_ins(sizes, k, walked, config.num_experts)
        whole += blocks
    return made / whole


def _stand_ins(sizes: dict[str, int], k: int, walked: float, experts: int) -> float:
    """Multiply-adds a token of what stands in for experts that are not visited."""
    if walked == experts:
        return 0.0
    if f"repair_{k}_in_QD" in sizes:
        return sizes[f"repair_{k}_in_QD"] + sizes[f"repair_{k}_out_QD"]
    if "surrogate_shared_QD" not in sizes:
        return 0.0
    one = sizes["surrogate_out_EQD"] / experts
    # All of them at once less the visited ones, or the absent ones alone.
    return sizes["surrogate_shared_QD"] + one * min(1 + walked, experts - walked)


def _block(sizes: dict[str, int], name: str) -> int:
    """Weights of one projection of all experts; NF4 keeps two in a byte."""
    return sizes.get(f"{name}_EFD") or 2 * sizes[f"{name}_codes_EH"]
