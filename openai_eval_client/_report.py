"""The report of a client: what it did, what held it up, what it cost, what went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from openai_eval_client import _page
from openai_eval_client._failures_shown import failures_table
from openai_eval_client._html import Markup, clock, count, dollars, duration, escape, name, percent, table
from openai_eval_client._report_charts import pictures
from openai_eval_client._verdict import shares, verdict

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from openai_eval_client._governor import Governor
    from openai_eval_client._limiter import Facts
    from openai_eval_client._stats import Story
    from openai_eval_client._timeline import History
    from openai_eval_client._verdict import Verdict
    from openai_eval_client.costs import CostLedger, ModelCost
    from openai_eval_client.models import ClientStats

_COLUMNS = 80  # of a picture over time
_DRAWN = 6  # models that have pictures of their own
_ROWS = 40  # of a table


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
    whole = (
        f" at work within {duration(history.seconds + sum(history.breaks.values()))}"
        if history.breaks
        else ""
    )
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
    yield from pictures(stats, story, facts)
    if stats.cost.rows:
        yield _page.section("Cost", _page.card(_costs(stats.cost)), note=_cost_note(stats))
    if story.history.tracks:
        yield _page.section("Models", _page.card(_models(story.history, facts)))
    yield _failures(stats, story)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _tiles(stats: ClientStats, history: History) -> Markup:
    median = "-" if stats.latency_p50 is None else duration(stats.latency_p50)
    figures = {
        "answered": count(stats.requests - stats.failures),
        "failed": count(stats.failures),
        "cost": "unknown" if stats.cost.unpriced and not stats.cost.total else dollars(stats.cost.total),
        "time": duration(history.seconds),
        "tokens in": count(stats.prompt_tokens),
        "tokens out": count(stats.completion_tokens),
        "429s / retries": f"{count(stats.rate_limited)} / {count(stats.retries)}",
        "median latency": median,
    }
    return _page.tiles(figures)


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
        used = shares(known[model], track, history.breaks) if model in known else {}
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
