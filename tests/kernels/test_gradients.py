"""Who wants a gradient."""

from __future__ import annotations

import torch

from samv2_kernels.gradients import wants_gradient


def test_a_part_wants_a_gradient_where_gradients_are_on() -> None:
    learnt, fixed = torch.ones(2, requires_grad=True), torch.ones(2)
    assert wants_gradient(None, fixed, learnt)
    assert not wants_gradient(None, fixed)
    assert not wants_gradient()
    with torch.no_grad():
        assert not wants_gradient(learnt)
