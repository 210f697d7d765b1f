"""The page about a run: what bound it, what it cost, what failed."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from openai_eval_client._format import clock, count, dollars, duration, percent
from openai_eval_client._report.charts import chart_sections
from openai_eval_client._report.html import Markup, cost_text, escape, name, section, table
from openai_eval_client._runtime import replacing
from openai_eval_client._wire import meaning_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from openai_eval_client._account import Account
    from openai_eval_client._limits import Limit, ModelLimits
    from openai_eval_client._stats import Failure, History, ModelTimeline, ReportData
    from openai_eval_client.models import ClientStats


_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser makes sure that nothing is loaded
_ROWS = 40  # of the table of costs
_MINUTE = 60.0
_LITTLE = 0.05  # of all time: waits that do not matter
_MUCH = 0.2  # of all time
_FULL = 0.85  # of a limit, from which it is what bound a run
_FAR_FROM = 1.1  # times: two limits that differ
_GENEROUS = 1.5  # times what answers take: a reservation that could be smaller
_FIELDS = {"requests": "requests_per_minute", "tokens": "tokens_per_minute"}

# --- what failures mean -----------------------------------------------------------------------------------

_SERVER_ERROR = 500
# --- what bound the run -----------------------------------------------------------------------------------


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
    if stats.retry_seconds > _MUCH * whole and stats.retry_seconds > waited:
        text = "The table of failures names what came back. A lower max_retries gives up earlier."
        return Bottleneck(f"slowed by {count(stats.retries)} retries after failed attempts", [text])
    known = [each for each in limits if each.model in history.models]
    if waited < _LITTLE * whole or not known:
        return _server(stats, history)
    return _held_up(stats, known, history)


def _held_up(stats: ClientStats, limits: Sequence[ModelLimits], history: History) -> Bottleneck:
    """Return the bottleneck by what requests waited for longest, and for which model."""
    waits = (
        (seconds, cause, number)
        for number, each in enumerate(limits)
        for cause, seconds in (each.waited or {"concurrency": 0.0}).items()
    )
    _, cause, number = max(waits)
    if cause == "pause":
        return _paused(stats, limits[number])
    if cause == "concurrency":
        return _concurrency(limits[number], history)
    if cause in _FIELDS:
        return _limited(cause, limits[number], history)
    return Bottleneck(f"held up by {cause} ({limits[number].model})")


def limit_shares(limits: ModelLimits, history: History) -> dict[str, float]:
    """Return the share of each limit that was used, from a model's first request to its last."""
    # What a full bucket admitted at once is part of the limit, as in `ClientStats.utilisation`, and so is
    # what was refilled while nothing was sent.
    timeline = history.models[limits.model]
    used: dict[str, float] = {}
    for dimension, limit, spent in (
        ("requests", limits.requests, sum(timeline.admitted)),
        ("tokens", limits.tokens, sum(timeline.reserved)),
    ):
        if limit.per_minute:
            rate = limit.per_minute / _MINUTE
            refilled = sum(min(limit.burst, seconds * rate) for seconds in history.breaks.values())
            admitted = limit.burst + refilled + rate * (timeline.last - timeline.first)
            used[dimension] = spent / max(admitted, 1.0)
    return used


def _limited(cause: str, limits: ModelLimits, history: History) -> Bottleneck:
    """Return the bottleneck of a run that waited for requests or tokens per minute."""
    timeline, share = history.models[limits.model], limit_shares(limits, history).get(cause)
    where = f"{cause} per minute ({limits.model})"
    corrections = _corrections(cause, limits.requests if cause == "requests" else limits.tokens)
    ways_out = _ways_out(cause, limits, timeline)
    if share is None:
        return Bottleneck(f"bound by {where}", [*ways_out])
    if share >= _FULL:
        return Bottleneck(f"bound by {where}: {percent(share)} used", [*corrections, *ways_out])
    text = (
        "It was short: a client begins with one second's quota, and learns the rest from the answers."
        if timeline.last - timeline.first < _MINUTE
        else "Requests waited although the limit was not used up on the whole: they came in bursts, or "
        "the server had less left than its limit says, as it does where other programs spend the same quota."
    )
    return Bottleneck(f"paced by {where}: {percent(share)} used", [text, *corrections])


def _corrections(cause: str, limit: Limit) -> Iterator[str]:
    """Say where the configured limit is not the server's."""
    configured, server, field = limit.configured, limit.server, _FIELDS[cause]
    if server is None or configured is None:
        return
    if server > _FAR_FROM * configured:
        yield (
            f"The server states a limit of {count(server)}, and {count(configured)} is configured: "
            f"RateLimitConfig({field}={round(server)}) would admit up to "
            f"{server / configured:.1f} times as much."
        )
    elif configured > _FAR_FROM * server:
        yield (
            f"The server's limit is {count(server)}, less than the {count(configured)} configured: "
            f"{field}={round(server)} says it from the start."
        )


def _ways_out(cause: str, limits: ModelLimits, timeline: ModelTimeline) -> Iterator[str]:
    requests, length = max(sum(timeline.admitted), 1.0), limits.output_length
    reserved, used = sum(timeline.reserved) / requests, sum(timeline.used) / requests
    if cause == "tokens" and used and reserved > _GENEROUS * used and length:
        enough = math.ceil((length["mean"] + 3 * length["spread"]) / 10) * 10
        yield (
            f"A request reserved {count(reserved)} tokens and used {count(used)}: servers count what is "
            "reserved, so a smaller max_tokens lets more through. "
            f"Answers took {count(length['mean'])} tokens on average; {count(enough)} fit nearly all."
        )
    elif cause == "tokens":
        yield "Shorter prompts, or a smaller max_tokens, let more through."
    else:
        yield "Several questions in one prompt make fewer requests of the same tokens."
    yield (
        "The Batch API (use_batch_api=True) has limits of its own, and half the price; "
        "a higher usage tier or another model has higher ones."
    )


def _concurrency(limits: ModelLimits, history: History) -> Bottleneck:
    """Return the bottleneck of a run that could have had more requests in flight."""
    used, timeline = limit_shares(limits, history), history.models[limits.model]
    shares = "".join(f", {percent(share)} of its {each} per minute used" for each, share in used.items())
    seconds = timeline.seconds / max(sum(timeline.admitted), 1.0)
    enough, most = _enough_in_flight(limits, timeline, seconds), _most_in_flight(history)
    latency = duration(seconds)
    if enough is None:
        text = "Raise max_concurrent step by step, for as long as latency and 429s do not rise with it."
    elif enough > _FAR_FROM * max(1.0, min(limits.max_concurrent, most)):
        text = (
            f"At {latency} a request, about {enough} in flight would use the limits up; "
            f"there were at most {most:.0f}."
        )
    elif max(used.values(), default=0.0) < _FULL:
        text = (
            "More in flight would only spend sooner what a full bucket admits at once: "
            f"at {latency} a request, {enough} in flight use up what the limits admit in the long run."
        )
    else:
        text = "The limits on requests and tokens are nearly used up, too: more in flight would gain little."
    return Bottleneck(f"bound by max_concurrent ({limits.model}){shares}", [text])


def _most_in_flight(history: History) -> float:
    return max(history.in_flight, default=0.0)


def _enough_in_flight(limits: ModelLimits, timeline: ModelTimeline, seconds: float) -> int | None:
    """Return how many in flight use the limits up: rate x latency (Little's law); None without a limit."""
    tokens = sum(timeline.reserved) / max(sum(timeline.admitted), 1.0)
    needs = ((limits.requests.per_minute, 1.0), (limits.tokens.per_minute, tokens))
    rates = [limit / _MINUTE / need for limit, need in needs if limit and need]
    return math.ceil(min(rates) * seconds) if rates else None


def _paused(stats: ClientStats, limits: ModelLimits) -> Bottleneck:
    """Return the bottleneck of a run that the server refused again and again."""
    where = max(stats.rate_limited_by, key=stats.rate_limited_by.__getitem__, default="unknown")
    named = f", mostly for {where}" if where != "unknown" else ""
    share = (
        "Programs that spend the same quota at the same time can share it (redis_url); "
        "else lower the configured limits to the part of it that is this program's."
    )
    advice = [*_corrections("requests", limits.requests), *_corrections("tokens", limits.tokens), share]
    return Bottleneck(f"held up by the server: {count(stats.rate_limited)} times 429{named}", advice)


def _server(stats: ClientStats, history: History) -> Bottleneck:
    """Return the bottleneck of a run that waited for no limit."""
    latency = duration(stats.server_seconds / stats.attempts)
    text = (
        f"No request waited for a limit: each took {latency} at the server, at most "
        f"{_most_in_flight(history):.1f} at a time. To go faster, ask for more at once: "
        "batch_generate instead of one prompt after the other."
    )
    return Bottleneck("bound by the time the server takes", [text] if stats.requests > 1 else [])


# --- the page ---------------------------------------------------------------------------------------------


def write_report(path: str | os.PathLike[str], account: Account, base_url: str, title: str | None) -> Path:
    """Write the page about what a client did, and return its path."""
    stats, data, limits = account.stats, account.recorder.report_data(), account.limiter.limits
    found, began_at = bottleneck(stats, limits, data.history), data.history.began_at
    began = "" if began_at is None else f", first request {clock(began_at)}"
    about = f"{urlsplit(base_url).hostname or base_url}{began}; written {clock(time.time())}"
    heading, style = escape(title or "Run report"), Path(__file__).with_name("report.css").read_text("utf-8")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{heading}</title><style>{style}</style></head><body><main>\n"
        f'<header><h1>{heading}</h1><p class="meta">{escape(about)}</p>'
        f'<p class="summary">{escape(_summary(stats, data.history, found))}</p></header>\n'
        f"{''.join(_sections(stats, data, limits, found))}</main></body></html>\n"
    )
    return write_page(path, page)


def write_page(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page, in place of what was there, as `replacing` does."""
    try:
        with replacing(os.fspath(path)) as file:
            file.write(text.encode())
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None  # the name that the caller knows
        raise
    return Path(path)


def _summary(stats: ClientStats, history: History, found: Bottleneck) -> str:
    cached = f" ({count(stats.cache_hits)} from the cache)" if stats.cache_hits else ""
    idle = sum(history.breaks.values())
    whole = f" at work within {duration(history.seconds + idle)}" if idle else ""
    return (
        f"{count(stats.requests - stats.failures)} answered{cached}, {count(stats.failures)} failed, "
        f"{cost_text(stats.cost)}, {duration(history.seconds)}{whole}; {found.headline}"
    )


def _sections(
    stats: ClientStats, data: ReportData, limits: Sequence[ModelLimits], found: Bottleneck
) -> Iterator[str]:
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in found.advice)
    headline = escape(f"{found.headline[:1].upper()}{found.headline[1:]}.")
    yield f'<div class="card bottleneck"><b>{headline}</b>{f"<ul>{advice}</ul>" if advice else ""}</div>'
    yield _tiles(stats, data.history)
    yield from chart_sections(stats, data, limits)
    if stats.cost.rows:
        yield section("Cost", _card(_costs(stats)), note=_cost_note(stats))
    if data.history.models:
        yield section("Models", _card(_models(data.history, limits)))
    if data.finish_reasons:
        yield _finish_reasons(stats, data.finish_reasons)
    yield _failures(stats, data.failures)


def _card(content: Markup) -> str:
    return f'<div class="card"><div class="scroll">{content}</div></div>'


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


def _costs(stats: ClientStats) -> Markup:
    ordered = sorted(stats.cost.rows, key=lambda row: (-(row.cost or 0), -row.calls))
    most, rows = float(ordered[0].cost or 0), []
    for row in ordered[:_ROWS]:
        counts = map(count, (row.calls, row.input_tokens, row.cached_tokens, row.output_tokens))
        cost = _with_bar(float(row.cost or 0) / most if most else 0.0, dollars(row.cost))
        rows.append((name(row.model), row.channel, row.service_tier, *counts, cost))
    head = ("model", "channel", "tier", "calls", "tokens in", "cached", "tokens out", "USD")
    return table(head, rows, texts=3)


def _with_bar(share: float, amount: str) -> Markup:
    bar = f'<span class="part" style="width:{100 * min(share, 1.0):.1f}%"></span>' if share > 0 else ""
    return Markup(f'<span class="track">{bar}</span><span class="amount">{amount}</span>')


def _cost_note(stats: ClientStats) -> str:
    cost, parts = stats.cost, [f"{cost_text(stats.cost)} by list prices."]
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


def _models(history: History, limits: Sequence[ModelLimits]) -> Markup:
    known, rows = {each.model: each for each in limits}, []
    for model, of in sorted(history.models.items(), key=lambda pair: -sum(pair[1].admitted)):
        sums = map(sum, (of.admitted, of.rate_limited, of.failed, of.reserved, of.used))
        used = limit_shares(known[model], history) if model in known else {}
        shares = (percent(used[each]) if each in used else "-" for each in _FIELDS)
        length = known[model].output_length.get("mean") if model in known else None
        rows.append((name(model), *map(count, sums), *shares, "-" if length is None else count(length)))
    counts = ("sent", "429s", "failed", "tokens reserved", "tokens used")
    return table(("model", *counts, "of requests/min", "of tokens/min", "answer, tokens"), rows)


def _finish_reasons(stats: ClientStats, reasons: Mapping[str, int]) -> Markup:
    counted = sum(reasons.values())
    ordered = sorted(reasons.items(), key=lambda pair: -pair[1])
    rows = [(name(reason), count(times), percent(times / counted)) for reason, times in ordered]
    others = stats.requests - stats.failures - counted
    note = f"Not counted: {count(others)} answers from the cache or to calls on client.openai."
    content = _card(table(("how answers ended", "answers", "share"), rows))
    return section("Finish reasons", content, note=note if others > 0 else "")


def _failures(stats: ClientStats, failures: Sequence[Failure]) -> Markup:
    rows = []
    for each in failures:
        error = name(" ".join(str(part) for part in (each.kind, each.status, each.code) if part))
        wide = (
            Markup(f'<span class="wide">{escape(text)}</span>')
            for text in (error, meaning_of(each.kind, each.status, each.code))
        )
        times = (Markup(clock(at).replace(" ", "<br>")) for at in (each.first, each.last))
        rows.append((name(each.model), *wide, count(each.attempts), count(each.prompts), *times))
    head = ("model", "error", "what it means", "attempts", "prompts lost", "first", "last")
    content = table(head, rows, texts=3) if rows else Markup("No attempt failed.")
    unnamed = stats.failures - sum(each.prompts for each in failures)
    note = f"{count(unnamed)} requests of batches failed: their errors are among the results."
    return section("Failures", _card(content), note=note if unnamed > 0 else "")
