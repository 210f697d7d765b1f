"""What a notebook shows of statistics, estimates, jobs, bills and answers: one small table each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openai_eval_client._html import (
    Markup,
    clock,
    count,
    dollars,
    duration,
    escape,
    name,
    percent,
    table,
)

if TYPE_CHECKING:
    from openai_eval_client.costs import CostEstimate, CostLedger
    from openai_eval_client.models import BatchJobStatus, ClientStats, ModelResponse

_LONGEST = 2000  # characters of an answer that are shown
_MOST = 20  # rows of errors


def stats(of: ClientStats) -> Markup:
    """Return a client's figures."""
    latency = [of.latency_p50, of.latency_p95, of.latency_p99]
    unpriced = f", {count(of.unpriced)} unpriced" if of.unpriced else ""
    rows = {
        "answered / failed": f"{count(of.requests - of.failures)} / {count(of.failures)}",
        "attempts / retries / 429s": " / ".join(map(count, (of.attempts, of.retries, of.rate_limited))),
        "tokens in / out": f"{count(of.prompt_tokens)} / {count(of.completion_tokens)}",
        "cost": f"{dollars(of.cost.total)}{unpriced}",
        "from the cache": count(of.cache_hits),
        "latency p50 / p95 / p99": " / ".join("-" if value is None else duration(value) for value in latency),
        "waited, summed": _waits(of),
    }
    shares = [
        (Markup(f"{name(model)}: of its {dimension} limit"), percent(share))
        for model, each in of.utilisation.items()
        for dimension, share in each.items()
    ]
    return table((), [*rows.items(), *shares])


def _waits(of: ClientStats) -> str:
    causes = sorted(of.wait_seconds_by.items(), key=lambda pair: -pair[1])
    parts = ", ".join(f"{cause} {duration(seconds)}" for cause, seconds in causes if seconds)
    return f"{duration(of.wait_seconds)}{f' ({parts})' if parts else ''}"


def estimate(of: CostEstimate) -> Markup:
    """Return an estimate's bounds."""
    rows = [
        ("output tokens", *_bounds(of, "completion_tokens", count)),
        ("online", *_bounds(of, "cost", dollars)),
        ("by batch", *_bounds(of, "batch_cost", dollars)),
    ]
    minutes = "no limit is configured" if of.minutes is None else duration(60 * of.minutes)
    asked = f"{count(of.requests)} requests to {of.model}: {count(of.prompt_tokens)} tokens in"
    caption = f"{asked}; at the limits: {minutes}"
    return table(("", "at least", "likely", "at most"), rows, caption=caption)


def _bounds(of: CostEstimate, field: str, shown: Any) -> list[str]:
    values = [getattr(of, f"{field}_{bound}") for bound in ("low", "expected", "high")]
    return ["-" if value is None else shown(value) for value in values]


def job(of: BatchJobStatus) -> Markup:
    """Return how far a job is, and what went wrong."""
    rows = [
        ("job", name(of.job_id)),
        ("status", of.status),
        (
            "completed / failed / all",
            " / ".join(map(count, (of.completed_count, of.failed_count, of.request_count))),
        ),
        ("created", clock(of.created_at.timestamp())),
        ("completed", "-" if of.completed_at is None else clock(of.completed_at.timestamp())),
    ]
    rows += [(f"error {error.code or ''}", error.message) for error in of.errors[:_MOST]]
    return table((), rows, texts=2)


def bill(of: CostLedger) -> Markup:
    """Return a bill, row by row."""
    head = ("model", "road", "tier", "calls", "input", "cached", "output", "unpriced", "cost")
    rows = [
        (
            name(row.model),
            row.road,
            row.service_tier,
            count(row.calls),
            count(row.input_tokens),
            count(row.cached_tokens),
            count(row.output_tokens),
            count(row.unpriced),
            dollars(row.cost),
        )
        for row in of.rows
    ]
    more = f"; saved by the cache: {dollars(of.saved_by_cache)}" if of.saved_by_cache else ""
    lost = f"; unaccounted: {count(of.unaccounted)} attempts" if of.unaccounted else ""
    return table(head, rows, caption=f"{dollars(of.total)}{more}{lost}", texts=3)


def answer(of: ModelResponse) -> Markup:
    """Return an answer, and what it took."""
    text = of.content or of.refusal or ""
    cut = f"{text[:_LONGEST]}…" if len(text) > _LONGEST else text
    tokens = f"{count(of.usage.prompt_tokens)} / {count(of.usage.completion_tokens)}"
    rows = [
        (
            "refusal" if of.refusal and not of.content else "content",
            Markup(f'<pre style="white-space:pre-wrap;text-align:left">{escape(cut)}</pre>'),
        ),
        ("model", name(of.model)),
        ("finish reason", of.finish_reason),
        ("tokens in / out", tokens),
        ("cost", dollars(of.usage.estimated_cost)),
        ("latency", f"{duration(of.latency_ms / 1000)}{' (cached)' if of.cached else ''}"),
    ]
    return table((), rows, texts=2)
