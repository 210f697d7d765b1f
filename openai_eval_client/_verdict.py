"""What bound a run, and what to do about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openai_eval_client._html import count, duration, percent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from openai_eval_client._budget import Limit
    from openai_eval_client._limiter import Facts
    from openai_eval_client._timeline import History, Track
    from openai_eval_client.models import ClientStats

_MINUTE = 60.0
_LITTLE = 0.05  # of all time: waits that matter to nobody
_MUCH = 0.2  # of all time
_FULL = 0.85  # of a limit, from which it is what bound a run
_FAR_FROM = 1.1  # times: two limits that differ
_GENEROUS = 1.5  # times what answers take: a reservation that could be smaller
_FIELDS = {"requests": "requests_per_minute", "tokens": "tokens_per_minute"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What bound a run.

    Attributes:
        cause: "requests", "tokens", "concurrency", "pause", "retries", "server", or "nothing" was sent.
        headline: The same in a few words.
        advice: What to do about it, sentence by sentence.
    """

    cause: str
    headline: str
    advice: tuple[str, ...] = ()


def shares(facts: Facts, track: Track, breaks: Mapping[int, float]) -> dict[str, float]:
    """Return the share of each limit that was used, from a model's first request to its last.

    What a full bucket admitted at once is part of the limit, as in `ClientStats.utilisation`, and so is what
    was refilled while nothing was sent.
    """
    spent = {"requests": sum(track.admitted), "tokens": sum(track.reserved)}
    used: dict[str, float] = {}
    for dimension, limit in (("requests", facts.requests), ("tokens", facts.tokens)):
        if limit.per_minute:
            rate = limit.per_minute / _MINUTE
            refilled = sum(min(limit.burst, seconds * rate) for seconds in breaks.values())
            admitted = limit.burst + refilled + rate * (track.last - track.first)
            used[dimension] = spent[dimension] / max(admitted, 1.0)
    return used


def verdict(stats: ClientStats, facts: Sequence[Facts], history: History) -> Verdict:
    """Return what bound a run, as far as the client can know."""
    if not stats.attempts:
        cached = "all answers came from the cache" if stats.cache_hits else "nothing was sent"
        return Verdict("nothing", cached)
    waited = sum(sum(each.waited.values()) for each in facts)
    whole = waited + stats.server_seconds + stats.retry_seconds
    if stats.retry_seconds > _MUCH * whole and stats.retry_seconds > waited:
        return _failing(stats)
    known = [each for each in facts if each.model in history.tracks]
    if waited < _LITTLE * whole or not known:
        return _server(stats, history)
    _, cause, which = max(
        (seconds, cause, number)
        for number, each in enumerate(known)
        for cause, seconds in (each.waited or {"concurrency": 0.0}).items()
    )
    one, track = known[which], history.tracks[known[which].model]
    if cause == "pause":
        return _paused(stats, one)
    if cause == "concurrency":
        return _concurrency(one, track, history)
    return _limited(cause, one, track, history)


def _limited(cause: str, facts: Facts, track: Track, history: History) -> Verdict:
    """Return the verdict on a run that waited for requests or tokens per minute, or whatever else it was."""
    if cause not in _FIELDS:
        return Verdict(cause, f"held up by {cause} ({facts.model})")
    limit = facts.requests if cause == "requests" else facts.tokens
    share = shares(facts, track, history.breaks).get(cause)
    where = f"{cause} per minute ({facts.model})"
    if share is None:
        return Verdict(cause, f"bound by {where}", tuple(_ways_out(cause, facts, track)))
    if share < _FULL:
        seconds = track.last - track.first
        text = (
            "It was short: a client begins with one second's quota, and learns the rest from the answers."
            if seconds < _MINUTE
            else "Requests waited although the limit was not used up on the whole: they came in bursts, or "
            "the server had less left than its limit says, as it does where others spend the same quota."
        )
        return Verdict(cause, f"paced by {where}: {percent(share)} used", (text, *_corrections(cause, limit)))
    advice = (*_corrections(cause, limit), *_ways_out(cause, facts, track))
    return Verdict(cause, f"bound by {where}: {percent(share)} used", advice)


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


def _ways_out(cause: str, facts: Facts, track: Track) -> Iterator[str]:
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


def _concurrency(facts: Facts, track: Track, history: History) -> Verdict:
    """Return the verdict on a run that could have had more requests in flight."""
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
    return Verdict("concurrency", headline, (text,))


def _latency(track: Track) -> float:
    """Return the mean seconds of an attempt."""
    return track.seconds / max(sum(track.admitted), 1.0)


def _enough_in_flight(facts: Facts, track: Track) -> int | None:
    """Return how many in flight use the limits up: rate x latency (Little's law); None without a limit."""
    limits = facts.requests.per_minute, facts.tokens.per_minute
    costs = 1.0, sum(track.reserved) / max(sum(track.admitted), 1.0)
    rates = [limit / _MINUTE / cost for limit, cost in zip(limits, costs, strict=True) if limit and cost]
    return math.ceil(min(rates) * _latency(track)) if rates else None


def _paused(stats: ClientStats, facts: Facts) -> Verdict:
    """Return the verdict on a run that the server refused again and again."""
    where = max(stats.rate_limited_by.items(), key=lambda pair: pair[1], default=("unknown", 0))[0]
    named = f", mostly for {where}" if where != "unknown" else ""
    share = (
        "Programs that spend the same quota at the same time can share one budget; "
        "else lower the configured limits to the part of it that is this program's."
    )
    advice = [*_corrections("requests", facts.requests), *_corrections("tokens", facts.tokens), share]
    headline = f"held up by the server's refusals: {count(stats.rate_limited)} times 429{named}"
    return Verdict("pause", headline, tuple(advice))


def _failing(stats: ClientStats) -> Verdict:
    text = "The table of failures names what came back. A lower max_retries gives up earlier."
    return Verdict("retries", f"slowed by {count(stats.retries)} retries after failed attempts", (text,))


def _server(stats: ClientStats, history: History) -> Verdict:
    """Return the verdict on a run that nothing of ours held up."""
    most = max(history.in_flight[: history.bins], default=0.0)
    latency = duration(stats.server_seconds / stats.attempts)
    text = (
        f"No request waited for a limit: each took {latency} at the server, at most {most:.1f} at a time. "
        "To go faster, ask for more at once: batch_generate instead of one prompt after the other."
    )
    return Verdict("server", "bound by the time the server takes", (text,) if stats.requests > 1 else ())
