"""The report of a cache file: what it holds, and what it cannot know."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from openai_eval_client import _charts, _page
from openai_eval_client._charts import Layer, Timeline
from openai_eval_client._html import Markup, clock, count, dollars, duration, escape, name, percent, table
from openai_eval_client._report_charts import latency

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from openai_eval_client._kept import Kept

_COLUMNS = 80  # of a picture over time
_PAUSE = 60.0  # seconds without an answer, from which they are left out
_PAUSES = 50  # at most
_ROWS = 40
_UNKNOWN = (
    "failures, retries and 429s: only answers are kept",
    "the limits, and what was waited for",
    "how often an answer was given again, and what that saved",
    "when an answer was first asked for, where it was asked for anew: the newest is kept",
    "streams, calls on client.openai, and prompts",
)


def cache_page(kept: Kept) -> Markup:
    """Return the report of a cache."""
    return _page.page(
        f"Answers kept in {Path(kept.name).name}", "an answer cache", summary(kept), _sections(kept)
    )


def summary(kept: Kept) -> str:
    """Return all of it in a line."""
    if not kept.times:
        return "no answers are kept"
    return (
        f"{count(len(kept.times))} answers of {count(len(kept.models))} models, {_cost(kept)} when they were "
        f"asked for, kept from {clock(min(kept.times))} to {clock(max(kept.times))}"
    )


def _cost(kept: Kept) -> str:
    unpriced = sum(model.unpriced for model in kept.models.values())
    if unpriced == len(kept.times):
        return "cost unknown"
    more = f" and {count(unpriced)} unpriced" if unpriced else ""
    return f"{dollars(math.fsum(model.cost for model in kept.models.values()))}{more}"


def _sections(kept: Kept) -> Iterator[Markup]:
    yield _page.tiles(_figures(kept))
    if kept.times:
        yield _page.section("When they were kept", _page.figures(_over_time(kept)))
        classes = kept.latency.classes()
        if classes:
            marks = {f"p{n}": kept.latency.percentile(n / 100) or 0.0 for n in (50, 95, 99)}
            drawn = latency(classes, marks, "the attempt that was answered; batches have none")
            yield _page.section("Latency", _page.figures([drawn]))
        yield _page.section("Models", _page.card(_models(kept)))
        yield _page.section("Why answers ended", _page.card(_reasons(kept)))
    listed = "".join(f"<li>{escape(each)}</li>" for each in _UNKNOWN)
    yield _page.section("What a cache does not know", Markup(f'<div class="card"><ul>{listed}</ul></div>'))


def _figures(kept: Kept) -> dict[str, object]:
    models = kept.models.values()
    figures: dict[str, object] = {
        "answers": count(len(kept.times)),
        "models": count(len(kept.models)),
        "tokens in": count(sum(model.prompt_tokens for model in models)),
        "tokens out": count(sum(model.completion_tokens for model in models)),
        "cost": dollars(math.fsum(model.cost for model in models)),
        "damaged": count(kept.unreadable),
    }
    if kept.journal:
        figures["batch jobs open"] = count(kept.journal)
    return figures


def _over_time(kept: Kept) -> Iterator[Markup]:
    """Return answers and tokens over time, the pauses between runs left out."""
    pairs = sorted(zip(kept.times, kept.tokens, strict=True))
    places, breaks = _places([at for at, _ in pairs])
    seconds = max(places[-1], 1.0)
    step = max(1.0, seconds / _COLUMNS)
    columns = math.ceil(seconds / step)
    for title, unit, values in (
        ("Answers", "answers", [1.0] * len(pairs)),
        ("Tokens, in and out", "tokens", [tokens for _, tokens in pairs]),
    ):
        sums = [0.0] * columns
        for place, value in zip(places, values, strict=True):
            sums[min(int(place / step), columns - 1)] += value
        style = "admitted" if unit == "answers" else "flight"
        layers = [Layer(unit, style, sums)]
        of = Timeline(f"{title} over time", unit, seconds, step, layers, breaks=breaks)
        keys = {style: f"{unit} in each {duration(step)}"}
        yield _page.figure(title, _charts.over_time(of), keys)


def _places(times: Sequence[float]) -> tuple[list[float], dict[float, float]]:
    """Return where sorted times stand on an axis without long pauses, and the pauses by their place."""
    longest = max(_PAUSE, (times[-1] - times[0]) / _PAUSES)
    places, breaks = [0.0], {}
    for before, after in itertools.pairwise(times):
        gap = after - before
        if gap > longest:
            breaks[places[-1]] = gap
        places.append(places[-1] + (0.0 if gap > longest else gap))
    return places, breaks


def _models(kept: Kept) -> Markup:
    rows = sorted(kept.models.items(), key=lambda pair: (-pair[1].cost, -pair[1].answers))
    most = max(model.cost for model in kept.models.values())
    head = ("model", "answers", "tokens in", "tokens out", "unpriced", "USD")
    shown = (
        (
            name(label),
            count(model.answers),
            count(model.prompt_tokens),
            count(model.completion_tokens),
            count(model.unpriced),
            _page.part(
                model.cost / most if most else 0.0,
                "unknown" if model.unpriced == model.answers else dollars(model.cost),
            ),
        )
        for label, model in rows[:_ROWS]
    )
    return table(head, shown)


def _reasons(kept: Kept) -> Markup:
    whole = kept.reasons.total()
    rows = [
        (name(reason), count(times), percent(times / whole)) for reason, times in kept.reasons.most_common()
    ]
    return table(("finish reason", "answers", "share"), rows)
