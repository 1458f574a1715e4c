"""Differential privacy of whole clients, with noise that the server adds (DP-FedAvg).

McMahan et al. 2018 (arXiv 1710.06963): every client's whole update is scaled down to an
L2 norm of C = ``privacy.clip``, all clients count the same, the sum is divided by the
number n of clients that are *asked* a round (a constant, unlike the number that answer),
and every published number gets Gaussian noise of deviation ``privacy.noise`` C / n,
whether or not anybody sent its block: which blocks were sent is not told either.

*What is protected.* Everything that is made of the model after a round: one client's data
changes the probability of any outcome by at most e^epsilon, apart from delta (its update
replaced by zero; the number of clients is public). The server itself sees the updates and
must be trusted, and with it the run's folder: losses, contributors and held-out scores in
its logs are as they are, and so are frames that are kept.

*What is accounted.* A client's rounds compose as Gaussian mechanisms; epsilon is that of
the client whose update was merged in the most rounds. Sampling of clients is not taken to
amplify privacy: the sample follows from the run's seed, which every client knows.

*The noise* is made by SHAKE-256 from ``privacy.key`` in the run's folder, the round, and
the very sums it is added to. The same replies give the same bits, so a resumed run
repeats its own; other replies in a repeated round give other noise, so the difference of
two tries tells nothing. Whoever has the key can take the noise off again: keep it secret,
and delete it when the run is over. The noise is of float64 numbers and rounded to
float32; attacks on the lowest bits (Mironov 2012) are not defended against.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samv2.common.errors import CheckpointError, FederationError
from samv2.common.files import write_bytes
from samv2.common.settings import Settings
from samv2.updates.aggregate import (
    Aggregated,
    Contribution,
    clip_shares,
    contributors_of,
    weighted_sums,
)
from samv2.updates.packing import Manifest

KEY = "privacy.key"
KEY_BYTES = 32
LIBRARY = "dp_accounting"


def noise_key(root: Path, settings: Settings, *, resumed: bool) -> bytes | None:
    """The run's secret, read from its folder or made there; None without privacy.

    Args:
        root: the run's folder; the key is ``privacy.key`` in it, for its owner's eyes.
        settings: of the run.
        resumed: whether rounds were run before; the key must then be there.

    Raises:
        FederationError: the library that accounts for privacy is not installed.
        CheckpointError: the key of a run that is resumed is gone or damaged.
    """
    if settings.privacy.noise == 0:
        return None
    if importlib.util.find_spec(LIBRARY) is None:
        raise FederationError(
            f"privacy.noise is {settings.privacy.noise}, and dp-accounting, which says "
            "what it is worth, is not installed: pip install 'samv2[dp]' on the server, "
            "or set privacy.noise to 0"
        )
    path = Path(root) / KEY
    if not path.exists() and not resumed:
        write_bytes(path, os.urandom(KEY_BYTES), mode=0o600)
    key = path.read_bytes() if path.exists() else b""
    if len(key) != KEY_BYTES:
        raise CheckpointError(
            f"{path} holds {len(key)} bytes instead of {KEY_BYTES}; the noise of this "
            "run cannot be repeated without it: put it back, or start a new --log-dir"
        )
    return key


def private_mean(
    contributions: Sequence[Contribution],
    manifest: Manifest,
    settings: Settings,
    *,
    round: int,
    key: bytes,
    graph: tuple[int, int],
) -> Aggregated:
    """The noised mean of clipped updates, of every block that clients train.

    Args:
        contributions: of at most as many clients as are asked a round; validated.
        manifest: the server's; one sibling.
        settings: of the run.
        round: the round the frames belong to.
        key: see :func:`noise_key`.
        graph: converted layers L and experts E of each.

    Returns:
        Means of all blocks that may change, sent or not; and who sent what, which is
        not private.

    Raises:
        FrameError: a frame is invalid after all.
    """
    clip = settings.privacy.clip
    deviation = settings.privacy.noise * clip
    sampled = settings.federation.clients_per_round or settings.federation.clients
    ordered = sorted(contributions, key=lambda item: item.client)
    limit = min(clip, settings.federation.clip_update_norm or clip)
    shares = clip_shares(ordered, manifest, round=round, clip_norm=limit)
    sums = weighted_sums(ordered, shares, manifest, round=round)
    trained = trained_numbers(manifest, settings, graph)
    published = {
        block: sums.get(block, torch.zeros(kept.shape)) * kept
        for block, kept in trained.items()
    }
    seed = _seed(key, round, published)
    mean = {}
    for block, value in published.items():
        noise = deviation * gaussian(seed, block, value.numel()) * trained[block]
        mean[block] = ((value + noise) / sampled).float()
    return Aggregated(mean=mean, contributors=contributors_of(ordered))


def trained_numbers(
    manifest: Manifest, settings: Settings, graph: tuple[int, int]
) -> dict[int, Tensor]:
    """{expert_id: flat bool}: the numbers of every block that clients train.

    It follows from the settings alone. What is not trained must get no noise: combine
    weights and edge strengths that are not 0 would change the model's form. The layout
    is :mod:`samv2.models.adapters`'s for one sibling: an expert's block ends with u and
    the strengths of the E edges into it, and the assembler's block is number L E.
    """
    num_layers, num_experts = graph
    trained = {}
    for key in manifest.ids:
        kept = torch.ones(manifest.shapes[manifest.position(key)], dtype=torch.bool)
        if key < num_layers * num_experts:
            if not settings.experts.chains:
                kept[-num_experts:] = False
            if not settings.train.train_mix:
                kept[-num_experts - 1] = False
        elif not settings.train.train_assembler:
            continue
        trained[key] = kept
    return trained


def gaussian(seed: bytes, block: int, count: int) -> Tensor:
    """(count,) float64 standard normal numbers that follow from seed and block.

    Uniform numbers of 53 bits from SHAKE-256, by Box and Muller 1958.
    """
    pairs = (count + 1) // 2
    stream = hashlib.shake_256(seed + block.to_bytes(8, "little")).digest(16 * pairs)
    uniform = (np.frombuffer(stream, dtype="<u8") >> 11).astype(np.float64) + 0.5
    radius, angle = (uniform * 2.0**-53).reshape(2, pairs)
    length = np.sqrt(-2.0 * np.log(radius))
    angle = 2.0 * math.pi * angle
    both = np.concatenate([length * np.cos(angle), length * np.sin(angle)])
    return torch.from_numpy(both[:count])


def epsilon_after(rounds: int, *, noise: float, delta: float) -> float:
    """Epsilon of a client whose update was merged in some rounds.

    Gaussian mechanisms of multiplier z compose to one of z / sqrt(rounds), whose epsilon
    is exact (Balle and Wang 2018, arXiv 1805.06530); computed by Google's dp-accounting.

    Args:
        rounds: how many, at least 0.
        noise: z, the noise's deviation over the clip norm, positive.
        delta: in 0..1, exclusive.
    """
    if rounds == 0:
        return 0.0
    from dp_accounting import get_epsilon_gaussian  # takes seconds to load

    return float(get_epsilon_gaussian(noise / math.sqrt(rounds), delta))


def count_rounds(
    before: Mapping[int, int], contributions: Sequence[Contribution]
) -> dict[int, int]:
    """{client: rounds in which its update was merged}, after one more."""
    after = dict(before)
    for item in contributions:
        after[item.client] = after.get(item.client, 0) + 1
    return dict(sorted(after.items()))


def _seed(key: bytes, round: int, sums: Mapping[int, Tensor]) -> bytes:
    """One try of a round's secret: the key, with all that it is to hide."""
    digest = hmac.new(key, round.to_bytes(8, "little"), hashlib.sha256)
    for block, value in sums.items():
        digest.update(block.to_bytes(8, "little"))
        digest.update(value.contiguous().numpy().tobytes())
    return digest.digest()
