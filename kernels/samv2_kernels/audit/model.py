"""Static models: how many blocks fit an SM, and what binds the main loop on an A40.

Nothing here is a measurement: no latency, bank conflict or cache enters. Occupancy
follows NVIDIA's occupancy calculator (registers in units of 256 a warp, split over four
sub-partitions; 1 KiB of shared memory reserved per block); limits per architecture from
the "Technical Specifications per Compute Capability" table of the CUDA programming guide.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS_PER_SM = 64 * KIB
REGISTER_UNIT = 256
SUB_PARTITIONS = 4
SHARED_UNIT = 128
SHARED_RESERVED = 1 * KIB
WARP = 32


@dataclass(frozen=True)
class Architecture:
    """Limits of one SM."""

    warps: int
    blocks: int
    shared_bytes: int
    """Of all blocks together."""
    shared_bytes_per_block: int
    """The most that one block can ask for."""


ARCHITECTURES = {
    "sm_80": Architecture(64, 32, 164 * KIB, 163 * KIB),
    "sm_86": Architecture(48, 16, 100 * KIB, 99 * KIB),
    "sm_89": Architecture(48, 24, 100 * KIB, 99 * KIB),
    "sm_90": Architecture(64, 32, 228 * KIB, 227 * KIB),
}


@dataclass(frozen=True)
class Machine:
    """Rates of one SM per clock."""

    warp_instructions: float
    lsu_warp_instructions: float
    bf16_multiply_adds: float
    dram_bytes: float


A40_ARCH = "sm_86"
A40 = Machine(
    warp_instructions=4,
    lsu_warp_instructions=1,
    bf16_multiply_adds=512,
    dram_bytes=4.76,
)
"""84 SMs at 1.74 GHz and 696 GB/s: 4.76 bytes a clock and SM; NVIDIA's data sheet."""

BYTES_PER_WEIGHT = {"nf4": 0.5 + 4 / 64, "bf16": 2.0}
"""From DRAM; NF4 has one fp32 absmax per block of 64."""


@dataclass(frozen=True)
class Bound:
    """What binds a main loop in the model."""

    resource: str
    """``dram``, ``tensor``, ``issue`` or ``lsu``."""
    factor: float
    """Its time over the larger one of DRAM's and the tensor cores'; 1 is the roofline."""


def round_up(value: int, unit: int) -> int:
    """Smallest multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


def blocks_per_sm(registers: int, shared_bytes: int, threads: int, arch: str) -> int:
    """Blocks that an SM holds at once.

    Args:
        registers: per thread.
        shared_bytes: per block, as the kernel asks for.
        threads: per block.
        arch: a key of :data:`ARCHITECTURES`.

    Returns:
        0 where not even one block fits.
    """
    limits = ARCHITECTURES[arch]
    if shared_bytes > limits.shared_bytes_per_block:
        return 0
    warps = -(-threads // WARP)
    per_warp = round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    warps_by_registers = (
        REGISTERS_PER_SM // SUB_PARTITIONS // per_warp
    ) * SUB_PARTITIONS
    shared = round_up(shared_bytes + SHARED_RESERVED, SHARED_UNIT)
    return min(
        warps_by_registers // warps,
        limits.shared_bytes // shared,
        limits.warps // warps,
        limits.blocks,
    )


def occupancy(registers: int, shared_bytes: int, threads: int, arch: str) -> float:
    """Share of an SM's warps that can be resident, 0 to 1."""
    blocks = blocks_per_sm(registers, shared_bytes, threads, arch)
    return blocks * -(-threads // WARP) / ARCHITECTURES[arch].warps


def bound(
    *,
    instructions_per_weight: float,
    lsu_per_weight: float,
    multiply_adds_per_weight: float,
    tf32: bool,
    weights: str,
    machine: Machine = A40,
) -> Bound:
    """What binds a main loop whose weights come from DRAM once.

    Args:
        instructions_per_weight: thread instructions.
        lsu_per_weight: thread instructions of the load/store unit.
        multiply_adds_per_weight: on tensor cores.
        tf32: tensor cores run at half their bf16 rate.
        weights: a key of :data:`BYTES_PER_WEIGHT`.
        machine: rates of one SM.

    Returns:
        The slowest resource and its time over ``max(DRAM, tensor at the bf16 rate)``.
    """
    tensor = multiply_adds_per_weight / machine.bf16_multiply_adds
    clocks = {
        "dram": BYTES_PER_WEIGHT[weights] / machine.dram_bytes,
        "tensor": tensor * (2 if tf32 else 1),
        "issue": instructions_per_weight / WARP / machine.warp_instructions,
        "lsu": lsu_per_weight / WARP / machine.lsu_warp_instructions,
    }
    resource = max(clocks, key=lambda name: clocks[name])
    return Bound(resource, clocks[resource] / max(clocks["dram"], tensor))
