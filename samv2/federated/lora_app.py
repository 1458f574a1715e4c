"""The Flower client app of the LoRA baselines; the work is in lora_round."""

from __future__ import annotations

from functools import lru_cache

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from samv2.federated.client_app import client_index
from samv2.federated.lora_round import (
    LoraPlace,
    LoraRuntime,
    evaluate_lora_round,
    load_lora_runtime,
    train_lora_round,
)


def make_lora_app(place: LoraPlace) -> ClientApp:
    """A client app whose clients are named by ``client`` in their node config.

    The model is loaded once a process, when a client enrols, so that no round waits.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        _runtime_of(place)
        metrics = MetricRecord({"client": client_index(context)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content["config"]
        result = train_lora_round(
            _runtime_of(place),
            list(config["clients"]) or [client_index(context)],
            int(config["server-round"]),
            to_tensors(message.content["arrays"]),
        )
        metrics = {
            "num-examples": result.examples,
            "tokens": result.tokens,
            "train-loss": result.mean_loss,
            "seconds": result.seconds,
        }
        content = {
            "arrays": to_arrays(result.adapters),
            "metrics": MetricRecord(metrics),
        }
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        scores = evaluate_lora_round(
            _runtime_of(place),
            client_index(context),
            int(message.content["config"]["server-round"]),
            to_tensors(message.content["arrays"]),
        )
        metrics = MetricRecord()
        for domain, score in scores.items():
            metrics[f"nll.{domain}"] = score.nll
            metrics[f"tokens.{domain}"] = score.tokens
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def to_arrays(adapters: dict[str, Tensor]) -> ArrayRecord:
    """Adapters as a Flower record."""
    return ArrayRecord({name: Array(value.numpy()) for name, value in adapters.items()})


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """The inverse of :func:`to_arrays`."""
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}


@lru_cache(maxsize=1)
def _runtime_of(place: LoraPlace) -> LoraRuntime:
    """The process's runtime; a process serves one run, so one is kept."""
    return load_lora_runtime(place)
