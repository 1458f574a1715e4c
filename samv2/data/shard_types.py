"""What clients hold: the records that cross from the data layer to the federation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LaterText:
    """Text that a client will hold from some round on, in place of what it had."""

    train: Tensor
    """Train tokens, long (N,)."""
    heldout: dict[str, Tensor]
    """Held-out tokens by domain, long (N,)."""


@dataclass(frozen=True, kw_only=True)
class ClientShard:
    """All that one client holds; streams are long (N,) and stored as int32."""

    index: int
    """Number of the client, from 0."""
    train: Tensor
    """Train tokens, long (N,); documents are joined by the end-of-sequence token."""
    heldout: dict[str, Tensor]
    """Held-out tokens by domain, long (N,)."""
    category_counts: dict[str, int]
    """Train documents by domain, only domains that the client holds."""
    description: str
    """One line for people, e.g. ``"client 3: legal 12, wiki 4 documents"``."""
    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer that made the tokens."""
    later: dict[int, LaterText] = field(default_factory=dict)
    """Text by the first round of it; see :mod:`samv2.data.drift`."""

    def at(self, round: int) -> ClientShard:
        """The shard with the text that the client holds in a round, from 1."""
        begun = [first for first in self.later if first <= round]
        if not begun:
            return self
        text = self.later[max(begun)]
        return replace(self, train=text.train, heldout=text.heldout)


@dataclass(frozen=True, kw_only=True)
class FederatedIndex:
    """What is known about all clients without their text."""

    domains: tuple[str, ...]
    """Names of the domains."""
    split: str
    """Name of the split: ``"domain"``, ``"shards"`` or ``"dirichlet"``."""
    seed: int
    """Seed of the split."""
    category_counts: tuple[dict[str, int], ...]
    """Train documents by domain, per client."""
    train_tokens: tuple[int, ...]
    """Train tokens per client."""
    category_heterogeneity: float
    """Mean pairwise Jensen-Shannon distance of the clients' shares of domains by bytes
    of train text, 0 to 1."""
    token_heterogeneity: float
    """The same of the clients' token frequencies, 0 to 1."""
    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer that made the tokens."""
    corpus_sha256: dict[str, dict[str, str]]
    """Checksum of each part of each domain of the corpus."""

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.train_tokens)


@dataclass(frozen=True, kw_only=True)
class FederatedText:
    """Tokens of all clients, calibration tokens, and the index."""

    clients: tuple[ClientShard, ...]
    """One shard per client, in order."""
    calibration: dict[str, Tensor]
    """Calibration tokens by domain, long (N,); for the server only."""
    index: FederatedIndex
    """Figures about the whole federation."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return self.index.domains

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer that made the tokens."""
        return self.index.tokenizer_fingerprint
