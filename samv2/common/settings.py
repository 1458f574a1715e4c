"""Every setting of a run: frozen, keyword-only, documented field by field.

``[section]`` tables of a TOML file map onto the sections of :class:`Settings`; dotted
keys (``federation.rounds``) name the same fields on the command line and in Flower's
run config. All checks are here and are run at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from samv2.common.errors import ConfigError

FEATURES = ("coactivation", "gate", "gate_up_down")
GATES = ("ridge", "ridge_log", "avg_k")
COMBINES = ("unit", "softmax")
SPLITS = ("domain", "shards", "dirichlet")
CODECS = ("raw", "bf16", "f16", "int8", "nf4", "int4")
NORMALISE = ("contributors", "all")
DTYPES = ("float32", "bfloat16")
QUANTISATIONS = ("none", "nf4")
SCHEDULES = ("constant", "cosine")
FACTORS = ("random", "gradient")


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
    """E; must divide the FFN's rows."""
    experts_per_token: int = 8
    """K, shared experts included."""
    num_shared: int = 2
    """Experts that every token visits (highest activation mass)."""
    layers: str = "1-"
    """Decoder layers to convert: ``all``, or ranges as ``1-``, ``4-20,25``."""
    feature: str = "coactivation"
    """What rows are clustered by: coactivation, gate, gate_up_down."""
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
    """R."""
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
    """``domain`` (one a client), ``shards`` or ``dirichlet`` (Shepherd's splits)."""
    alpha: float = 0.5
    """Concentration of the Dirichlet split; lower is more heterogeneous."""
    train_bytes: int = 2_097_152
    """Training text kept per domain, bytes of UTF-8."""
    heldout_bytes: int = 65_536
    """Held-out text per domain, bytes of UTF-8."""
    calibration_bytes: int = 65_536
    """Calibration text per domain, bytes of UTF-8."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Local training on a client."""

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
    """Processes of the embedded engine, one torch thread each; 0 means one a core."""
    min_replies: int = 1
    """Valid replies below which a round is retried once, then the run stops."""
    update_budget_bytes: int = 262_144
    """Most bytes of packed update a client sends a round."""
    send_experts: int = 0
    """Most experts a layer sends; 0 leaves it to the budget."""
    codec: str = "int8"
    """Value codec of updates: raw, bf16, f16, int8, nf4, int4."""
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
    """Cap on the example count a client may claim."""
    clip_update_norm: float = 0.0
    """L2 norm that a client's update is scaled down to; 0 means no clipping."""
    eval_windows: int = 8
    """Held-out windows a client and domain that are scored."""
    eval_every: int = 1
    """Rounds from one scoring of held-out text to the next; the last is always scored."""
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

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ConfigError(faults)

    def _faults(self) -> Iterator[str]:
        yield from _model_faults(self)
        yield from _data_faults(self)
        yield from _train_faults(self)
        yield from _federation_faults(self)


def _below(name: str, value: float, least: float) -> Iterator[str]:
    if value < least:
        yield f"{name} is {value}; use at least {least}"


def _unknown(name: str, value: str, known: tuple[str, ...]) -> Iterator[str]:
    if value not in known:
        yield f"{name} is {value!r}; use one of {', '.join(known)}"


def _model_faults(settings: Settings) -> Iterator[str]:
    experts = settings.experts
    if not 0 <= settings.seed < 2**32:
        yield f"seed is {settings.seed}; use a whole number in 0..{2**32 - 1}"
    yield from _unknown("model.dtype", settings.model.dtype, DTYPES)
    yield from _below("experts.num_experts", experts.num_experts, 1)
    yield from _below("experts.num_shared", experts.num_shared, 0)
    if experts.num_shared >= max(1, experts.num_experts):
        yield (
            f"experts.num_shared is {experts.num_shared}; at least one of the "
            f"{experts.num_experts} experts must be routed"
        )
    least = max(1, experts.num_shared)
    if not least <= experts.experts_per_token <= experts.num_experts:
        yield (
            f"experts.experts_per_token is {experts.experts_per_token}; it counts the "
            f"{experts.num_shared} shared experts and must lie in "
            f"{least}..{experts.num_experts}"
        )
    yield from _unknown("experts.feature", experts.feature, FEATURES)
    yield from _unknown("experts.gate", experts.gate, GATES)
    yield from _unknown("experts.combine", experts.combine, COMBINES)
    yield from _unknown("experts.quantise", experts.quantise, QUANTISATIONS)
    yield from _below("experts.cluster_starts", experts.cluster_starts, 1)
    yield from _below("experts.surrogate_rank", experts.surrogate_rank, 0)
    yield from _below("experts.calibration_tokens", experts.calibration_tokens, 256)
    yield from _below("experts.chain_degree", experts.chain_degree, 0)
    yield from _below("experts.repair_rank", experts.repair_rank, 0)
    for k in experts.other_k:
        if not least <= k <= experts.num_experts:
            yield (
                f"experts.other_k names {k}; K must lie in {least}.."
                f"{experts.num_experts}"
            )
    yield from _below("distill.steps", settings.distill.steps, 0)
    yield from _below("distill.batch_size", settings.distill.batch_size, 1)
    if settings.distill.learning_rate <= 0:
        yield (
            f"distill.learning_rate is {settings.distill.learning_rate}; use a positive "
            "number"
        )
    yield from _below("adapter.rank", settings.adapter.rank, 1)
    yield from _unknown("adapter.factors", settings.adapter.factors, FACTORS)
    if settings.adapter.factors == "gradient" and experts.quantise != "none":
        yield (
            f"adapter.factors is 'gradient' and experts.quantise {experts.quantise!r}; "
            "4-bit blocks have no gradient: use 'random'"
        )
    yield from _below("adapter.siblings", settings.adapter.siblings, 1)
    yield from _below("assembler.width", settings.assembler.width, 0)
    yield from _below("assembler.prefix_tokens", settings.assembler.prefix_tokens, 1)
    for name in ("temperature_start", "temperature_end"):
        yield from _below(f"assembler.{name}", getattr(settings.assembler, name), 0.01)


def _data_faults(settings: Settings) -> Iterator[str]:
    data = settings.data
    yield from _unknown("data.split", data.split, SPLITS)
    if not data.domains:
        yield "data.domains is empty; name at least one domain"
    if len(set(data.domains)) != len(data.domains):
        yield f"data.domains names a domain twice: {', '.join(data.domains)}"
    if commas := [name for name in data.domains if "," in name]:
        yield f"data.domains holds {commas[0]!r}; a name or path cannot have a comma"
    if data.alpha <= 0:
        yield f"data.alpha is {data.alpha}; use a positive number"
    for name in ("train_bytes", "heldout_bytes", "calibration_bytes"):
        yield from _below(f"data.{name}", getattr(data, name), 1024)


def _train_faults(settings: Settings) -> Iterator[str]:
    train = settings.train
    for name in ("local_steps", "batch_size"):
        yield from _below(f"train.{name}", getattr(train, name), 1)
    yield from _below("train.sequence_length", train.sequence_length, 8)
    prefix = settings.assembler.prefix_tokens
    if settings.assembler.width and train.sequence_length <= prefix:
        yield (
            f"train.sequence_length is {train.sequence_length}; it must exceed "
            f"assembler.prefix_tokens = {prefix}, or the assembler never makes a mask"
        )
    yield from _unknown("train.schedule", train.schedule, SCHEDULES)
    for name in ("learning_rate", "clip_norm"):
        if getattr(train, name) <= 0:
            yield f"train.{name} is {getattr(train, name)}; use a positive number"


def _federation_faults(settings: Settings) -> Iterator[str]:
    federation, edits = settings.federation, settings.edits
    for name in (
        "rounds",
        "clients",
        "min_replies",
        "max_examples",
        "eval_windows",
        "eval_every",
    ):
        yield from _below(f"federation.{name}", getattr(federation, name), 1)
    for name in ("workers", "clients_per_round", "send_experts", "clip_update_norm"):
        yield from _below(f"federation.{name}", getattr(federation, name), 0)
    sampled = federation.clients_per_round or federation.clients
    if sampled > federation.clients:
        yield (
            f"federation.clients_per_round is {sampled}, but there are only "
            f"{federation.clients} clients"
        )
    if federation.min_replies > sampled:
        yield (
            f"federation.min_replies is {federation.min_replies}, but only {sampled} "
            "clients are asked a round"
        )
    if federation.round_timeout <= 0:
        yield (
            f"federation.round_timeout is {federation.round_timeout}; use a positive "
            "number of seconds"
        )
    yield from _below(
        "federation.update_budget_bytes", federation.update_budget_bytes, 4096
    )
    yield from _unknown("federation.codec", federation.codec, CODECS)
    yield from _unknown("federation.normalise", federation.normalise, NORMALISE)
    if not 0 <= federation.error_feedback <= 1:
        yield (
            f"federation.error_feedback is {federation.error_feedback}; use a share "
            "in 0..1"
        )
    if not 0 <= federation.sibling_share <= 1:
        yield (
            f"federation.sibling_share is {federation.sibling_share}; use a share in 0..1"
        )
    yield from _below("edits.rho_max", edits.rho_max, 0)
    yield from _below("edits.patience", edits.patience, 1)
    yield from _below("edits.cooldown", edits.cooldown, 0)
    if not 0 <= edits.momentum < 1:
        yield f"edits.momentum is {edits.momentum}; use a share in 0..1, below 1"
    if edits.tau_prune < 0 or edits.tau_promote <= 0:
        yield (
            f"edits.tau_prune is {edits.tau_prune} and edits.tau_promote is "
            f"{edits.tau_promote}; use positive shares"
        )
