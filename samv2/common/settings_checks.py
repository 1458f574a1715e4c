"""Whether settings can be meant: every fault of theirs, named with its remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samv2.common.settings import Settings

FEATURES = ("coactivation", "gate", "gate_up_down")
GATES = ("ridge", "ridge_log", "avg_k")
COMBINES = ("unit", "softmax")
SPLITS = ("domain", "shards", "dirichlet")
DOWN_CODECS = ("raw", "bf16")
CODECS = ("raw", "bf16", "f16", "int8", "nf4", "int4")
NORMALISE = ("contributors", "all")
DTYPES = ("float32", "bfloat16")
QUANTISATIONS = ("none", "nf4")
SCHEDULES = ("constant", "cosine")
FACTORS = ("random", "gradient")
RULES = ("mean", "trimmed_mean", "median")
DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")
OPTIMIZERS = ("fedavg", "fedavgm", "fedadam")
ATTACKS = (
    "nan",
    "sign_flip",
    "inf",
    "negative_examples",
    "scale",
    "zero_examples",
    "truncated",
    "huge_examples",
    "float_examples",
    "stale_round",
    "foreign_keys",
    "bit_flip",
    "garbage",
    "npy_bomb",
    "npz_bomb",
    "wrong_graph",
)
"""What a hostile client of a rehearsal can send."""
CHOICES = {
    "model.dtype": DTYPES,
    "experts.feature": FEATURES,
    "experts.gate": GATES,
    "experts.combine": COMBINES,
    "experts.quantise": QUANTISATIONS,
    "adapter.factors": FACTORS,
    "data.split": SPLITS,
    "train.schedule": SCHEDULES,
    "federation.codec": CODECS,
    "federation.down_codec": DOWN_CODECS,
    "federation.normalise": NORMALISE,
    "aggregation.rule": RULES,
    "aggregation.optimizer": OPTIMIZERS,
    "rehearsal.attacks": ATTACKS,
}
"""The values of settings that have no others; of a list, those of its items."""


def find_faults(settings: Settings) -> Iterator[str]:
    """Every fault of some settings, for a person."""
    yield from _model_faults(settings)
    yield from _data_faults(settings)
    yield from _train_faults(settings)
    yield from _federation_faults(settings)
    yield from _aggregation_faults(settings)
    yield from _client_faults(settings)
    yield from _drift_faults(settings)


def _below(name: str, value: float, least: float) -> Iterator[str]:
    if value < least:
        yield f"{name} is {value}; use at least {least}"


def _unknown(name: str, value: str) -> Iterator[str]:
    if value not in CHOICES[name]:
        yield f"{name} is {value!r}; use one of {', '.join(CHOICES[name])}"


def _model_faults(settings: Settings) -> Iterator[str]:
    experts = settings.experts
    if not 0 <= settings.seed < 2**32:
        yield f"seed is {settings.seed}; use a whole number in 0..{2**32 - 1}"
    yield from _unknown("model.dtype", settings.model.dtype)
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
    yield from _unknown("experts.feature", experts.feature)
    yield from _unknown("experts.gate", experts.gate)
    yield from _unknown("experts.combine", experts.combine)
    yield from _unknown("experts.quantise", experts.quantise)
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
    yield from _unknown("adapter.factors", settings.adapter.factors)
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
    yield from _unknown("data.split", data.split)
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
    if not DEVICES.fullmatch(train.device):
        yield f"train.device is {train.device!r}; use auto, cpu, cuda or cuda:N"
    for name in ("local_steps", "batch_size"):
        yield from _below(f"train.{name}", getattr(train, name), 1)
    yield from _below("train.sequence_length", train.sequence_length, 8)
    prefix = settings.assembler.prefix_tokens
    if settings.assembler.width and train.sequence_length <= prefix:
        yield (
            f"train.sequence_length is {train.sequence_length}; it must exceed "
            f"assembler.prefix_tokens = {prefix}, or the assembler never makes a mask"
        )
    yield from _unknown("train.schedule", train.schedule)
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
    yield from _unknown("federation.codec", federation.codec)
    yield from _unknown("federation.down_codec", federation.down_codec)
    yield from _unknown("federation.normalise", federation.normalise)
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
    yield from _below("federation.retries", federation.retries, 0)
    yield from _below("federation.quarantine", federation.quarantine, 0)
    yield from _below("edits.min_voters", edits.min_voters, 1)
    if not 0 < edits.vote_cap <= 1:
        yield f"edits.vote_cap is {edits.vote_cap}; use a share above 0, at most 1"


def _share(name: str, value: float, most: float = 1.0) -> Iterator[str]:
    if not 0 <= value < most:
        yield f"{name} is {value}; use a share in 0..{most:g}, below {most:g}"


def _aggregation_faults(settings: Settings) -> Iterator[str]:
    rules, privacy = settings.aggregation, settings.privacy
    yield from _unknown("aggregation.rule", rules.rule)
    yield from _unknown("aggregation.optimizer", rules.optimizer)
    yield from _share("aggregation.trim", rules.trim, 0.5)
    yield from _below("aggregation.quorum", rules.quorum, 1)
    yield from _below("aggregation.clip_to_median", rules.clip_to_median, 0)
    yield from _share("aggregation.momentum", rules.momentum)
    yield from _share("aggregation.beta2", rules.beta2)
    for name in ("learning_rate", "epsilon"):
        if getattr(rules, name) <= 0:
            yield f"aggregation.{name} is {getattr(rules, name)}; use a positive number"
    yield from _below("privacy.noise", privacy.noise, 0)
    if privacy.clip <= 0:
        yield f"privacy.clip is {privacy.clip}; use a positive number"
    if not 0 < privacy.delta < 1:
        yield f"privacy.delta is {privacy.delta}; use a number between 0 and 1"
    if privacy.noise:
        yield from _privacy_faults(settings)


def _privacy_faults(settings: Settings) -> Iterator[str]:
    """What would publish something of a client that the noise does not cover."""
    rules, edits, adapter = settings.aggregation, settings.edits, settings.adapter
    given = f"privacy.noise is {settings.privacy.noise} and"
    if rules.rule != "mean":
        yield (
            f"{given} aggregation.rule {rules.rule!r}; the noise is calibrated to a "
            "mean: use 'mean'"
        )
    if rules.clip_to_median:
        yield (
            f"{given} aggregation.clip_to_median {rules.clip_to_median}; a median of "
            "norms depends on all clients: use 0, privacy.clip limits the norm"
        )
    if edits.rho_max:
        yield (
            f"{given} edits.rho_max {edits.rho_max}; edits follow from usage counts, "
            "which get no noise: use 0"
        )
    if adapter.siblings > 1:
        yield (
            f"{given} adapter.siblings {adapter.siblings}; siblings are told apart by "
            "clients' token counts, which get no noise: use 1"
        )
    if not settings.train.train_gate:
        yield (
            f"{given} train.train_gate false; the noise would move gates that nobody "
            "trains: use true"
        )


def _client_faults(settings: Settings) -> Iterator[str]:
    budgets, rehearsal = settings.budgets, settings.rehearsal
    for name in ("memory_bytes", "flops"):
        if wrong := [item for item in getattr(budgets, name) if item < 0]:
            yield f"budgets.{name} names {wrong[0]}; use 0 (no limit) or more"
    yield from _share("rehearsal.fail", rehearsal.fail)
    yield from _share("rehearsal.hostile", rehearsal.hostile)
    for name in rehearsal.attacks:
        yield from _unknown("rehearsal.attacks", name)


def _drift_faults(settings: Settings) -> Iterator[str]:
    drift = settings.drift
    yield from _below("drift.reserve", drift.reserve, 0)
    yield from _below("drift.patience", drift.patience, 1)
    yield from _below("drift.tolerance", drift.tolerance, 0)
    for name in ("threshold", "distance"):
        if getattr(drift, name) <= 0:
            yield f"drift.{name} is {getattr(drift, name)}; use a positive number"
    if drift.detect and settings.adapter.siblings < 2:
        yield (
            f"drift.detect is true and adapter.siblings {settings.adapter.siblings}; text "
            "that changes is given a sibling: use 2 or more"
        )
    if drift.detect and drift.reserve >= settings.adapter.siblings:
        yield (
            f"drift.reserve is {drift.reserve}; at least one of the "
            f"{settings.adapter.siblings} adapter.siblings must serve from the start"
        )
