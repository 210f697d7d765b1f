"""HTML: escaped text and tables, and what a notebook shows of a value."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from openai_eval_client._format import as_html, clock, count, dollars, duration, percent
from openai_eval_client.models import BatchJobStatus, ClientStats, CostEstimate, CostLedger, ModelResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


_LONG_NAME, _LONG_ANSWER = 48, 2000  # characters that are shown
_ERRORS = 20  # of a job that are shown


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Return any text as HTML: half a surrogate pair and control characters become a question mark."""
    if isinstance(text, Markup):
        return text
    valid = str(text).encode(errors="replace").decode()
    return Markup(html.escape("".join(char if char.isprintable() or char == "\n" else "?" for char in valid)))


def name(text: object) -> Markup:
    """Return a name as HTML; a long one without its middle, and whole as its title."""
    whole = str(text)
    if len(whole) <= _LONG_NAME:
        return escape(whole)
    half = _LONG_NAME // 2
    return Markup(f'<span title="{escape(whole)}">{escape(f"{whole[:half]}…{whole[-half + 1 :]}")}</span>')


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: object = "", texts: int = 1
) -> Markup:
    """Return a table; its first `texts` columns are aligned left, the others right."""
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    if head:
        above += f"<thead>{_row(head, 'th', texts)}</thead>"
    body = "".join(_row(row, "td", texts) for row in rows)
    return Markup(f"<table>{above}<tbody>{body}</tbody></table>")


def _row(cells: Sequence[object], tag: str, texts: int) -> str:
    row = ""
    for number, cell in enumerate(cells):
        kind = "td" if tag == "td" and number else "th"
        scope = "" if kind == "td" else ' scope="col"' if tag == "th" else ' scope="row"'
        align = "left" if number < texts else "right"
        row += f'<{kind}{scope} style="text-align:{align}">{escape(cell)}</{kind}>'
    return f"<tr>{row}</tr>"


def section(heading: str, content: str, *, note: str = "") -> Markup:
    """Return a part of a page under its heading; `note` says how to read it."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return Markup(f"<section><h2>{escape(heading)}</h2>{below}{content}</section>\n")


def cost_text(cost: CostLedger) -> str:
    """Return what it cost, as far as that is known."""
    if cost.unpriced and not cost.total:
        return "cost unknown"
    return dollars(cost.total) + (f" and {count(cost.unpriced)} unpriced" if cost.unpriced else "")


@as_html.register(ClientStats)
def _stats_table(stats: ClientStats) -> Markup:
    waits = sorted(stats.wait_seconds_by.items(), key=lambda pair: -pair[1])
    causes = ", ".join(f"{cause} {duration(seconds)}" for cause, seconds in waits if seconds)
    latency = (stats.latency_p50, stats.latency_p95, stats.latency_p99)
    rows: list[tuple[object, str]] = [
        ("answered / failed", _counts(stats.requests - stats.failures, stats.failures)),
        ("attempts / retries / 429s", _counts(stats.attempts, stats.retries, stats.rate_limited)),
        ("tokens in / out", _counts(stats.prompt_tokens, stats.completion_tokens)),
        ("cost", cost_text(stats.cost)),
        ("from the cache", count(stats.cache_hits)),
        ("latency p50 / p95 / p99", " / ".join(_known(each, duration) for each in latency)),
        ("waited, summed", duration(stats.wait_seconds) + (f" ({causes})" if causes else "")),
    ]
    for model, shares in stats.utilisation.items():
        rows += [(Markup(f"{name(model)}: of its {each} limit"), percent(shares[each])) for each in shares]
    return table((), rows)


def _counts(*numbers: int) -> str:
    return " / ".join(map(count, numbers))


def _known(value: Any, shown: Callable[[Any], str]) -> str:
    return "-" if value is None else shown(value)


@as_html.register(CostEstimate)
def _estimate_table(estimate: CostEstimate) -> Markup:
    rows = []
    for label, field, shown in (
        ("output tokens", "completion_tokens", count),
        ("online", "cost", dollars),
        ("by batch", "batch_cost", dollars),
    ):
        values = (getattr(estimate, f"{field}_{bound}") for bound in ("low", "expected", "high"))
        rows.append((label, *(_known(value, shown) for value in values)))
    time = "no limit is configured" if estimate.minutes is None else duration(60 * estimate.minutes)
    asked, tokens = f"{count(estimate.requests)} requests to {estimate.model}", count(estimate.prompt_tokens)
    caption = f"{asked}: {tokens} tokens in; at the limits: {time}"
    return table(("", "at least", "likely", "at most"), rows, caption=caption)


@as_html.register(BatchJobStatus)
def _job_table(job: BatchJobStatus) -> Markup:
    rows = [
        ("job", name(job.job_id)),
        ("status", job.status),
        ("completed / failed / all", _counts(job.completed_count, job.failed_count, job.request_count)),
        ("created", clock(job.created_at.timestamp())),
        ("completed", _known(job.completed_at, lambda at: clock(at.timestamp()))),
    ]
    rows += [(f"error {error.code or ''}", error.message) for error in job.errors[:_ERRORS]]
    return table((), rows, texts=2)


@as_html.register(CostLedger)
def _cost_table(cost: CostLedger) -> Markup:
    head = ("model", "channel", "tier", "calls", "input", "cached", "output", "unpriced", "cost")
    rows = []
    for row in cost.rows:
        numbers = row.calls, row.input_tokens, row.cached_tokens, row.output_tokens, row.unpriced
        rows.append((name(row.model), row.channel, row.service_tier, *map(count, numbers), dollars(row.cost)))
    saved = f"; saved by the cache: {dollars(cost.saved_by_cache)}" if cost.saved_by_cache else ""
    lost = f"; unaccounted: {count(cost.unaccounted)} attempts" if cost.unaccounted else ""
    return table(head, rows, caption=f"{dollars(cost.total)}{saved}{lost}", texts=3)


@as_html.register(ModelResponse)
def _answer_table(answer: ModelResponse) -> Markup:
    text = answer.content or answer.refusal or ""
    shown = f"{text[:_LONG_ANSWER]}…" if len(text) > _LONG_ANSWER else text
    cached = " (cached)" if answer.cached else ""
    content = Markup(f'<pre style="white-space:pre-wrap;text-align:left">{escape(shown)}</pre>')
    rows = [
        ("content" if answer.content or not answer.refusal else "refusal", content),
        ("model", name(answer.model)),
        ("finish reason", answer.finish_reason),
        ("tokens in / out", _counts(answer.usage.prompt_tokens, answer.usage.completion_tokens)),
        ("cost", dollars(answer.usage.estimated_cost)),
        ("latency", f"{duration(answer.latency_ms / 1000)}{cached}"),
    ]
    return table((), rows, texts=2)
