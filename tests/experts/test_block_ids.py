"""Every block has a number of its own, without a gap."""

from __future__ import annotations

from samv2.experts.block_ids import assembler_block, expert_block, gate_block


def test_blocks_are_numbered_without_a_gap() -> None:
    experts, siblings = 6, 3
    ids = [expert_block(e, experts, g) for g in range(siblings) for e in range(experts)]
    ids += [assembler_block(experts), gate_block(experts, siblings)]
    assert sorted(ids) == list(range(siblings * experts + 2))
    assert ids[0] == 0 and assembler_block(experts) == experts
    assert gate_block(experts, siblings) == max(ids)
