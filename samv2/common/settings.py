"""Every setting of a run: frozen, keyword-only, documented field by field.

``[section]`` tables of a TOML file map onto the sections of :class:`Settings`; dotted
keys (``federation.rounds``) name the same fields on the command line and in Flower's
run config. They are checked all at once, by :mod:`samv2.common.settings_checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from samv2.common.errors import ConfigError
from samv2.common.settings_checks import find_faults


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The dense model to start from."""

    path: str = "smollm2"
    """Hub id, local folder, GGUF file, or ``smollm2``; or a bootstrapped folder."""
    dtype: str = "bfloat16"
    """Base weights: ``float32`` or ``bfloat16``."""


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """Dense model to expert graph."""

    num_experts: int = 16
    """E, experts a layer; must divide the FFN's rows."""
    experts_per_token: int = 8
    """K, experts that a token visits, shared ones included."""
    num_shared: int = 2
    """Experts that every token visits (highest activation mass)."""
    layers: str = "1-"
    """Decoder layers to convert: ``all``, or ranges as ``1-``, ``4-20,25``."""
    feature: str = "coactivation"
    """What rows are clustered by: ``coactivation``, ``gate`` or ``gate_up_down``."""
    cluster_starts: int = 3
    """Starts of the clustering; the best is kept."""
    gate: str = "ridge"
    """``ridge`` or ``ridge_log`` (calibrated), or ``avg_k`` (EMoE)."""
    combine: str = "unit"
    """``unit`` (function-preserving) or ``softmax`` (EMoE)."""
    surrogate_rank: int = 32
    """Q of the linear stand-ins; 0 turns them off."""
    calibration_tokens: int = 24_576
    """Tokens of calibration text, over all domains."""
    repair: bool = True
    """Refit the down projections and a linear stand-in for K visits, layer by layer."""
    repair_rank: int = 64
    """Rank of the repairs' linear stand-in; at most the model's width is used."""
    other_k: tuple[int, ...] = ()
    """More values of K to repair, beside experts_per_token."""
    allocate: bool = False
    """Let layers differ in their visits, at no more arithmetic than K everywhere."""
    chain_degree: int = 2
    """Predecessors that each expert gets from co-activation at the start."""
    chains: bool = False
    """Let edges carry data (trainable strengths, one pass a depth)."""
    quantise: str = "none"
    """``nf4`` keeps expert blocks in 4 bits, packed after the repair; ``none``."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """The bootstrap's light gradient stage."""

    steps: int = 0
    """Optimiser steps on the calibration text; 0 leaves the stage out."""
    batch_size: int = 4
    """Windows a step."""
    learning_rate: float = 3e-4
    """AdamW's for the repairs; gates learn faster, by their size."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Row-LoRA."""

    rank: int = 8
    """R, rank of the adapters."""
    scale: float = 2.0
    """s, multiplies every adapter term."""
    factors: str = "random"
    """Frozen factors: ``random`` from the seed, or along the ``gradient`` of the
    calibration text (kept with the model)."""
    siblings: int = 1
    """G, sets of adapter rows an expert has, each for one kind of text."""


@dataclass(frozen=True, kw_only=True)
class AssemblerSettings:
    """The MLP that emits edge masks."""

    width: int = 16
    """Hidden width; 0 turns the assembler off."""
    prefix_tokens: int = 32
    """Leading positions that form its context."""
    temperature_start: float = 1.0
    """Of the soft mask in the first round."""
    temperature_end: float = 0.5
    """Of the soft mask in the last round."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Text and how it is divided over clients."""

    domains: tuple[str, ...] = ("legal", "bible", "biomed", "python")
    """Names of built-in sources, or NAME=PATH for own text."""
    split: str = "domain"
    """``domain`` (one a client), ``shards`` (two pieces a client of the text in order of
    domains) or ``dirichlet`` (shares drawn with ``data.alpha``); Shepherd's splits."""
    alpha: float = 0.5
    """Concentration of the Dirichlet split; lower is more heterogeneous."""
    train_bytes: int = 2_097_152
    """Training text kept per domain, bytes of UTF-8."""
    heldout_bytes: int = 65_536
    """Held-out text per domain, bytes of UTF-8."""
    calibration_bytes: int = 65_536
    """Calibration text per domain, bytes of UTF-8."""
    drift: tuple[str, ...] = ()
    """Changes of clients' text, ``ROUND:CLIENTS=DOMAIN``, e.g. ``6:0-1+4=chat``. From that
    round on, 2 or later, those clients (numbers from 0 and spans, joined by ``+``) hold
    text of that domain and no other, a built-in one or ``NAME=PATH``."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Local training on a client."""

    device: str = "auto"
    """Where clients compute: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU where there
    is one. A Flower node's own config has precedence."""
    local_steps: int = 5
    """Optimiser steps a round."""
    batch_size: int = 4
    """Windows a step."""
    sequence_length: int = 256
    """Tokens a window."""
    learning_rate: float = 2e-3
    """AdamW's, in the first round."""
    schedule: str = "constant"
    """Of the learning rate over the rounds: ``constant``, or ``cosine`` to a tenth."""
    keep_optimizer: bool = False
    """Whether a client keeps AdamW's moments for its next round, on its own disk."""
    clip_norm: float = 1.0
    """Gradient norm clip."""
    train_gate: bool = True
    """Train gate rows and biases."""
    train_assembler: bool = True
    """Train the assembler."""
    train_mix: bool = False
    """Train the combine weights u; a model with u != 0 cannot be exported."""


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """Rounds, clients and what they send."""

    rounds: int = 3
    """Rounds of the run."""
    clients: int = 4
    """Clients that hold text."""
    clients_per_round: int = 0
    """Clients sampled a round; 0 means all."""
    workers: int = 0
    """Processes of the embedded engine, one torch thread each; 0 means one a core, or
    one a GPU where clients compute on those."""
    min_replies: int = 1
    """Valid replies below which a round is retried once, then the run stops."""
    update_budget_bytes: int = 262_144
    """Most bytes of packed update a client sends a round."""
    send_experts: int = 0
    """Most experts a layer sends; 0 leaves it to the budget."""
    codec: str = "int8"
    """Of updates' values: ``raw``, ``bf16``, ``f16``, ``int8``, ``nf4`` or ``int4``."""
    down_codec: str = "raw"
    """Of what the server sends down, the differences from the bootstrapped model;
    ``raw`` has every bit. The server's own model is float32 in any case."""
    keep_frames: bool = False
    """Keep every merged update as it came, in ``frames/``; read by `samv2 inspect`."""
    error_feedback: float = 1.0
    """Share of what was not sent that stays in the client's own model and is sent in
    later rounds; 0 forgets it."""
    normalise: str = "contributors"
    """Divide an expert's sum by its ``contributors`` or by ``all`` valid replies."""
    sibling_share: float = 0.0
    """What adapter siblings take of one another's updates; at 1 as much as of a mean."""
    max_examples: int = 1_000_000
    """Cap on the examples that a client is weighed by; never more than a round's
    ``train.local_steps * train.batch_size`` windows."""
    clip_update_norm: float = 0.0
    """L2 norm that a client's update is scaled down to; 0 means no clipping."""
    eval_windows: int = 8
    """Held-out windows a client and domain that are scored."""
    eval_every: int = 1
    """Rounds from one scoring of held-out text to the next; the last is always scored."""
    retries: int = 1
    """How often a client that failed is asked again within its round."""
    quarantine: int = 0
    """Refused replies after which a client is asked no more; 0: never."""
    round_timeout: float = 3600.0
    """Seconds after which the replies of a round that are missing are given up."""


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """When the server edits the graph."""

    rho_max: int = 8
    """Most edits a round, over all layers."""
    tau_prune: float = 0.2
    """Relative usage below which an edge is pruned."""
    tau_promote: float = 0.4
    """Relative demand above which a missing edge is promoted."""
    patience: int = 2
    """Rounds in a row that a threshold must be crossed."""
    cooldown: int = 2
    """Rounds that an edited edge rests."""
    momentum: float = 0.8
    """Of the exponential average of usage and demand."""
    vote_cap: float = 1.0
    """Most of a layer's counts that one client may hold, as a share; 1: no cap."""
    min_voters: int = 1
    """Clients of a round that must have wanted an edge for it to be promoted; 1: no
    such condition."""


@dataclass(frozen=True, kw_only=True)
class AggregationSettings:
    """How the server makes one change of a round's updates."""

    rule: str = "mean"
    """Per expert, over those who sent it: ``mean``, ``trimmed_mean`` or ``median``."""
    trim: float = 0.2
    """Share of the updates that ``trimmed_mean`` cuts off at each end, rounded up."""
    quorum: int = 3
    """Updates of an expert below which a robust rule takes the mean of clipped ones."""
    clip_to_median: float = 0.0
    """Scale an update down to this multiple of the round's median norm; 0: do not."""
    optimizer: str = "fedavg"
    """Of the server: ``fedavg`` (adds the change), ``fedavgm`` or ``fedadam``."""
    learning_rate: float = 1.0
    """The server's; ``fedadam`` wants less, its steps are about as large as this."""
    momentum: float = 0.9
    """Of ``fedavgm`` and ``fedadam``."""
    beta2: float = 0.99
    """Of ``fedadam``'s second moment."""
    epsilon: float = 1e-3
    """Of ``fedadam``."""


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Differential privacy of clients (whole-client, central noise)."""

    noise: float = 0.0
    """Noise multiplier: the noise's deviation over ``clip``; 0 turns privacy off."""
    clip: float = 1.0
    """L2 norm that every client's whole update is scaled down to."""
    delta: float = 1e-5
    """Of the (epsilon, delta) that the log states."""


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """What clients can hold; a node's own config goes before this.

    Client i has entry i modulo the list's length, so that one list makes a mix of full,
    half and tiny clients.
    """

    memory_bytes: tuple[int, ...] = ()
    """Most memory a client's model and training may take, bytes; 0: no limit."""
    flops: tuple[float, ...] = ()
    """Most FFN multiply-adds a token, over the dense model's; 0: no limit."""


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """When clients' text changes: notice it, and give it a sibling of its own."""

    detect: bool = False
    """Watch clients' losses and texts for a change."""
    spawn: bool = True
    """Whether a change that no sibling serves gets a new one (reuse goes first)."""
    reserve: int = 1
    """Siblings held back at the start for kinds of text that come later."""
    threshold: float = 0.25
    """Page-Hinkley: rise of a client's loss over its mean, summed, in nats."""
    tolerance: float = 0.02
    """Page-Hinkley: rise a round that is not counted, in nats."""
    distance: float = 0.45
    """Jensen-Shannon distance of a client's text from what it was that counts."""
    patience: int = 3
    """Scored rounds without a client after which a spawned sibling is given up."""


@dataclass(frozen=True, kw_only=True)
class RehearsalSettings:
    """Faults on purpose, to see a federation live through them; off by default."""

    fail: float = 0.0
    """Share of training requests that a client fails: an error, silence, or death."""
    hostile: float = 0.0
    """Share of the clients that send hostile replies, all through the run."""
    attacks: tuple[str, ...] = ()
    """What hostile clients send, in turn, e.g. ``nan,truncated``; empty: everything."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run."""

    seed: int = 0
    """Of everything random; 0 to 2^32 - 1."""
    model: ModelSettings = field(default_factory=ModelSettings)
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    assembler: AssemblerSettings = field(default_factory=AssemblerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    edits: EditSettings = field(default_factory=EditSettings)
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    budgets: BudgetSettings = field(default_factory=BudgetSettings)
    drift: DriftSettings = field(default_factory=DriftSettings)
    rehearsal: RehearsalSettings = field(default_factory=RehearsalSettings)

    def __post_init__(self) -> None:
        faults = list(find_faults(self))
        if faults:
            raise ConfigError(faults)
