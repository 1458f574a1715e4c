"""The Flower client app: messages in, messages out; the work is in client_round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from samv2.common.errors import ConfigError
from samv2.common.settings import Settings
from samv2.data.shards import load_client
from samv2.experts.sub_graph import SubGraph
from samv2.federated.client_round import (
    ClientRuntime,
    evaluate_round,
    load_runtime,
    state_folder,
    train_round,
)
from samv2.federated.grid import (
    FLOPS_BUDGET,
    MEMORY_BUDGET,
    asked_round,
    counts_to_record,
    reply_to_record,
    request_from_record,
    wants_counts,
)
from samv2.federated.rehearsal_mod import rehearsal_mod
from samv2.federated.run_config import RUN_DIR, settings_from_run_config
from samv2.federated.run_folder import RunFolder, run_model
from samv2.federated.scores import MOVED
from samv2.federated.subgraph import budget_of
from samv2.federated.told_counts import tell_counts, text_moved
from samv2.models.save import WEIGHTS


@dataclass(frozen=True, kw_only=True)
class ClientPlace:
    """Where a client process finds its model, text and state."""

    model: Path
    """Bootstrapped model folder."""
    shards: Path
    """Folder with the client's shard."""
    states: Path
    """Folder for the client's state."""
    settings: Settings


def make_client_app(place: ClientPlace | None = None) -> ClientApp:
    """A client app whose clients are named by ``client`` in their node config.

    The model is loaded once a process, at the first message that needs it.

    Args:
        place: where everything is; None reads it from Flower's contexts, see
            :func:`place_from_context`.
    """

    def where(context: Context) -> ClientPlace:
        return place if place is not None else place_from_context(context)

    mod = rehearsal_mod(
        lambda context: where(context).settings,
        client_index,
        lambda message, context: runtime_at(
            where(context), request_from_record(message.content).part
        ).manifest,
    )
    app = ClientApp(mods=[mod])

    @app.query()
    def query(message: Message, context: Context) -> Message:
        client = client_index(context)
        place = where(context)
        shard = load_client(place.shards, client)
        budget = budget_of(place.settings, client, context.node_config)
        metrics = MetricRecord(
            {
                "client": client,
                "train-tokens": len(shard.train),
                MEMORY_BUDGET: budget.memory_bytes,
                FLOPS_BUDGET: budget.flops,
            }
        )
        facts = ConfigRecord({"domains": ",".join(shard.heldout)})
        content = RecordDict({"metrics": metrics, "facts": facts})
        if wants_counts(message.content):
            folder = state_folder(place.states, client)
            frame = tell_counts(folder, shard, round=asked_round(message.content))
            content["counts"] = counts_to_record(frame)
        return Message(content, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = request_from_record(message.content)
        runtime = runtime_at(where(context), request.part)
        reply = train_round(runtime, client_index(context), request)
        return Message(reply_to_record(reply), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        request, client = request_from_record(message.content), client_index(context)
        runtime = runtime_at(where(context), request.part)
        scores = evaluate_round(runtime, client, request)
        metrics = MetricRecord()
        if request.told is not None:
            metrics[MOVED] = text_moved(
                state_folder(runtime.states, client),
                load_client(runtime.shards, client),
                round=request.round,
                told=request.told,
            )
        for domain, score in scores.items():
            metrics[f"nll.{domain}"] = score.nll
            metrics[f"tokens.{domain}"] = score.tokens
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def runtime_at(place: ClientPlace, part: SubGraph | None = None) -> ClientRuntime:
    """The process's runtime; a process serves one run, so one a kind of client is kept.

    Args:
        place: where everything is.
        part: what the client holds; None: the whole model.
    """
    weights = place.model / WEIGHTS
    written = weights.stat().st_mtime_ns if weights.is_file() else 0
    return _runtime_of(place, written, part)


@lru_cache(maxsize=3)
def _runtime_of(
    place: ClientPlace, written: int, part: SubGraph | None
) -> ClientRuntime:
    """``written`` tells a model from another that took its folder."""
    return load_runtime(place.model, place.shards, place.states, place.settings, part)


def client_index(context: Context) -> int:
    """The client's number: ``client`` of the node config, else ``partition-id``.

    Raises:
        ConfigError: the node config has neither.
    """
    for key in ("client", "partition-id"):
        if key in context.node_config:
            return int(context.node_config[key])
    raise ConfigError(
        [
            "the node config has neither 'client' nor 'partition-id'; start the node "
            "with --node-config 'partition-id=0'"
        ]
    )


def place_from_context(context: Context) -> ClientPlace:
    """Where a Flower node finds its model, text and state.

    ``run-dir`` and ``device`` of the node config have precedence over the run config's
    ``run-dir`` and ``train.device``.

    Raises:
        ConfigError: a setting is wrong, or the run directory is not absolute.
    """
    own = context.node_config.get(RUN_DIR)
    folder = Path(str(own)) if own is not None else None
    settings, root = settings_from_run_config(context.run_config, folder)
    if "device" in context.node_config:
        device = str(context.node_config["device"])
        settings = replace(settings, train=replace(settings.train, device=device))
    run = RunFolder(root=root)
    return ClientPlace(
        model=run_model(run, settings),
        shards=run.shards,
        states=run.states,
        settings=settings,
    )
