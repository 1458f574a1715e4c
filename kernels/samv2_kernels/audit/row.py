"""One row of the audit: everything known about one compiled configuration.

Instructions a weight are thread instructions of the main loop's machine code, times the
threads of a block, over the weights that one turn of that loop consumes. A turn is
``spec.weights_per_step`` weights, times the steps that ptxas unrolled into it: the tensor
instructions of the loop in SASS over those of the same loop in PTX, since ptxas turns each
``mma`` into one machine instruction.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

from samv2_kernels.audit import model, ptx, sass
from samv2_kernels.audit.compile import Artifact
from samv2_kernels.gpu.spec import KernelSpec

NF4_BYTES = 0.5
"""Of a weight's code; its scale comes through another pointer."""
FLOAT_BYTES = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
INTEGERS = ("*i8", "*u8", "*i16", "*u16", "*i32", "*u32", "*i64", "*u64")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one configuration on one architecture; None: has no such thing."""

    kernel: str
    arch: str
    config: str
    rows_per_tile: int
    weights: str
    """``nf4``, ``bf16`` or ``none``."""
    direction: str
    """``forward``, ``dx``, ``dw`` or ``route``."""
    registers: int
    """Per thread."""
    spill_bytes: int
    """Per thread."""
    shared_bytes: int
    """Per block."""
    occupancy: float
    """Share of an SM's warps, 0 to 1; static model."""
    tensor_core_ops: int
    """HMMA (sm_90: HGMMA too) instructions in the whole kernel."""
    widest_weight_load_bytes: int | None
    """Widest load of the weights by one thread; of several weights, the least wide."""
    instructions_per_weight: float | None
    """Thread instructions of the main loop."""
    lsu_per_weight: float | None
    """Those of the load/store unit among them."""
    threads: int
    """Per block."""
    blocks_per_sm: int
    """Static model."""
    code_bytes: int
    has_matmul: bool
    """Whether the source has a ``tl.dot``."""
    steps_per_turn: float | None
    """Steps of the source's main loop in one turn of the compiled one."""
    weights_per_step: int
    """As the spec says."""
    weights_loaded_per_step: int | None
    """As the loads through the weights' pointers say."""
    tensor_share: float | None
    """Tensor-core instructions over all instructions of the main loop."""
    bound: str | None
    """What binds on an A40: ``dram``, ``tensor``, ``issue``, ``lsu``; static model."""
    bound_factor: float | None
    """Its time over the roofline's; static model."""

    def as_json(self) -> dict[str, object]:
        """Plain values, floats rounded to four digits behind the point."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Failure:
    """A configuration that did not become machine code."""

    kernel: str
    arch: str
    config: str
    message: str


@dataclass(frozen=True)
class WeightLoads:
    """How the main loop loads weights."""

    widest_bytes: int
    weights: int
    """Per block and step."""


def weight_loads(spec: KernelSpec, loop: ptx.PtxLoop) -> WeightLoads | None:
    """Which loads of the main loop fetch weights.

    NF4 codes come through integer pointers, other weights through float ones. Among
    these, the weights are the fewest pointers that together load ``weights_per_step``
    weights a step (all such sets count, where several do); if no set matches, those
    that load most.

    Returns:
        None where no such pointer is read in the loop.
    """
    amounts: dict[str, int] = {}
    for name, loads in loop.loads.items():
        kind = spec.signature[name]
        if spec.weights == "nf4" and kind in INTEGERS:
            amounts[name] = int(loads.block_bytes / NF4_BYTES)
        elif spec.weights == "bf16" and kind in FLOAT_BYTES:
            amounts[name] = loads.block_bytes // FLOAT_BYTES[kind]
    if not amounts:
        return None
    for size in range(1, len(amounts) + 1):
        matching = [
            names
            for names in itertools.combinations(sorted(amounts), size)
            if sum(amounts[name] for name in names) == spec.weights_per_step
        ]
        if matching:
            chosen = sorted(set(itertools.chain.from_iterable(matching)))
            widest = min(loop.loads[name].widest_bytes for name in chosen)
            return WeightLoads(widest, spec.weights_per_step)
    most = max(amounts.values())
    chosen = [name for name, amount in amounts.items() if amount == most]
    widest = min(loop.loads[name].widest_bytes for name in chosen)
    return WeightLoads(widest, sum(amounts[name] for name in chosen))


def make_row(spec: KernelSpec, arch: str, artifact: Artifact) -> Row:
    """Read a compiled kernel.

    Raises:
        SassError: its machine code holds something the parser does not know.
    """
    program = sass.parse(artifact.sass)
    source_loop = ptx.main_loop(artifact.ptx, artifact.arguments)
    loop = program.main_loop()
    matmul = spec.weights != "none" and spec.weights_per_step > 0 and loop is not None
    loads = weight_loads(spec, source_loop) if matmul and source_loop else None
    steps = per_weight = verdict = None
    if loop and source_loop:
        steps = loop.tensor_ops / source_loop.tensor_ops
    if matmul and loop and steps:
        per_weight = artifact.threads / (spec.weights_per_step * steps)
        if arch == model.A40_ARCH:
            verdict = model.bound(
                instructions_per_weight=loop.instructions * per_weight,
                lsu_per_weight=loop.lsu * per_weight,
                multiply_adds_per_weight=loop.multiply_adds * per_weight / model.WARP,
                tf32=loop.tf32,
                weights=spec.weights,
            )
    size = (artifact.registers, artifact.shared_bytes, artifact.threads, arch)
    return Row(
        kernel=spec.kernel,
        arch=arch,
        config=spec.config,
        rows_per_tile=spec.rows_per_tile,
        weights=spec.weights,
        direction=spec.direction,
        registers=artifact.registers,
        spill_bytes=artifact.spill_bytes,
        shared_bytes=artifact.shared_bytes,
        occupancy=model.occupancy(*size),
        tensor_core_ops=program.tally().tensor_ops,
        widest_weight_load_bytes=loads.widest_bytes if loads else None,
        instructions_per_weight=loop.instructions * per_weight if per_weight else None,
        lsu_per_weight=loop.lsu * per_weight if per_weight else None,
        threads=artifact.threads,
        blocks_per_sm=model.blocks_per_sm(*size),
        code_bytes=program.code_bytes,
        has_matmul=artifact.has_matmul,
        steps_per_turn=steps,
        weights_per_step=spec.weights_per_step,
        weights_loaded_per_step=loads.weights if loads else None,
        tensor_share=loop.tensor_ops / loop.instructions if loop else None,
        bound=verdict.resource if verdict else None,
        bound_factor=verdict.factor if verdict else None,
    )
