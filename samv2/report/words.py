"""Numbers and results in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samv2.report.graph_data import Trace
from samv2.report.reading import Missing
from samv2.report.run_data import Result, RunFacts

SMALL_NUMBERS = (
    "No one two three four five six seven eight nine ten eleven twelve".split()
)
UNKNOWN = "–"


def perplexity(value: float | None) -> str:
    """Two decimals, or three digits where it is large."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return UNKNOWN
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"


def share(value: float | None, digits: int = 0) -> str:
    """A part of one as per cent."""
    return UNKNOWN if value is None else f"{100 * value:.{digits}f} %"


def change(value: float | None) -> str:
    """A relative change as per cent with its sign."""
    return UNKNOWN if value is None else f"{100 * value:+.1f} %".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return UNKNOWN
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds / 3600:.1f} h"


def counted(count: int, noun: str) -> str:
    """A number and its noun: ``one client``, ``six clients``, ``40 clients``."""
    known = count < len(SMALL_NUMBERS)
    number = SMALL_NUMBERS[count].lower() if known else f"{count:,}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def upper_first(sentence: str) -> str:
    """The same with a capital at its start."""
    return sentence[:1].upper() + sentence[1:]


def headline(facts: RunFacts) -> tuple[str, ...]:
    """What was trained, what came of it, and at what cost; a sentence or two each."""
    result = facts.result
    if isinstance(result, Missing):
        return ("This run has no finished round yet, so there is no result to tell.",)
    return (_trained(facts, result), _came_of_it(result), _cost(facts, result))


def _trained(facts: RunFacts, result: Result) -> str:
    settings = None if isinstance(facts.settings, Missing) else facts.settings
    names = listed([domain.name for domain in result.domains])
    who = counted(settings.federation.clients, "client") if settings else "clients"
    planned = settings.federation.rounds if settings else result.rounds
    sentence = (
        f"{who} trained {result.model} together for {counted(result.rounds, 'round')}, "
        f"each on its own text, without sharing a sentence of it. The text: {names}."
    )
    if not result.finished or result.rounds < planned:
        sentence += (
            f" The run is not finished: {result.rounds} of {planned} rounds are done, "
            "and these are the figures so far."
        )
    return upper_first(sentence)


def _came_of_it(result: Result) -> str:
    known = [d for d in result.domains if d.change is not None]
    if not known:
        return "Held-out perplexity before and after is not known."
    fell = sum(d.change is not None and d.change < 0 for d in known)
    if fell == len(known):
        on = "the only domain" if fell == 1 else f"all {counted(fell, 'domain')}"
    else:
        on = f"{fell} of {len(known)} domains" if fell else "no domain"
    fell_on = (
        "Held-out perplexity (how surprised the model is by new text; lower is better) "
        f"fell on {on}"
    )
    start, final, dense = (result.mean(part) for part in ("start", "final", "dense"))
    if start is None or final is None:
        return f"{fell_on}."
    sentence = (
        f"{fell_on}: from {perplexity(start)} to {perplexity(final)}, geometric mean."
    )
    if dense is not None:
        side = "above" if final > dense else "below"
        sentence += (
            f" The dense model, before it was cut into experts, had "
            f"{perplexity(dense)}; the result is {share(abs(final / dense - 1))} {side} "
            "that."
        )
    return sentence


def _cost(facts: RunFacts, result: Result) -> str:
    parts = [f"A client uploaded at most {size(result.bytes_up)} a round"]
    if result.fedit_bytes and result.bytes_up:
        times = result.fedit_bytes / result.bytes_up
        compared = (
            f"{times:.0f} times as much" if times >= 2 else f"{times:.2g} times that"
        )
        parts.append(
            f"; rank-8 LoRA on the same layers (FedIT) would send "
            f"{size(result.fedit_bytes)}, {compared}"
        )
    sentence = "".join(parts) + "."
    if result.flops_fraction is not None:
        sentence += (
            f" A token takes {share(result.flops_fraction)} of the dense model's FFN "
            "arithmetic"
        )
        if not isinstance(facts.settings, Missing):
            experts = facts.settings.experts
            sentence += (
                f": it visits {experts.experts_per_token} of {experts.num_experts} "
                "experts in a converted layer"
            )
        sentence += "."
    return f"{sentence} Everything took {duration(result.total_seconds)}."


def layer_label(layers: Sequence[int], index: int) -> str:
    """A converted layer by the model's own count, where that is known."""
    return (
        f"layer {layers[index]}" if index < len(layers) else f"converted layer {index}"
    )


def most_divided(trace: Trace) -> tuple[int, int]:
    """Layer and expert whose visits differ most between domains."""
    spread_LE = trace.share_DLE.max(axis=0) - trace.share_DLE.min(axis=0)
    layer, expert = np.unravel_index(int(spread_LE.argmax()), spread_LE.shape)
    return int(layer), int(expert)


def division(trace: Trace, layers: Sequence[int]) -> str:
    """The expert that divides the domains most, as a sentence."""
    if len(trace.domains) < 2:
        return ""
    layer, expert = most_divided(trace)
    share_D = trace.share_DLE[:, layer, expert]
    most, least = int(share_D.argmax()), int(share_D.argmin())
    return (
        f"The sharpest division: expert {expert} of {layer_label(layers, layer)} is "
        f"visited by {share(float(share_D[most]))} of the tokens of "
        f"{trace.domains[most]} and by {share(float(share_D[least]))} of those of "
        f"{trace.domains[least]}."
    )
