"""Which pointer argument every load of the main loop reads, from the kernel's PTX.

SASS does not say whose bytes a load fetches: its registers are reused, and staged loads
pass through shared memory. PTX has one name per value, and ptxas keeps the width of its
loads. So each 64-bit register gets the set of pointer arguments that its address was
computed from (to a fixed point, as loops carry addresses; a load from memory cuts the
trail), and each load of the main loop is charged to the arguments of its address. Each
load of the loop counts as run by every thread, predicates aside.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

LABEL = re.compile(r"(\$L\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+);")
MATMUL = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)\b")
PARAMETER = re.compile(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]")
WIDE = re.compile(r"%rd\d+")
THREADS = re.compile(r"\.reqntid\s+(\d+)")
COPY = re.compile(
    r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^]]*\],\s*\[\s*(%rd\d+)[^]]*\],"
    r"\s*(0x[0-9a-f]+|\d+)"
)
LOAD = re.compile(
    r"ld(?:\.volatile|\.relaxed\.\w+)?\.global(?:\.(?!v\d|[busf]\d)[\w:]+)*"
    r"(?:\.v(\d))?\.[busf](\d+)\s+[^\[]*\[\s*(%rd\d+)"
)


@dataclass(frozen=True)
class PointerLoads:
    """Loads of the main loop through one pointer argument."""

    widest_bytes: int
    """Of one load by one thread."""
    block_bytes: int
    """All loads of one turn by all threads of a block."""


@dataclass(frozen=True)
class PtxLoop:
    """The main loop before ptxas unrolls anything."""

    tensor_ops: int
    """Matmul instructions of one warp (or warpgroup) in one turn."""
    loads: dict[str, PointerLoads]
    """By argument name."""


def thread_count(ptx: str) -> int:
    """Threads of a block."""
    match = THREADS.search(ptx)
    if not match:
        raise ValueError("the PTX names no .reqntid: is it a Triton kernel?")
    return int(match[1])


def address_sources(lines: Sequence[str]) -> dict[str, frozenset[int]]:
    """64-bit register -> indices of the parameters that its address comes from."""
    sources: dict[str, frozenset[int]] = {}
    flows: list[tuple[str, list[str]]] = []
    for line in lines:
        if match := PARAMETER.search(line):
            sources[match[1]] = frozenset({int(match[2])})
        elif "[" not in line and ";" in line:
            target, *operands = line.split(",")
            registers = WIDE.findall(target)
            operand_registers = WIDE.findall(",".join(operands))
            if registers and operand_registers:
                flows.append((registers[-1], operand_registers))
    changed = True
    while changed:
        changed = False
        for target, operands in flows:
            old = sources.get(target, frozenset())
            new = old.union(*(sources.get(register, ()) for register in operands))
            if new != old:
                sources[target], changed = new, True
    return sources


def main_loop_lines(lines: Sequence[str]) -> list[str] | None:
    """Body of the innermost loop with most matmuls, as in :mod:`.sass`; None: no such."""
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    for index, line in enumerate(lines):
        if match := LABEL.match(line):
            labels[match[1]] = index
        elif (match := BRANCH.search(line)) and match[1] in labels:
            loops[labels[match[1]]] = index
    counts = {
        (first, last): sum(bool(MATMUL.search(x)) for x in lines[first : last + 1])
        for first, last in loops.items()
    }
    matmul = {loop: count for loop, count in sorted(counts.items()) if count}
    innermost = {
        (first, last): count
        for (first, last), count in matmul.items()
        if not any(first < a and b < last for a, b in matmul)
    }
    if not innermost:
        return None
    first, last = max(innermost, key=lambda loop: innermost[loop])
    return list(lines[first : last + 1])


def load_of(line: str) -> tuple[str, int] | None:
    """Address register and bytes a thread of a load from global memory; None: no load."""
    if match := COPY.search(line):
        return match[1], int(match[2], 0)
    if match := LOAD.search(line):
        return match[3], int(match[1] or 1) * int(match[2]) // 8
    return None


def main_loop(ptx: str, arguments: Sequence[str]) -> PtxLoop | None:
    """Find the main loop and charge its loads to the kernel's arguments.

    Args:
        ptx: of one kernel.
        arguments: names of the arguments that are no constexpr, in order.

    Returns:
        The loop, or None where no loop multiplies matrices. A load whose address mixes
        several pointers is charged to each; one whose address came from memory to none.
    """
    lines = [line.partition("//")[0].strip() for line in ptx.splitlines()]
    body = main_loop_lines(lines)
    if body is None:
        return None
    sources = address_sources(lines)
    widths: dict[str, list[int]] = defaultdict(list)
    for line in body:
        if load := load_of(line):
            for index in sorted(sources.get(load[0], ())):
                if index < len(arguments):
                    widths[arguments[index]].append(load[1])
    threads = thread_count(ptx)
    loads = {
        name: PointerLoads(max(sizes), sum(sizes) * threads)
        for name, sizes in widths.items()
    }
    return PtxLoop(sum(bool(MATMUL.search(line)) for line in body), loads)
