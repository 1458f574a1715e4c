"""The Flower client app: messages in, messages out; the work is in client_round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from samv2.common.config import to_flat
from samv2.common.errors import ConfigError
from samv2.common.settings import Settings
from samv2.data.shards import load_client
from samv2.federated.client_round import (
    ClientRuntime,
    evaluate_round,
    load_runtime,
    train_round,
)
from samv2.federated.grid import reply_to_record, request_from_record


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


def make_client_app(place: ClientPlace) -> ClientApp:
    """A client app whose clients are named by ``client`` in their node config.

    The model is loaded once a process, at the first message.
    """
    app = ClientApp()

    @lru_cache(maxsize=1)
    def runtime() -> ClientRuntime:
        return load_runtime(place.model, place.shards, place.states, place.settings)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        client = client_index(context)
        shard = load_client(place.shards, client)
        metrics = MetricRecord({"client": client, "train-tokens": len(shard.train)})
        facts = ConfigRecord({"domains": ",".join(shard.heldout)})
        content = RecordDict({"metrics": metrics, "facts": facts})
        return Message(content, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = request_from_record(message.content)
        reply = train_round(runtime(), client_index(context), request)
        return Message(reply_to_record(reply), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        request = request_from_record(message.content)
        scores = evaluate_round(runtime(), client_index(context), request)
        metrics = MetricRecord()
        for domain, score in scores.items():
            metrics[f"nll.{domain}"] = score.nll
            metrics[f"tokens.{domain}"] = score.tokens
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


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


def run_config_of(settings: Settings) -> dict[str, str | int | float | bool]:
    """Settings as a Flower run config."""
    return to_flat(settings)
