"""How many threads torch uses, for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ONEDNN_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""What oneDNN reads before its first product."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside the block.

    Results then have the same bits on any number of cores, and small dense solves do
    not wait for threads on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def small_onednn_cache() -> None:
    """Let oneDNN keep few compiled products, where it has made none and nobody decided.

    Experts multiply other numbers of rows at every step, so that its 1,024 entries are
    filled in a few steps and seldom used again; each holds memory.
    """
    os.environ.setdefault(ONEDNN_CACHE, "32")
