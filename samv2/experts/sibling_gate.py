"""Which sibling a token's adapters come from: a running guess at the kind of text.

An expert's *siblings* are sets of adapter rows over one base block (docs in
:mod:`samv2.models.adapters`). Sibling g serves one kind of text, and after the tokens
x_1 .. x_t of a sequence its share is the posterior of that kind,

    share_g(t) = softmax_g( prior_g + sum_{s <= t} ratio[bucket(x_s), g] )

with ratio the log of how much likelier a token is in the kind than in all text, times a
temperature: naive Bayes over tokens, updated as they come, so no later token is looked
at. Rows are averaged exactly because their factors are shared; a uniform share is
therefore FedAvg's model, and a sure one the specialist's.

Tokens are counted in buckets: the lower half holds the tokens of the lowest ids, which in
a byte-pair vocabulary are the most frequent, one each; the others share the rest by a
hash.

Shapes: B sequences, S positions, G siblings, N buckets, C counted texts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BUCKETS = 8192
TEMPERATURE = 0.5
"""Tokens of a text are not independent; evidence counts half."""
SMOOTHING = 200.0
"""Tokens of all text that are mixed into the counts of a kind."""
NEVER = -1e4
"""Prior of a sibling that serves no text."""
_HASH, _HASH_BITS = 2_654_435_761, 32


class SiblingGate(nn.Module):
    """Shares of the siblings at every position; uniform until it is fitted.

    Args:
        siblings: G, 2 or more.
    """

    def __init__(self, siblings: int) -> None:
        super().__init__()
        self.ratio_NG = nn.Parameter(torch.zeros(BUCKETS, siblings))
        self.prior_G = nn.Parameter(torch.zeros(siblings))
        self.requires_grad_(False)

    def forward(
        self, tokens_BS: Tensor, evidence_BG: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Shares after each of S consecutive tokens.

        Args:
            tokens_BS: (B, S) int64.
            evidence_BG: what the tokens before these gave; None at position 0.

        Returns:
            (B, S, G) log shares, not normalised; (B, G) to pass with the next tokens.
        """
        log_share_BSG = self.ratio_NG[bucket_of(tokens_BS)].cumsum(dim=1)
        start = self.prior_G if evidence_BG is None else evidence_BG.unsqueeze(1)
        log_share_BSG = log_share_BSG + start
        return log_share_BSG, log_share_BSG[:, -1]


def bucket_of(tokens: Tensor) -> Tensor:
    """The bucket of each token id, int64 in 0..BUCKETS - 1, in the shape of the ids."""
    half = BUCKETS // 2
    hashed = tokens * _HASH % 2**_HASH_BITS // (2**_HASH_BITS // half)
    return torch.where(tokens < half, tokens, half + hashed)


def count_tokens(tokens_N: Tensor) -> Tensor:
    """How often each bucket occurs in a text, (BUCKETS,) float32."""
    return torch.bincount(bucket_of(tokens_N), minlength=BUCKETS).float()


def fit_sibling_gate(
    counts_CN: Tensor, siblings: int, *, reserve: int = 0
) -> tuple[Tensor, list[int]]:
    """A gate for texts of which only token counts are known.

    With more texts than siblings they are clustered as multinomials: each text goes to
    the kind that gives its tokens the highest likelihood, from starts that lie far apart
    (Dhillon, Mallela & Kumar, JMLR 2003, "A divisive information-theoretic feature
    clustering algorithm", the hard form).

    Args:
        counts_CN: (C, N) counts of each text, none empty; scale does not matter.
        siblings: G.
        reserve: siblings that serve no text yet.

    Returns:
        The gate's parameters as one flat vector, (N G + G,) float32, in the order of
        ``SiblingGate.parameters()``; and the sibling of each text.
    """
    texts = len(counts_CN)
    share_CN = counts_CN.double() / counts_CN.sum(dim=1, keepdim=True).double()
    background_N = share_CN.mean(dim=0) + 1e-12
    background_N = background_N / background_N.sum()
    members = list(range(texts))
    if texts > siblings - reserve:
        members = _cluster(share_CN, background_N, siblings - reserve)
    used = max(members) + 1
    ratio_GN = _log_ratio(share_CN, background_N, members, used)
    return _flat_gate(ratio_GN, list(range(used)), siblings), members


def gate_for_kinds(kinds: Mapping[int, Tensor], siblings: int) -> Tensor:
    """A gate for kinds of text that are known.

    Args:
        kinds: {sibling: (N,) shares of tokens in its text}; others serve none.
        siblings: G.

    Returns:
        The gate's parameters, as :func:`fit_sibling_gate` has them.
    """
    used = sorted(kinds)
    share_GN = torch.stack([kinds[sibling] for sibling in used]).double()
    background_N = share_GN.mean(dim=0) + 1e-12
    background_N = background_N / background_N.sum()
    ratio_GN = _log_ratio(share_GN, background_N, list(range(len(used))), len(used))
    return _flat_gate(ratio_GN, used, siblings)


def _flat_gate(ratio_GN: Tensor, used: list[int], siblings: int) -> Tensor:
    ratio_NG = torch.zeros(ratio_GN.shape[1], siblings, dtype=torch.double)
    ratio_NG[:, used] = ratio_GN.T
    prior_G = torch.full((siblings,), NEVER, dtype=torch.double)
    prior_G[used] = 0
    return torch.cat([(TEMPERATURE * ratio_NG).flatten(), prior_G]).float()


def _log_ratio(
    share_CN: Tensor, background_N: Tensor, members: list[int], kinds: int
) -> Tensor:
    """(G, N): how much likelier a bucket is in a kind than in all text, as a log."""
    weight_GC = torch.zeros(kinds, len(share_CN), dtype=torch.double)
    weight_GC[members, range(len(members))] = 1
    weight_GC /= weight_GC.sum(dim=1, keepdim=True)
    # As if each kind had a hundred thousand tokens, whatever its texts' lengths.
    tokens = 1e5
    smooth_GN = (tokens * weight_GC @ share_CN + SMOOTHING * background_N) / (
        tokens + SMOOTHING
    )
    return (smooth_GN / background_N).log()


def _cluster(share_CN: Tensor, background_N: Tensor, kinds: int) -> list[int]:
    """The kind of each text, every kind with at least one."""
    alone_CN = _log_ratio(
        share_CN, background_N, list(range(len(share_CN))), len(share_CN)
    )
    likely_CC = share_CN @ alone_CN.T
    distance_CC = likely_CC.diagonal().unsqueeze(1) - likely_CC
    distance_CC = distance_CC + distance_CC.T
    seeds = [int(distance_CC.sum(dim=1).argmax())]
    while len(seeds) < kinds:
        seeds.append(int(distance_CC[:, seeds].min(dim=1)[0].argmax()))
    members = distance_CC[:, seeds].argmin(dim=1).tolist()
    for kind, seed in enumerate(seeds):
        members[seed] = kind
    for _ in range(50):
        ratio_GN = _log_ratio(share_CN, background_N, members, kinds)
        fit_CG = share_CN @ ratio_GN.T
        found = fit_CG.argmax(dim=1).tolist()
        for kind, seed in enumerate(seeds):
            if kind not in found:
                found[seed] = kind
        if found == members:
            break
        members = found
    return members
