"""The report of a client: what it did, what held it up, what it cost, what went wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from openai_eval_client import _charts, _page
from openai_eval_client._charts import Layer, Timeline
from openai_eval_client._failures_shown import failures_table
from openai_eval_client._html import Markup, clock, count, dollars, duration, escape, name, percent, table
from openai_eval_client._stats import Histogram
from openai_eval_client._verdict import shares, verdict

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from openai_eval_client._governor import Governor
    from openai_eval_client._limiter import Facts
    from openai_eval_client._stats import Story
    from openai_eval_client._timeline import History, Track
    from openai_eval_client._verdict import Verdict
    from openai_eval_client.costs import CostLedger, ModelCost
    from openai_eval_client.models import ClientStats

_COLUMNS = 80  # of a picture over time
_DRAWN = 6  # models that have pictures of their own
_ROWS = 40  # of a table
_MINUTE = 60.0
_CAUSES = {
    "server": "at the server",
    "requests": "waiting for requests per minute",
    "tokens": "waiting for tokens per minute",
    "concurrency": "waiting for a place in flight",
    "pause": "waiting out the server's pauses",
    "retries": "waiting before retries",
}


def write_report(path: str | os.PathLike[str], governor: Governor, base_url: str, title: str | None) -> Path:
    """Write the report of a client, and return its path."""
    stats, story, facts = governor.stats, governor.recorder.story(), governor.facts
    return _page.write(path, client_page(stats, story, facts, base_url=base_url, title=title))


def client_page(
    stats: ClientStats, story: Story, facts: Sequence[Facts], *, base_url: str, title: str | None
) -> Markup:
    """Return the report of a client.

    Args:
        stats: Its totals.
        story: What happened when, how long it took, what went wrong.
        facts: The limits of each model.
        base_url: The API's address, of which the host is shown.
        title: The heading; None: "Run report".
    """
    history, said = story.history, verdict(stats, facts, story.history)
    began = "" if history.began_at is None else f", first request {clock(history.began_at)}"
    return _page.page(
        title or "Run report",
        f"{urlsplit(base_url).hostname or base_url}{began}",
        summary(stats, history, said),
        _sections(stats, story, facts, said),
    )


def summary(stats: ClientStats, history: History, said: Verdict) -> str:
    """Return all of it in a line."""
    cached = f" ({count(stats.cache_hits)} from the cache)" if stats.cache_hits else ""
    whole = f", over {duration(history.seconds + sum(history.breaks.values()))}" if history.breaks else ""
    return (
        f"{count(stats.requests - stats.failures)} answered{cached}, {count(stats.failures)} failed, "
        f"{bill(stats.cost)}, {duration(history.seconds)}{whole}; {said.headline}"
    )


def bill(cost: CostLedger) -> str:
    """Return what it cost, as far as that is known."""
    if cost.unpriced and not cost.total:
        return "cost unknown"
    return f"{dollars(cost.total)}{f' and {count(cost.unpriced)} unpriced' if cost.unpriced else ''}"


def _sections(stats: ClientStats, story: Story, facts: Sequence[Facts], said: Verdict) -> Iterator[str]:
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in said.advice)
    content = f"<b>{escape(_sentence(said.headline))}</b>{f'<ul>{advice}</ul>' if advice else ''}"
    yield f'<div class="card verdict">{content}</div>'
    yield _tiles(stats, story.history)
    if stats.attempts and story.history.tracks:
        yield from _pictures(story, facts)
        yield _where_time_went(stats)
    if story.latency:
        yield _latency(stats, story.latency)
    if stats.cost.rows:
        yield _page.section("Cost", _page.card(_costs(stats.cost)), note=_cost_note(stats))
    if story.history.tracks:
        yield _page.section("Models", _page.card(_models(story.history, facts)))
    yield _failures(stats, story)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _tiles(stats: ClientStats, history: History) -> Markup:
    minutes = max(history.seconds, 1e-3) / _MINUTE
    median = "-" if stats.latency_p50 is None else duration(stats.latency_p50)
    figures = {
        "answered": count(stats.requests - stats.failures),
        "failed": count(stats.failures),
        "cost": "unknown" if stats.cost.unpriced and not stats.cost.total else dollars(stats.cost.total),
        "time": duration(history.seconds),
        "tokens in": count(stats.prompt_tokens),
        "tokens out": count(stats.completion_tokens),
        "429s": count(stats.rate_limited),
        "retries": count(stats.retries),
        "median latency": median,
    }
    if history.seconds >= _MINUTE:
        figures["attempts / min"] = count(stats.attempts / minutes)
    return _page.tiles(figures)


# --- over time -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Axis:
    """The columns that all pictures over time have.

    Attributes:
        history: What they show.
        seconds: How long it is; at least a second.
        group: Intervals of the history to a column.
        columns: How many columns.
    """

    history: History
    seconds: float
    group: int
    columns: int

    @classmethod
    def of(cls, history: History) -> _Axis:
        """Return those that fit a history: of a second at least, and not too many."""
        seconds = max(history.seconds, 1.0)
        group = math.ceil(max(1.0, seconds / _COLUMNS) / history.width)
        return cls(history, seconds, group, math.ceil(seconds / (group * history.width)))

    @property
    def step(self) -> float:
        """Seconds of a column."""
        return self.group * self.history.width

    @property
    def unit(self) -> str:
        """Of time, in which rates are shown."""
        return "min" if self.seconds >= _MINUTE else "s"

    @property
    def scale(self) -> float:
        """Seconds in that unit."""
        return _MINUTE if self.unit == "min" else 1.0

    def length(self, number: int) -> float:
        """Return how much of a column has passed, in seconds; of the last, half at least."""
        if self.columns == 1:
            return self.step
        return min(self.step, max(self.seconds - number * self.step, self.step / 2))

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return what happened in each column."""
        return [sum(values[n * self.group : (n + 1) * self.group]) for n in range(self.columns)]

    def rates(self, values: Sequence[float]) -> list[float]:
        """Return the same per unit of time."""
        return [total * self.scale / self.length(n) for n, total in enumerate(self.sums(values))]

    def picture(self, title: str, unit: str, layers: Sequence[Layer], **more: object) -> Markup:
        """Return a picture on this axis."""
        breaks = {(n + 0.5) * self.history.width: each for n, each in self.history.breaks.items()}
        options = {"breaks": breaks, **more}
        return _charts.over_time(Timeline(title, unit, self.seconds, self.step, layers, **options))  # type: ignore[arg-type]


def _pictures(story: Story, facts: Sequence[Facts]) -> Iterator[Markup]:
    axis = _Axis.of(story.history)
    tracks, known = story.history.tracks, {each.model: each for each in facts}
    largest = sorted(tracks, key=lambda model: -sum(tracks[model].reserved) - sum(tracks[model].admitted))
    metered = [model for model in largest if sum(tracks[model].reserved)][:_DRAWN]
    drawn = [
        each for model in metered for each in _against_limits(axis, model, tracks[model], known.get(model))
    ]
    left = len(tracks) - len(metered)
    more = f" The table below has {count(left)} more." if left > 0 else ""
    note = (
        f"Each column is {duration(axis.step)}; a full bucket lets more through at first than the limit alone."
        f"{more}"
    )
    if drawn:
        yield _page.section("Requests and tokens against their limits", _page.figures(drawn), note=note)
    yield _page.section("In flight, and refused", _page.figures(_flight(axis, story, facts)))


def _against_limits(axis: _Axis, model: str, track: Track, facts: Facts | None) -> Iterator[Markup]:
    """Return the two pictures of a model."""
    unit = axis.unit
    for dimension in ("requests", "tokens"):
        limits: dict[str, float] = {}
        if facts is not None:
            limit = facts.requests if dimension == "requests" else facts.tokens
            named = {"limit": limit.configured, "server's limit": limit.server}
            limits = {label: value * axis.scale / _MINUTE for label, value in named.items() if value}
            if limits.get("limit") == limits.get("server's limit"):
                limits.pop("server's limit", None)
        if dimension == "requests":
            layers, line = [Layer("sent", "admitted", axis.rates(track.admitted))], None
            keys = {"admitted": "sent"}
        else:
            layers = [Layer("reserved", "reserved", axis.rates(track.reserved))]
            line = Layer("used", "used", axis.rates(track.used))
            keys = {"reserved": "reserved when sent", "used": "used by answers"}
        title = f"{dimension} per {'minute' if unit == 'min' else 'second'}"
        drawn = axis.picture(f"{title}, {model}", f"{dimension}/{unit}", layers, line=line, limits=limits)
        yield _page.figure(Markup(f"{name(model)}: {title}"), drawn, keys)


def _flight(axis: _Axis, story: Story, facts: Sequence[Facts]) -> Iterator[Markup]:
    history = axis.history
    covered = [
        min(history.width, max(history.seconds - n * history.width, 0.0))
        for n in range(len(history.in_flight))
    ]
    areas = axis.sums([each * length for each, length in zip(history.in_flight, covered, strict=True)])
    lengths = axis.sums(covered)
    means = [area / length if length else 0.0 for area, length in zip(areas, lengths, strict=True)]
    drawn = axis.picture("Requests in flight", "requests", [Layer("in flight", "flight", means)])
    yield _page.figure("Requests in flight, on average", drawn, {})
    limited = axis.sums(
        [sum(each) for each in zip(*(t.rate_limited for t in history.tracks.values()), strict=True)]
    )
    failed = axis.sums([sum(each) for each in zip(*(t.failed for t in history.tracks.values()), strict=True)])
    if any(limited) or any(failed):
        layers = [Layer("429", "rate_limited", limited), Layer("other failures", "failed", failed)]
        keys = {"rate_limited": "429", "failed": "other failed attempts"}
        drawn = axis.picture("Attempts that brought no answer", "attempts", layers)
        yield _page.figure(f"Attempts that brought no answer, each {duration(axis.step)}", drawn, keys)


# --- the rest --------------------------------------------------------------------------------------------


def _where_time_went(stats: ClientStats) -> Markup:
    known = {"server": stats.server_seconds, "retries": stats.retry_seconds, **stats.wait_seconds_by}
    spent = {cause: known.get(cause, 0.0) for cause in _CAUSES if known.get(cause, 0.0) > 0}
    whole = sum(spent.values())
    if not whole:
        return Markup()
    parts = [(_CAUSES[cause], cause, seconds / whole) for cause, seconds in spent.items()]
    rows = [
        (
            Markup(f'<span class="swatch {cause}"></span>{escape(label)}'),
            duration(spent[cause]),
            percent(share),
        )
        for label, cause, share in parts
    ]
    bar = _charts.shares("Where time went", parts)
    content = f'<div class="card share">{bar}{table(("", "time", "share"), rows)}</div>'
    note = "Summed over all requests: ten that wait for a second are ten seconds. Prompts not yet taken up do not count."
    return _page.section("Where time went", content, note=note)


def _latency(stats: ClientStats, classes: dict[int, int]) -> Markup:
    known = {"p50": stats.latency_p50, "p95": stats.latency_p95, "p99": stats.latency_p99}
    marks = {label: value for label, value in known.items() if value is not None}
    return latency_section(
        classes, marks, "Of attempts that were answered, from their admission to their last byte"
    )


def latency_section(classes: dict[int, int], marks: dict[str, float], what: str) -> Markup:
    """Return the histogram of latency."""
    drawn = _charts.histogram("Latency", classes, Histogram.value_of, marks)
    note = f"{what}. The axis of time is logarithmic."
    return _page.section(
        "Latency", _page.figures([_page.figure("How long answers took", drawn, {})]), note=note
    )


def _costs(cost: CostLedger) -> Markup:
    rows = sorted(cost.rows, key=lambda row: (-(row.cost or 0), -row.calls))
    most = max((float(row.cost or 0) for row in rows), default=0.0)
    head = ("model", "road", "tier", "calls", "tokens in", "cached", "tokens out", "USD")
    return table(head, [_cost_row(row, most) for row in rows[:_ROWS]], texts=3)


def _cost_row(row: ModelCost, most: float) -> tuple[object, ...]:
    counts = map(count, (row.calls, row.input_tokens, row.cached_tokens, row.output_tokens))
    shown = dollars(row.cost)
    share = float(row.cost or 0) / most if most else 0.0
    return (name(row.model), row.road, row.service_tier, *counts, _page.part(share, shown))


def _cost_note(stats: ClientStats) -> str:
    cost, parts = stats.cost, [f"{bill(stats.cost)} by list prices."]
    if len(cost.rows) > _ROWS:
        parts.append(f"The {_ROWS} largest of {len(cost.rows)} rows.")
    if cost.retried:
        parts.append(f"{count(cost.retried)} attempts were billed without bringing an answer, and are in it.")
    if cost.unaccounted:
        parts.append(
            f"{count(cost.unaccounted)} attempts may have been billed besides (no answer came, or none with "
            f"usage): up to {dollars(cost.unaccounted_cost)}."
        )
    if cost.saved_by_cache:
        parts.append(f"The cache saved {dollars(cost.saved_by_cache)}.")
    if stats.budget:
        parts.append(f"Budget: {dollars(stats.budget['spent'])} of {dollars(stats.budget['limit'])} spent.")
    return " ".join(parts)


def _models(history: History, facts: Sequence[Facts]) -> Markup:
    known = {each.model: each for each in facts}
    head = (
        "model",
        "sent",
        "429s",
        "failed",
        "tokens reserved",
        "tokens used",
        "of requests/min",
        "of tokens/min",
        "answer, tokens",
    )
    rows = []
    for model, track in sorted(history.tracks.items(), key=lambda pair: -sum(pair[1].admitted)):
        used = shares(known[model], track) if model in known else {}
        length = known[model].output_length.get("mean") if model in known else None
        counts = (
            sum(each)
            for each in (track.admitted, track.rate_limited, track.failed, track.reserved, track.used)
        )
        of_limits = (percent(used[each]) if each in used else "-" for each in ("requests", "tokens"))
        rows.append((name(model), *map(count, counts), *of_limits, "-" if length is None else count(length)))
    return table(head, rows)


def _failures(stats: ClientStats, story: Story) -> Markup:
    unnamed = stats.failures - sum(row.prompts for row in story.failures)
    note = (
        f"{count(unnamed)} requests of batches failed: their errors are among the results."
        if unnamed > 0
        else ""
    )
    content = failures_table(story.failures) if story.failures else Markup("No attempt failed.")
    return _page.section("Failures", _page.card(content), note=note)
