"""The page about a run: what bound it, what it cost, what failed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from openai_eval_client._format import clock, count, dollars, duration, percent
from openai_eval_client._report.charts import pictures
from openai_eval_client._report.html import (
    Markup,
    card,
    escape,
    html_page,
    name,
    part,
    section,
    table,
    tiles,
    write_page,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path  # typer reads the annotations

    from openai_eval_client._account import Account
    from openai_eval_client._limits import Limit, ModelLimits
    from openai_eval_client._stats import Failure, History, ModelTimeline, ReportData
    from openai_eval_client.models import ClientStats, CostLedger, ModelCost


_SERVER_ERROR = 500
_BY_CODE = {
    "insufficient_quota": "the account's credit is used up: waiting does not help",
    "context_length_exceeded": "the prompt and max_tokens do not fit the model",
    "content_policy_violation": "the provider refuses the content",
    "model_not_found": "no such model, or not for this key",
    "invalid_api_key": "the key is wrong or was withdrawn",
}
_BY_STATUS = {
    400: "the server refuses the request itself",
    401: "the key is wrong or was withdrawn",
    403: "this key may not do that",
    404: "no such model or address",
    408: "the server gave up waiting; sent again",
    409: "in the way of another request; sent again",
    413: "the request is too large for the server",
    422: "the server refuses the request itself",
    429: "the server's limit was reached; sent again when it said",
}
_BY_KIND = {
    "TimeoutError": "no answer within timeout; sent again",
    "APIConnectionError": "the connection failed, or the answer was cut short; sent again",
    "APIResponseValidationError": "what came was no answer; sent again",
    "BudgetExceededError": "max_cost left too little; not sent",
    "RequestTooLargeError": "more tokens than the limit can ever admit; not sent",
    "ValidationError": "the input is wrong; not sent",
}


def failures_table(failures: Sequence[Failure]) -> Markup:
    """Return what went wrong, by kind."""
    head = ("model", "error", "what it means", "attempts", "prompts lost", "first", "last")
    return table(head, [_row(each) for each in failures], texts=3)


def _row(of: Failure) -> tuple[object, ...]:
    said = " ".join(str(part) for part in (of.kind, of.status, of.code) if part)
    means = Markup(f'<span class="wide">{escape(meaning(of))}</span>')
    times = (Markup(escape(clock(at)).replace(" ", "<br>")) for at in (of.first, of.last))
    return (
        name(of.model),
        Markup(f'<span class="wide">{name(said)}</span>'),
        means,
        count(of.attempts),
        count(of.prompts),
        *times,
    )


def meaning(of: Failure) -> str:
    """Return what a kind of failure means."""
    if of.code in _BY_CODE:
        return _BY_CODE[of.code]
    if of.status is not None and of.status >= _SERVER_ERROR:
        return "the server failed; sent again"
    return _BY_STATUS.get(of.status or 0) or _BY_KIND.get(of.kind) or "see the exception"


_MINUTE = 60.0
_LITTLE = 0.05  # of all time: waits that matter to nobody
_MUCH = 0.2  # of all time
_FULL = 0.85  # of a limit, from which it is what bound a run
_FAR_FROM = 1.1  # times: two limits that differ
_GENEROUS = 1.5  # times what answers take: a reservation that could be smaller
_FIELDS = {"requests": "requests_per_minute", "tokens": "tokens_per_minute"}


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What bound a run."""

    cause: str  # "requests", "tokens", "concurrency", "pause", "retries", "server", or "nothing" was sent
    headline: str  # the same in a few words
    advice: tuple[str, ...] = ()  # what to do about it, sentence by sentence


def shares(facts: ModelLimits, track: ModelTimeline, breaks: Mapping[int, float]) -> dict[str, float]:
    """Return the share of each limit that was used, from a model's first request to its last."""
    # What a full bucket admitted at once is part of the limit, as in `ClientStats.utilisation`, and so is
    # what was refilled while nothing was sent.
    spent = {"requests": sum(track.admitted), "tokens": sum(track.reserved)}
    used: dict[str, float] = {}
    for dimension, limit in (("requests", facts.requests), ("tokens", facts.tokens)):
        if limit.per_minute:
            rate = limit.per_minute / _MINUTE
            refilled = sum(min(limit.burst, seconds * rate) for seconds in breaks.values())
            admitted = limit.burst + refilled + rate * (track.last - track.first)
            used[dimension] = spent[dimension] / max(admitted, 1.0)
    return used


def bottleneck(stats: ClientStats, facts: Sequence[ModelLimits], history: History) -> Bottleneck:
    """Return what bound a run, as far as the client can know."""
    if not stats.attempts:
        cached = "all answers came from the cache" if stats.cache_hits else "nothing was sent"
        return Bottleneck("nothing", cached)
    waited = sum(sum(each.waited.values()) for each in facts)
    whole = waited + stats.server_seconds + stats.retry_seconds
    if stats.retry_seconds > _MUCH * whole and stats.retry_seconds > waited:
        return _failing(stats)
    known = [each for each in facts if each.model in history.models]
    if waited < _LITTLE * whole or not known:
        return _server(stats, history)
    _, cause, which = max(
        (seconds, cause, number)
        for number, each in enumerate(known)
        for cause, seconds in (each.waited or {"concurrency": 0.0}).items()
    )
    one, track = known[which], history.models[known[which].model]
    if cause == "pause":
        return _paused(stats, one)
    if cause == "concurrency":
        return _concurrency(one, track, history)
    return _limited(cause, one, track, history)


def _limited(cause: str, facts: ModelLimits, track: ModelTimeline, history: History) -> Bottleneck:
    """Return the bottleneck of a run that waited for requests or tokens per minute, or for anything else."""
    if cause not in _FIELDS:
        return Bottleneck(cause, f"held up by {cause} ({facts.model})")
    limit = facts.requests if cause == "requests" else facts.tokens
    share = shares(facts, track, history.breaks).get(cause)
    where = f"{cause} per minute ({facts.model})"
    if share is None:
        return Bottleneck(cause, f"bound by {where}", tuple(_ways_out(cause, facts, track)))
    if share < _FULL:
        seconds = track.last - track.first
        text = (
            "It was short: a client begins with one second's quota, and learns the rest from the answers."
            if seconds < _MINUTE
            else "Requests waited although the limit was not used up on the whole: they came in bursts, or "
            "the server had less left than its limit says, as it does where others spend the same quota."
        )
        return Bottleneck(
            cause, f"paced by {where}: {percent(share)} used", (text, *_corrections(cause, limit))
        )
    advice = (*_corrections(cause, limit), *_ways_out(cause, facts, track))
    return Bottleneck(cause, f"bound by {where}: {percent(share)} used", advice)


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


def _ways_out(cause: str, facts: ModelLimits, track: ModelTimeline) -> Iterator[str]:
    requests = sum(track.admitted)
    reserved, used = sum(track.reserved) / max(requests, 1), sum(track.used) / max(requests, 1)
    length = facts.output_length
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


def _concurrency(facts: ModelLimits, track: ModelTimeline, history: History) -> Bottleneck:
    """Return the bottleneck on a run that could have had more requests in flight."""
    used = shares(facts, track, history.breaks)
    level = "".join(f", {percent(share)} of its {each} per minute used" for each, share in used.items())
    headline = f"bound by max_concurrent ({facts.model}){level}"
    enough, latency = _enough_in_flight(facts, track), duration(_latency(track))
    most = max(history.in_flight[: history.bins], default=0.0)
    now = max(1.0, min(facts.max_concurrent, most))
    if enough is None:
        text = "Raise max_concurrent step by step, for as long as latency and 429s do not rise with it."
    elif enough > _FAR_FROM * now:
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
    return Bottleneck("concurrency", headline, (text,))


def _latency(track: ModelTimeline) -> float:
    """Return the mean seconds of an attempt."""
    return track.seconds / max(sum(track.admitted), 1.0)


def _enough_in_flight(facts: ModelLimits, track: ModelTimeline) -> int | None:
    """Return how many in flight use the limits up: rate x latency (Little's law); None without a limit."""
    limits = facts.requests.per_minute, facts.tokens.per_minute
    costs = 1.0, sum(track.reserved) / max(sum(track.admitted), 1.0)
    rates = [limit / _MINUTE / cost for limit, cost in zip(limits, costs, strict=True) if limit and cost]
    return math.ceil(min(rates) * _latency(track)) if rates else None


def _paused(stats: ClientStats, facts: ModelLimits) -> Bottleneck:
    """Return the bottleneck on a run that the server refused again and again."""
    where = max(stats.rate_limited_by.items(), key=lambda pair: pair[1], default=("unknown", 0))[0]
    named = f", mostly for {where}" if where != "unknown" else ""
    share = (
        "Programs that spend the same quota at the same time can share one budget; "
        "else lower the configured limits to the part of it that is this program's."
    )
    advice = [*_corrections("requests", facts.requests), *_corrections("tokens", facts.tokens), share]
    headline = f"held up by the server's unsupported: {count(stats.rate_limited)} times 429{named}"
    return Bottleneck("pause", headline, tuple(advice))


def _failing(stats: ClientStats) -> Bottleneck:
    text = "The table of failures names what came back. A lower max_retries gives up earlier."
    return Bottleneck("retries", f"slowed by {count(stats.retries)} retries after failed attempts", (text,))


def _server(stats: ClientStats, history: History) -> Bottleneck:
    """Return the bottleneck on a run that nothing of ours held up."""
    most = max(history.in_flight[: history.bins], default=0.0)
    latency = duration(stats.server_seconds / stats.attempts)
    text = (
        f"No request waited for a limit: each took {latency} at the server, at most {most:.1f} at a time. "
        "To go faster, ask for more at once: batch_generate instead of one prompt after the other."
    )
    return Bottleneck("server", "bound by the time the server takes", (text,) if stats.requests > 1 else ())


_COLUMNS = 80  # of a picture over time
_DRAWN = 6  # models that have pictures of their own
_ROWS = 40  # of a table


def write_report(path: str | os.PathLike[str], account: Account, base_url: str, title: str | None) -> Path:
    """Write the report of a client, and return its path."""
    stats, story, facts = account.stats, account.recorder.report_data(), account.facts
    return write_page(path, client_page(stats, story, facts, base_url=base_url, title=title))


def client_page(
    stats: ClientStats,
    story: ReportData,
    facts: Sequence[ModelLimits],
    *,
    base_url: str,
    title: str | None,
) -> Markup:
    """Return the report of a client."""
    history, said = story.history, bottleneck(stats, facts, story.history)
    began = "" if history.began_at is None else f", first request {clock(history.began_at)}"
    return html_page(
        title or "Run report",
        f"{urlsplit(base_url).hostname or base_url}{began}",
        summary(stats, history, said),
        _sections(stats, story, facts, said),
    )


def summary(stats: ClientStats, history: History, said: Bottleneck) -> str:
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


def _sections(
    stats: ClientStats, story: ReportData, facts: Sequence[ModelLimits], said: Bottleneck
) -> Iterator[str]:
    advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in said.advice)
    content = f"<b>{escape(_sentence(said.headline))}</b>{f'<ul>{advice}</ul>' if advice else ''}"
    yield f'<div class="card bottleneck">{content}</div>'
    yield _tiles(stats, story.history)
    yield from pictures(stats, story, facts)
    if stats.cost.rows:
        yield section("Cost", card(_costs(stats.cost)), note=_cost_note(stats))
    if story.history.models:
        yield section("Models", card(_models(story.history, facts)))
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
    return tiles(figures)


def _costs(cost: CostLedger) -> Markup:
    rows = sorted(cost.rows, key=lambda row: (-(row.cost or 0), -row.calls))
    most = max((float(row.cost or 0) for row in rows), default=0.0)
    head = ("model", "channel", "tier", "calls", "tokens in", "cached", "tokens out", "USD")
    return table(head, [_cost_row(row, most) for row in rows[:_ROWS]], texts=3)


def _cost_row(row: ModelCost, most: float) -> tuple[object, ...]:
    counts = map(count, (row.calls, row.input_tokens, row.cached_tokens, row.output_tokens))
    shown = dollars(row.cost)
    share = float(row.cost or 0) / most if most else 0.0
    return (name(row.model), row.channel, row.service_tier, *counts, part(share, shown))


def _cost_note(stats: ClientStats) -> str:
    cost, parts = stats.cost, [f"{bill(stats.cost)} by list prices."]
    if len(cost.rows) > _ROWS:
        parts.append(f"The {_ROWS} largest of {len(cost.rows)} rows.")
    if cost.retried:
        parts.append(f"{count(cost.retried)} attempts were billed without bringing an answer, and are in it.")
    if cost.unaccounted:
        parts.append(
            f"{count(cost.unaccounted)} attempts may have been billed besides (no answer came, or none with "
            f"usage): up to {dollars(cost.unaccounted_cost)}.",
        )
    if cost.saved_by_cache:
        parts.append(f"The cache saved {dollars(cost.saved_by_cache)}.")
    if stats.budget:
        parts.append(f"Budget: {dollars(stats.budget['spent'])} of {dollars(stats.budget['limit'])} spent.")
    return " ".join(parts)


def _models(history: History, facts: Sequence[ModelLimits]) -> Markup:
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
    for model, track in sorted(history.models.items(), key=lambda pair: -sum(pair[1].admitted)):
        used = shares(known[model], track, history.breaks) if model in known else {}
        length = known[model].output_length.get("mean") if model in known else None
        counts = (
            sum(each)
            for each in (track.admitted, track.rate_limited, track.failed, track.reserved, track.used)
        )
        of_limits = (percent(used[each]) if each in used else "-" for each in ("requests", "tokens"))
        rows.append((name(model), *map(count, counts), *of_limits, "-" if length is None else count(length)))
    return table(head, rows)


def _failures(stats: ClientStats, story: ReportData) -> Markup:
    unnamed = stats.failures - sum(row.prompts for row in story.failures)
    note = (
        f"{count(unnamed)} requests of batches failed: their errors are among the results."
        if unnamed > 0
        else ""
    )
    content = failures_table(story.failures) if story.failures else Markup("No attempt failed.")
    return section("Failures", card(content), note=note)
