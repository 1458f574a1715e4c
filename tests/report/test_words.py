"""Numbers and results in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samv2.report import words
from samv2.report.graph_data import Trace
from samv2.report.reading import Missing
from samv2.report.run_data import Domain, RunFacts, read_run


def test_numbers() -> None:
    assert words.perplexity(21.839) == "21.84"
    assert words.perplexity(12345.6) == "12,346" and words.perplexity(None) == "–"
    assert words.size(12) == "12 bytes" and words.size(159_187) == "159 kB"
    assert words.size(4_055_040) == "4.06 MB" and words.size(2.5e9) == "2.5 GB"
    assert words.share(0.8541) == "85 %" and words.share(0.05, 1) == "5.0 %"
    assert words.change(-0.145) == "−14.5 %" and words.change(0.02) == "+2.0 %"
    assert words.duration(7.364) == "7.36 s"
    assert words.duration(281) == "4 min 41 s" and words.duration(7200) == "2.0 h"
    for show in (words.size, words.share, words.change, words.duration):
        assert show(None) == words.UNKNOWN


def test_sentences_parts() -> None:
    assert words.counted(1, "client") == "one client"
    assert words.counted(6, "client") == "six clients"
    assert words.counted(1200, "round") == "1,200 rounds"
    assert words.counted(0, "round") == "no rounds"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed(["a"]) == "a" and words.listed([]) == ""
    assert words.upper_first("six") == "Six" and words.upper_first("") == ""
    assert words.layer_label((10, 11), 1) == "layer 11"
    assert words.layer_label((), 1) == "converted layer 1"


@pytest.fixture
def facts(tiny_run: Path) -> RunFacts:
    """The tiny run with figures that are easy to follow."""
    found = read_run(tiny_run)
    assert not isinstance(found.result, Missing)
    result = replace(
        found.result,
        domains=(
            Domain(name="pydoc", dense=10.0, start=20.0, final=15.0),
            Domain(name="python", dense=10.0, start=20.0, final=15.0),
        ),
        bytes_up=1000.0,
        fedit_bytes=25_000.0,
        flops_fraction=0.5,
        seconds={"federation": 30.0, "load": None},
    )
    return replace(found, result=result)


def test_the_headline(facts: RunFacts) -> None:
    trained, came, cost = words.headline(facts)
    assert trained.startswith("Two clients trained ")
    assert "for two rounds" in trained and "pydoc and python" in trained
    assert "not finished" not in trained
    assert "fell on all two domains: from 20.00 to 15.00, geometric mean" in came
    assert "had 10.00; the result is 50 % above that" in came
    assert "at most 1 kB a round" in cost and "send 25 kB, 25 times as much" in cost
    assert "50 % of the dense model's FFN arithmetic" in cost
    assert "it visits 4 of 8 experts" in cost and cost.endswith("took 30 s.")


def test_the_headline_of_less(facts: RunFacts) -> None:
    assert not isinstance(facts.result, Missing)
    worse = (Domain(name="a", dense=None, start=1.0, final=2.0),)
    result = replace(facts.result, domains=worse, finished=False, rounds=1)
    trained, came, _ = words.headline(replace(facts, result=result))
    assert "1 of 2 rounds are done" in trained
    assert "fell on no domain: from 1.00 to 2.00" in came and "dense" not in came
    nothing = replace(result, domains=(), fedit_bytes=None, flops_fraction=None)
    _, came, cost = words.headline(replace(facts, result=nothing))
    assert came == "Held-out perplexity before and after is not known."
    assert "FedIT" not in cost and "arithmetic" not in cost
    one = replace(result, domains=(Domain(name="a", dense=1.0, start=2.0, final=1.0),))
    assert "the only domain" in words.headline(replace(facts, result=one))[1]
    missing = Missing(what="", remedy="")
    unknown = replace(facts, result=result, settings=missing)
    assert "it visits" not in words.headline(unknown)[2]
    assert "no finished round" in words.headline(replace(facts, result=missing))[0]


def test_what_divides_domains() -> None:
    share_DLE = np.full((3, 2, 4), 0.5)
    share_DLE[:, 1, 3] = (0.9, 0.1, 0.4)
    trace = Trace(
        domains=("a", "b", "c"), tokens=(9, 9, 9), share_DLE=share_DLE, walks=((),) * 3
    )
    assert words.most_divided(trace) == (1, 3)
    found = words.division(trace, (5, 7))
    assert "expert 3 of layer 7" in found
    assert "90 % of the tokens of a and by 10 % of those of b" in found
    alone = replace(trace, domains=("a",), share_DLE=share_DLE[:1])
    assert words.division(alone, ()) == ""
