"""The page about a run: what bound it, what it cost, what failed."""

from __future__ import annotations

import math
import os
import time
from operator import itemgetter
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from openai_eval_client._format import clock, count, dollars, duration, percent
from openai_eval_client._report.drawing import (
    Markup,
    chart_sections,
    cost_text,
    escape,
    name,
    remarks,
    section,
    table,
)
from openai_eval_client._runtime import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from openai_eval_client._account import Account
    from openai_eval_client._limits import Limit, ModelLimits
    from openai_eval_client._stats import Failure, History, ModelTimeline, ReportData
    from openai_eval_client.models import ClientStats

    Rows = Sequence[Sequence[object]]

_ROWS = 40  # of the table of costs
_MINUTE = 60.0
_LITTLE = 0.05  # of all time: waits that do not matter
_MUCH = 0.2  # of all time
_FULL = 0.85  # of a limit, from which it is what bound a run
_FAR_FROM = 1.1  # times: two limits that differ
_GENEROUS = 1.5  # times what answers take: a reservation that could be smaller
_DIMENSIONS = ("requests", "tokens")


class Bottleneck(NamedTuple):
    """What bound a run."""

    headline: str
    advice: Sequence[str] = ()  # what to do about it, sentence by sentence


def bottleneck(stats: ClientStats, limits: Sequence[ModelLimits], history: History) -> Bottleneck:
    """Return what bound a run, as far as the client can know."""
    if not stats.attempts:
        return Bottleneck("all answers came from the cache" if stats.cache_hits else "nothing was sent")
    waited = sum(sum(each.waited.values()) for each in limits)
    whole = waited + stats.server_seconds + stats.retry_seconds
    if stats.retry_seconds > max(_MUCH * whole, waited):
        text = "The table of failures names what came back. A lower max_retries gives up earlier."
        return Bottleneck(f"slowed by {count(stats.retries)} retries after failed attempts", [text])
    known = [each for each in limits if each.model in history.models]
    waits = [(seconds, cause, each) for each in known for cause, seconds in each.waited.items()]
    if waited < _LITTLE * whole or not waits:
        text = (
            f"No request waited for a limit: each took {duration(stats.server_seconds / stats.attempts)} "
            f"at the server, at most {max(history.in_flight):.1f} at a time. To go faster, ask for more at "
            "once: batch_generate instead of one prompt after the other."
        )
        return Bottleneck("bound by the time the server takes", [text] if stats.requests > 1 else [])
    _, cause, model = max(waits, key=itemgetter(0))
    if cause == "pause":
        return _paused(stats, model)
    return _concurrency(model, history) if cause == "concurrency" else _limited(cause, model, history)


def _paused(stats: ClientStats, limits: ModelLimits) -> Bottleneck:
    """Return the bottleneck of a run that the server refused again and again."""
    limit = max(stats.rate_limited_by, key=stats.rate_limited_by.__getitem__, default="unknown")
    named = "" if limit == "unknown" else f", mostly for {limit}"
    share = (
        "Programs that use the same quota at the same time can share it (redis_url); "
        "otherwise lower the configured limits to this program's part of it."
    )
    corrections = _corrections(limits, *_DIMENSIONS)
    headline = f"held up by the server: {count(stats.rate_limited)} times 429{named}"
    return Bottleneck(headline, [*corrections, share])


def _concurrency(limits: ModelLimits, history: History) -> Bottleneck:
    """Return the bottleneck of a run that could have had more requests in flight."""
    used, timeline = limit_shares(limits, history), history.models[limits.model]
    peak, sent = max(history.in_flight), max(sum(timeline.admitted), 1.0)
    latency = duration(timeline.seconds / sent)
    needs = (limits.requests.per_minute, 1.0), (limits.tokens.per_minute, sum(timeline.reserved) / sent)
    rates = [limit / _MINUTE / need for limit, need in needs if limit and need]  # requests per second
    enough = math.ceil(min(rates, default=0.0) * timeline.seconds / sent)  # rate x latency: Little's law
    if not rates:
        text = "Raise max_concurrent step by step, for as long as latency and 429s do not rise with it."
    elif enough > _FAR_FROM * max(1.0, min(limits.max_concurrent, peak)):
        text = (
            f"At {latency} a request, about {enough} in flight would use the limits up; "
            f"there were at most {peak:.0f}."
        )
    elif max(used.values()) < _FULL:
        text = (
            "More in flight would only spend sooner what a full bucket admits at once: "
            f"at {latency} a request, {enough} in flight use up what the limits admit in the long run."
        )
    else:
        text = "The limits on requests and tokens are nearly used up, too: more in flight would gain little."
    shares = "".join(f", {percent(share)} of its {each} per minute used" for each, share in used.items())
    return Bottleneck(f"bound by max_concurrent ({limits.model}){shares}", [text])


def _limited(dimension: str, limits: ModelLimits, history: History) -> Bottleneck:
    """Return the bottleneck of a run that waited for requests or tokens per minute."""
    timeline, share = history.models[limits.model], limit_shares(limits, history).get(dimension)
    used = "" if share is None else f": {percent(share)} used"
    where, corrections = f"{dimension} per minute ({limits.model}){used}", _corrections(limits, dimension)
    if share is not None and share < _FULL:
        text = (
            "It was short: a client begins with one second's quota, and learns the rest from the answers."
            if timeline.last - timeline.first < _MINUTE
            else "Requests waited although the limit was not used up overall: they came in bursts, or "
            "the server had less left than its limit says, as it does where other programs spend the same "
            "quota."
        )
        return Bottleneck(f"paced by {where}", [text, *corrections])
    elsewhere = (
        "The Batch API (use_batch_api=True) has limits of its own, and half the price; "
        "a higher usage tier or another model has higher ones."
    )
    less = "Several questions in one prompt make fewer requests of the same tokens."
    if dimension == "tokens":
        less = _smaller_requests(timeline, limits)
    return Bottleneck(f"bound by {where}", [*corrections, less, elsewhere])


def _smaller_requests(timeline: ModelTimeline, limits: ModelLimits) -> str:
    """Say how a request can take fewer tokens."""
    requests, length = max(sum(timeline.admitted), 1.0), limits.output_length
    reserved, used = sum(timeline.reserved) / requests, sum(timeline.used) / requests
    if not used or reserved <= _GENEROUS * used or not length:
        return "Shorter prompts, or a smaller max_tokens, let more through."
    enough = math.ceil((length["mean"] + 3 * length["spread"]) / 10) * 10
    return (
        f"A request reserved {count(reserved)} tokens and used {count(used)}: servers count what is "
        "reserved, so a smaller max_tokens lets more through. "
        f"Answers took {count(length['mean'])} tokens on average; {count(enough)} fit nearly all."
    )


def _corrections(limits: ModelLimits, *dimensions: str) -> Iterator[str]:
    """Say where a configured limit is not the server's."""
    for dimension in dimensions:
        limit: Limit = getattr(limits, dimension)
        configured, server = limit.configured, limit.server
        if configured is None or server is None:
            continue
        setting = f"{dimension}_per_minute={round(server)}"
        if server > _FAR_FROM * configured:
            yield (
                f"The server states a limit of {count(server)}, and {count(configured)} is configured: "
                f"RateLimitConfig({setting}) would admit up to {server / configured:.1f} times as much."
            )
        elif configured > _FAR_FROM * server:
            yield (
                f"The server's limit is {count(server)}, less than the {count(configured)} configured: "
                f"{setting} keeps to it from the start."
            )


def limit_shares(limits: ModelLimits, history: History) -> dict[str, float]:
    """Return the share of each limit that was used, from a model's first request to its last."""
    # What a full bucket admitted at once is part of the limit, as in `ClientStats.utilisation`, and so is
    # what was refilled while nothing was sent.
    timeline, shares = history.models[limits.model], {}
    spent = {"requests": timeline.admitted, "tokens": timeline.reserved}
    for dimension in _DIMENSIONS:
        limit: Limit = getattr(limits, dimension)
        if limit.per_minute:
            rate = limit.per_minute / _MINUTE
            refilled = sum(min(limit.burst, seconds * rate) for seconds in history.breaks.values())
            admitted = limit.burst + refilled + rate * (timeline.last - timeline.first)
            shares[dimension] = sum(spent[dimension]) / max(admitted, 1.0)
    return shares


def write_report(path: str | os.PathLike[str], account: Account, base_url: str, title: str | None) -> Path:
    """Write the page about what a client did, and return its path."""
    stats, data, limits = account.stats, account.recorder.report_data(), account.limiter.limits
    history, bound = data.history, bottleneck(stats, limits, data.history)
    began = "" if history.began_at is None else f", first request {clock(history.began_at)}"
    about = f"{urlsplit(base_url).hostname or base_url}{began}; written {clock(time.time())}"
    cached = f" ({count(stats.cache_hits)} from the cache)" if stats.cache_hits else ""
    idle = sum(history.breaks.values())
    whole = f" at work within {duration(history.seconds + idle)}" if idle else ""
    summary = (
        f"{count(stats.requests - stats.failures)} answered{cached}, {count(stats.failures)} failed, "
        f"{cost_text(stats.cost)}, {duration(history.seconds)}{whole}; {bound.headline}"
    )
    template = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    texts = {"title": title or "Run report", "about": about, "summary": summary}
    parts = {key: escape(text) for key, text in texts.items()}
    sections = "".join(_sections(stats, data, limits, bound))
    return write_page(path, template.substitute(parts, sections=sections))


def write_page(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page, in place of what was there, as `replacing` does."""
    try:
        with replacing(os.fspath(path)) as file:
            file.write(text.encode())
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None  # the name that the caller knows
        raise
    return Path(path)


def _sections(
    stats: ClientStats, data: ReportData, limits: Sequence[ModelLimits], bound: Bottleneck
) -> Iterator[str]:
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in bound.advice)
    headline = escape(f"{bound.headline[:1].upper()}{bound.headline[1:]}.")
    yield f'<div class="card bottleneck"><b>{headline}</b>{f"<ul>{advice}</ul>" if advice else ""}</div>'
    yield _tiles(stats, data.history)
    yield _remarks(stats)
    yield from chart_sections(stats, data, limits)
    yield _costs(stats)
    yield _models(data.history, limits)
    yield _finish_reasons(stats)
    yield _failures(stats, data.failures)


def _table_section(
    heading: str, head: Sequence[str], rows: Rows, *, texts: int = 1, note: str = "", empty: str = ""
) -> str:
    """Return a section with a table; without rows one that says `empty`, or none."""
    content = table(head, rows, texts=texts) if rows else empty
    card = f'<div class="card"><div class="scroll">{content}</div></div>'
    return section(heading, card, note=note) if content else ""


def _tiles(stats: ClientStats, history: History) -> str:
    figures = {
        "answered": count(stats.requests - stats.failures),
        "failed": count(stats.failures),
        "cost": "unknown" if stats.unpriced and not stats.cost else dollars(stats.cost.total),
        "time": duration(history.seconds),
        "tokens in": count(stats.prompt_tokens),
        "tokens out": count(stats.completion_tokens),
        "429s / retries": f"{count(stats.rate_limited)} / {count(stats.retries)}",
        "median latency": "-" if stats.latency_p50 is None else duration(stats.latency_p50),
    }
    tiles = (f"<div><dt>{label}</dt><dd>{figure}</dd></div>" for label, figure in figures.items())
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n'


def _remarks(stats: ClientStats) -> str:
    found = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(stats))
    return (
        section("What to know about the answers", f'<div class="card"><ul>{found}</ul></div>')
        if found
        else ""
    )


def _costs(stats: ClientStats) -> str:
    ordered, rows = sorted(stats.cost.rows, key=lambda row: (-(row.cost or 0), -row.calls)), []
    for row in ordered[:_ROWS]:
        counts = map(count, (row.calls, row.input_tokens, row.cached_tokens, row.output_tokens))
        share = 100 * (row.cost or 0) / (ordered[0].cost or 1)
        bar = f'<span class="part" style="width:{share:.1f}%"></span>' if share else ""
        amount = f'<span class="track">{bar}</span><span class="amount">{dollars(row.cost)}</span>'
        rows.append((name(row.model), row.channel, row.service_tier, *counts, Markup(amount)))
    head = ("model", "channel", "tier", "calls", "tokens in", "cached", "tokens out", "USD")
    return _table_section("Cost", head, rows, texts=3, note=_cost_note(stats))


def _cost_note(stats: ClientStats) -> str:
    cost, budget = stats.cost, stats.budget or {}
    unaccounted = (
        f"{count(cost.unaccounted)} attempts may have been billed besides (no answer came, or none with "
        f"usage): up to {dollars(cost.unaccounted_cost)}."
    )
    retried = f"{count(cost.retried)} attempts were billed without bringing an answer, and are in it."
    sentences = (
        (True, f"{cost_text(cost)} by list prices."),
        (len(cost.rows) > _ROWS, f"The {_ROWS} largest of {len(cost.rows)} rows."),
        (cost.retried, retried),
        (cost.unaccounted, unaccounted),
        (cost.saved_by_cache, f"The cache saved {dollars(cost.saved_by_cache)}."),
        (budget, f"Budget: {dollars(budget.get('spent'))} of {dollars(budget.get('limit'))} spent."),
    )
    return " ".join(sentence for is_true, sentence in sentences if is_true)


def _models(history: History, limits: Sequence[ModelLimits]) -> str:
    known, rows = {each.model: each for each in limits}, []
    for model, of in sorted(history.models.items(), key=lambda pair: -sum(pair[1].admitted)):
        sums = map(sum, (of.admitted, of.rate_limited, of.failed, of.reserved, of.used))
        used = limit_shares(known[model], history) if model in known else {}
        shares = (percent(used[each]) if each in used else "-" for each in _DIMENSIONS)
        length = known[model].output_length.get("mean") if model in known else None
        rows.append((name(model), *map(count, sums), *shares, "-" if length is None else count(length)))
    counts = ("sent", "429s", "failed", "tokens reserved", "tokens used")
    head = ("model", *counts, "of requests/min", "of tokens/min", "answer, tokens")
    return _table_section("Models", head, rows)


def _finish_reasons(stats: ClientStats) -> str:
    counted = sum(stats.finish_reasons.values())
    ordered = sorted(stats.finish_reasons.items(), key=lambda pair: -pair[1])
    rows = [(name(reason), count(times), percent(times / counted)) for reason, times in ordered]
    others = stats.requests - stats.failures - counted
    note = f"Not counted: {count(others)} answers without a finish reason, or to calls on client.openai."
    head = ("how answers ended", "answers", "share")
    return _table_section("Finish reasons", head, rows, note=note if others > 0 else "")


def _failures(stats: ClientStats, failures: Sequence[Failure]) -> str:
    rows = []
    for failure in failures:
        error = name(" ".join(str(part) for part in (failure.kind, failure.status, failure.code) if part))
        texts = error, failure.meaning
        wide = (Markup(f'<span class="wide">{escape(text)}</span>') for text in texts)
        times = (Markup(clock(at).replace(" ", "<br>")) for at in (failure.first, failure.last))
        rows.append((name(failure.model), *wide, count(failure.attempts), count(failure.prompts), *times))
    head = ("model", "error", "what it means", "attempts", "prompts lost", "first", "last")
    unnamed = stats.failures - sum(failure.prompts for failure in failures)
    batches = f"{count(unnamed)} requests of batches failed: their errors are among the results."
    note = batches if unnamed > 0 else ""
    return _table_section("Failures", head, rows, texts=3, note=note, empty="No attempt failed.")
