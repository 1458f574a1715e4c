"""What a listing of machine code (SASS, as ``nvdisasm -c`` prints it) says.

The main loop is the innermost loop that multiplies most: among the backward branches
whose body holds tensor-core instructions but no smaller loop that does, the one with most
of them (the earlier one of equals). So neither the outer loop of a persistent kernel nor a
short loop without matmuls inside the main loop misleads. Code that ptxas moved out of the
body, and branches around part of it, count as if every thread ran the body once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

INSTRUCTION = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"\s*(?P<operands>[^;]*);"
)
LABEL = re.compile(r"\s*(?P<label>\.L_\w+):")
TARGET = re.compile(r"`\((?P<label>\.L_\w+)\)")
TENSOR_OPS = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA", "QGMMA", "DMMA")
WARPGROUP_OPS = ("HGMMA", "IGMMA", "QGMMA")
LSU_OPS = (
    *("LDG", "LDGSTS", "STG", "LD", "ST", "LDS", "STS", "LDSM", "STSM", "SHFL"),
    *("LDL", "STL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG", "MATCH"),
)
"""What the load/store unit executes: global, shared and local memory, and shuffles."""
INSTRUCTION_BYTES = 16
WARPS_OF_A_WARPGROUP = 4


class SassError(ValueError):
    """A listing that this parser does not understand."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    address: int
    """Byte offset in its function."""
    opcode: str
    """With its modifiers, e.g. ``LDGSTS.E.BYPASS.128``; without the predicate."""
    target: str | None = None
    """Label that a branch goes to."""

    @property
    def name(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def is_tensor_op(self) -> bool:
        """Whether tensor cores execute it."""
        return self.name in TENSOR_OPS

    @property
    def load_bytes(self) -> int:
        """Bytes that one thread loads from global memory; 0: not such a load."""
        if self.name not in ("LDG", "LDGSTS"):
            return 0
        modifiers = self.opcode.split(".")[1:]
        for modifier, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2)):
            if modifier in modifiers:
                return size
        return 1 if {"U8", "S8"} & set(modifiers) else 4

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds that one *warp* makes on tensor cores; 0: none."""
        if not self.is_tensor_op:
            return 0
        if self.name in WARPGROUP_OPS:
            shape = re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode)
            if shape:
                return prod(map(int, shape.groups())) // WARPS_OF_A_WARPGROUP
        shape = re.search(r"\.(16|8)(8)(4|8|16|32|64|128)(?=\.|$)", self.opcode)
        if not shape:
            raise SassError(
                f"{self.opcode}: a tensor-core shape that is not known here"
            )
        return prod(map(int, shape.groups()))


@dataclass(frozen=True)
class Tally:
    """Counts over a stretch of code, one per thread (tensor ops: per warp)."""

    instructions: int
    tensor_ops: int
    multiply_adds: int
    """Of one warp."""
    lsu: int
    load_widths: tuple[int, ...]
    """Bytes a thread of every load from global memory, in program order."""
    tf32: bool
    """Whether a tensor-core instruction reads TF32, at half the rate of bf16."""


@dataclass(frozen=True)
class Program:
    """All functions of a listing, in order."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Label -> index of the instruction behind it."""

    def loops(self) -> list[tuple[int, int]]:
        """First and last index of every loop's body, by first index."""
        last_of: dict[int, int] = {}
        for index, instruction in enumerate(self.instructions):
            if instruction.target is None:
                continue
            first = self.labels.get(instruction.target)
            if first is None:
                raise SassError(f"{instruction.target}: a branch to no label")
            if first <= index:
                last_of[first] = index
        return sorted(last_of.items())

    def tally(self, first: int = 0, last: int | None = None) -> Tally:
        """Counts over the instructions from ``first`` to ``last``, both included."""
        stop = None if last is None else last + 1
        return tally(self.instructions[first:stop])

    def main_loop(self) -> Tally | None:
        """Counts over the main loop's body; None: no loop holds a tensor-core op."""
        matmul = [
            (first, last, self.tally(first, last).tensor_ops)
            for first, last in self.loops()
        ]
        matmul = [loop for loop in matmul if loop[2]]
        innermost = [
            (first, last, count)
            for first, last, count in matmul
            if not any(
                first <= a and b <= last and (a, b) != (first, last)
                for a, b, _ in matmul
            )
        ]
        if not innermost:
            return None
        first, last, _ = max(innermost, key=lambda loop: loop[2])
        return self.tally(first, last)

    @property
    def code_bytes(self) -> int:
        """Size of the code, padding left out."""
        return INSTRUCTION_BYTES * sum(i.name != "NOP" for i in self.instructions)


def tally(instructions: Iterable[Instruction]) -> Tally:
    """Count what instructions do."""
    body = [i for i in instructions if i.name != "NOP"]
    tensor = [i for i in body if i.is_tensor_op]
    return Tally(
        instructions=len(body),
        tensor_ops=len(tensor),
        multiply_adds=sum(i.multiply_adds for i in tensor),
        lsu=sum(i.name in LSU_OPS for i in body),
        load_widths=tuple(i.load_bytes for i in body if i.load_bytes),
        tf32=any(".TF32" in i.opcode for i in tensor),
    )


def parse(listing: str) -> Program:
    """Read a listing.

    Args:
        listing: output of ``nvdisasm -c``.

    Raises:
        SassError: there is no instruction in it.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label["label"]] = len(instructions)
        elif match := INSTRUCTION.match(line):
            opcode = match["opcode"]
            target = TARGET.search(match["operands"]) if opcode[:3] == "BRA" else None
            instructions.append(
                Instruction(
                    int(match["address"], 16),
                    opcode,
                    target["label"] if target else None,
                )
            )
    if not instructions:
        raise SassError("no instruction in the listing: is it the output of nvdisasm?")
    return Program(tuple(instructions), labels)
