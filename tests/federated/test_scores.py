"""Scores that clients report: which are believed, and their sum."""

from __future__ import annotations

import math
from typing import Any

import pytest

from samv2.federated.scores import believed_scores, is_scored, sum_scores
from samv2.federated.validate import LARGEST_LOSS
from tests.federated.runs import small_settings

SCORED: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"nll.python": 20.0, "tokens.python": 10}, {"python": 10}),
    ({"nll.evil": 20.0, "tokens.evil": 10}, {}),
    ({"nll.python": float("nan"), "tokens.python": 10}, {}),
    ({"nll.python": float("inf"), "tokens.python": 10}, {}),
    ({"nll.python": -1.0, "tokens.python": 10}, {}),
    ({"nll.python": 1e300, "tokens.python": 10}, {}),
    ({"nll.python": 500.1, "tokens.python": 10}, {}),
    ({"nll.python": 10**400, "tokens.python": 10}, {}),
    ({"nll.python": 20.0, "tokens.python": 0}, {}),
    ({"nll.python": 20.0, "tokens.python": 10**9}, {}),
    ({"nll.python": 20.0, "tokens.python": 2.5}, {}),
    ({"nll.python": 20.0}, {}),
    ({"nll.python": [1.0], "tokens.python": 10}, {}),
    ({"nll": 20.0, "tokens": 10}, {}),
]


@pytest.mark.parametrize(("metrics", "tokens"), SCORED)
def test_scores_that_cannot_be_are_left_out(
    metrics: dict[str, Any], tokens: dict[str, int]
) -> None:
    believed = believed_scores(
        {100: metrics},
        clients={100: 0},
        domains={"python", "pydoc"},
        most_tokens=100,
    )
    found = sum_scores(believed)
    assert {name: score.tokens for name, score in found.items()} == tokens


def test_scores_are_summed_over_the_nodes_that_were_asked() -> None:
    reported = {
        node: {"nll.python": nll, "tokens.python": 10}
        for node, nll in ((102, 1.0), (100, 2.0), (109, 800.0))
    }
    believed = believed_scores(
        reported | {101: {}},
        clients={100: 0, 101: 1, 102: 2},
        domains={"python"},
        most_tokens=10,
    )
    assert list(believed) == [2, 0]
    found = sum_scores(believed)
    assert found["python"].nll == 3.0 and found["python"].tokens == 20


def test_one_client_cannot_make_a_perplexity_infinite() -> None:
    largest = {"nll.python": LARGEST_LOSS * 10, "tokens.python": 10}
    believed = believed_scores(
        {100: largest}, clients={100: 0}, domains={"python"}, most_tokens=10
    )
    assert math.isfinite(sum_scores(believed)["python"].perplexity)


def test_the_bits_of_a_sum_do_not_depend_on_the_ids_of_nodes() -> None:
    told = {0: 0.1, 1: 0.2, 2: 0.3}
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    sums = set()
    for first, step in ((100, 1), (200, -1)):
        reported = {
            first + step * client: {"nll.python": nll, "tokens.python": 1}
            for client, nll in told.items()
        }
        clients = {first + step * client: client for client in told}
        believed = believed_scores(
            reported, clients=clients, domains={"python"}, most_tokens=1
        )
        sums.add(sum_scores(believed)["python"].nll)
    assert len(sums) == 1


def test_held_out_text_is_scored_every_so_often_and_at_the_end() -> None:
    settings = small_settings("-", "federation.rounds=5", "federation.eval_every=2")
    assert [n for n in range(1, 6) if is_scored(settings, n)] == [2, 4, 5]
