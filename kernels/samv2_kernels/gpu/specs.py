"""Every kernel in every configuration that ships, for compilation without a GPU.

Shapes are those of Llama-2-7B (4,096 wide, 16 experts of 688 rows) and SmolLM2-135M (576
wide, 16 experts of 96 rows), with rank-16 adapters and rank-64 surrogates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from samv2_kernels.gpu import sort, walk
from samv2_kernels.gpu.along_rows import to_tokens_kernel
from samv2_kernels.gpu.along_width import gate_up_kernel, hidden_grad_kernel
from samv2_kernels.gpu.configs import TABLE, Config
from samv2_kernels.gpu.low_rank import adapter_grad_kernel, project_kernel
from samv2_kernels.gpu.spec import KernelSpec

SHAPES = {"llama-2-7b": (4096, 688), "smollm2": (576, 96)}
"""(D, F) of one expert."""
SLOTS, RANK, SURROGATE_RANK = 2, 16, 64


def shipped_specs(arch: str) -> list[KernelSpec]:
    """What ships on an architecture.

    Args:
        arch: ``sm_80``, ``sm_86``, ``sm_89`` or ``sm_90``.
    """
    # float32 is for checking: it has no tensor cores, and no budgets.
    experts = [
        spec
        for (kernel, weights), options in TABLE.items()
        for option in (options if weights != "float32" else ())
        for spec in _BUILDERS[kernel](weights, option)
    ]
    return [*experts, *sort.audited(arch), *walk.audited(arch)]


def _matrix(kind: str, weights: str, mark: str = "", end: str = "") -> dict[str, str]:
    """Types of one matrix's pointers.

    Args:
        kind: of weights.
        weights: what the kernel calls them.
        mark: what the names of its magnitudes begin with.
        end: and end with.
    """
    second = "*bf16" if kind == "float" else "*fp32"
    return {
        f"{weights}_ptr": "*bf16" if kind == "float" else "*i16",
        f"{mark}absmax{end}_ptr": "*u8" if kind == "nested" else second,
        f"{mark}second{end}_ptr": second,
        f"{mark}offset{end}_ptr": second,
        "table_ptr": second,
    }


def _spec(
    kernel: str,
    function: Any,
    config: Config,
    label: str,
    *,
    types: Mapping[str, str],
    constexprs: Mapping[str, Any],
    direction: str,
    weights: str = "none",
    per_step: int = 0,
    divisible: tuple[str, ...] = (),
) -> KernelSpec:
    names = [name for name in function.arg_names if name not in constexprs]
    common = {
        "order_ptr": "*i32",
        "tiles_ptr": "*i32",
        "offsets_ptr": "*i32",
        "base_ptr": "*i64",
        "combine_ptr": "*fp32",
        "reached_ptr": "*fp32",
    }
    known = {**common, **types}
    return KernelSpec(
        kernel=kernel,
        config=f"{config} {label}",
        function=function,
        signature={
            name: known.get(name, "*bf16" if name.endswith("_ptr") else "i32")
            for name in names
        },
        constexprs=constexprs,
        divisible=divisible,
        num_warps=config.warps,
        num_stages=config.stages,
        rows_per_tile=config.rows,
        weights=weights,  # type: ignore[arg-type]
        direction=direction,  # type: ignore[arg-type]
        weights_per_step=per_step,
    )


def _kind(kind: str, D: int, F: int) -> dict[str, Any]:
    """Constexprs that tell what weights are."""
    seconds = -(-F * D // 64 // 256) if kind == "nested" else 0
    return {
        "SLOTS": SLOTS,
        "D": D,
        "NF4": kind != "float",
        "NESTED": kind == "nested",
        "SECONDS": seconds,
        "HAS_BASE": True,
    }


def _weights(kind: str) -> str:
    return "bf16" if kind == "float" else "nf4"


def _gate_up(kind: str, config: Config) -> Iterator[KernelSpec]:
    hidden = "*bf16" if kind == "float" else "*fp16"
    for shape, (D, F) in SHAPES.items():
        yield _spec(
            "gate_up",
            gate_up_kernel,
            config,
            f"{kind} {shape}",
            types={
                **_matrix(kind, "gate", "gate_"),
                **_matrix(kind, "up", "up_"),
                "hidden_ptr": hidden,
            },
            constexprs={
                **_kind(kind, D, F),
                "R": RANK,
                "RANK_BLOCK": RANK,
                "SAVE": True,
                "BLOCK_M": config.rows,
                "BLOCK_N": config.columns,
                "BLOCK_K": config.step,
            },
            direction="forward",
            weights=_weights(kind),
            per_step=config.columns * config.step,
            divisible=("F", "length"),
        )


def _hidden_grad(kind: str, config: Config) -> Iterator[KernelSpec]:
    hidden = "*bf16" if kind == "float" else "*fp16"
    types = {
        **_matrix(kind, "down"),
        "gate_grad_ptr": hidden,
        "up_grad_ptr": hidden,
        "combine_part_ptr": "*fp32",
    }
    for shape, (D, F) in SHAPES.items():
        yield _spec(
            "hidden_grad",
            hidden_grad_kernel,
            config,
            f"{kind} {shape}",
            types=types,
            constexprs={
                **_kind(kind, D, F),
                "R": RANK,
                "RANK_BLOCK": RANK,
                "BLOCK_M": config.rows,
                "BLOCK_N": config.columns,
                "BLOCK_K": config.step,
            },
            direction="dx",
            weights=_weights(kind),
            per_step=config.columns * config.step,
            divisible=("F", "length"),
        )


def _along_rows(two: bool) -> Callable[[str, Config], Iterator[KernelSpec]]:
    def build(kind: str, config: Config) -> Iterator[KernelSpec]:
        rows = "*bf16" if kind == "float" else "*fp16"
        types = {
            **_matrix(kind, "weight"),
            **_matrix(kind, "weight2", end="2"),
            "rows_ptr": rows,
            "rows2_ptr": rows,
            "out_ptr": "*fp32",
        }
        for shape, (D, F) in SHAPES.items():
            rank = 0 if two else SURROGATE_RANK
            yield _spec(
                "input_grad" if two else "to_tokens",
                to_tokens_kernel,
                config,
                f"{kind} {shape}",
                types=types,
                constexprs={
                    **_kind(kind, D, F),
                    "F": F,
                    "Q": rank,
                    "RANK_BLOCK": max(rank, 16),
                    "TWO": two,
                    "BLOCK_M": config.rows,
                    "BLOCK_N": config.columns,
                    "BLOCK_F": config.step,
                },
                direction="dx" if two else "forward",
                weights=_weights(kind),
                per_step=config.columns * config.step * (1 + two * (kind != "float")),
            )

    return build


def _project(kind: str, config: Config) -> Iterator[KernelSpec]:
    yield _spec(
        "project",
        project_kernel,
        config,
        kind,
        types={
            "weight_ptr": "*fp32",
            "dots_ptr": "*fp32",
            "out_ptr": "*fp32",
        },
        constexprs={
            "SLOTS": SLOTS,
            "R": RANK,
            "RANK_BLOCK": RANK,
            "BY_TOKEN": False,
            "NEGATE": False,
            "BLOCK_M": config.rows,
        },
        direction="dw",
        divisible=("LENGTH",),
    )


def _adapter_grad(kind: str, config: Config) -> Iterator[KernelSpec]:
    yield _spec(
        "adapter_grad",
        adapter_grad_kernel,
        config,
        kind,
        types={},
        constexprs={
            "SLOTS": SLOTS,
            "R": RANK,
            "RANK_BLOCK": RANK,
            "BLOCK_M": config.rows,
            "BLOCK_F": config.columns,
        },
        direction="dw",
        divisible=("F",),
    )


_BUILDERS: Mapping[str, Callable[[str, Config], Iterator[KernelSpec]]] = {
    "gate_up": _gate_up,
    "hidden_grad": _hidden_grad,
    "to_tokens": _along_rows(two=False),
    "input_grad": _along_rows(two=True),
    "project": _project,
    "adapter_grad": _adapter_grad,
}
