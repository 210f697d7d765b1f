"""HTML: escaped text, tables, the page of a report, and what a notebook shows."""

from __future__ import annotations

import html
import os
import time
from pathlib import Path  # typer reads the annotations
from typing import TYPE_CHECKING, Any

from openai_eval_client._format import as_html, clock, count, dollars, duration, percent
from openai_eval_client._runtime import replacing
from openai_eval_client.models import BatchJobStatus, ClientStats, CostEstimate, CostLedger, ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser itself sees to it


def _style() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def html_page(title: str, about: str, summary: object, sections: Iterable[str]) -> Markup:
    """Return a page."""
    made = clock(time.time())
    return Markup(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main>\n"
        f'<header><h1>{escape(title)}</h1><p class="meta">{escape(about)}; written {made}</p>'
        f'<p class="summary">{escape(summary)}</p></header>\n{"".join(sections)}</main></body></html>\n',
    )


def section(heading: str, content: str, *, note: str = "") -> Markup:
    """Return a part of a page under its heading; `note` says how to read it."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return Markup(f"<section><h2>{escape(heading)}</h2>{said}{content}</section>\n")


def tiles(figures: Mapping[str, object]) -> Markup:
    """Return the figures that matter most, side by side."""
    each = (
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in figures.items()
    )
    return Markup(f'<dl class="tiles">{"".join(each)}</dl>\n')


def card(content: object, *, kind: str = "") -> Markup:
    """Return something in a frame, which scrolls where it is too wide."""
    return Markup(f'<div class="card {kind}"><div class="scroll">{escape(content)}</div></div>')


def figure(heading: object, drawn: str, keys: Mapping[str, str], *, kind: str = "") -> Markup:
    """Return a picture under its heading, with its keys: the class of each colour and what it stands for."""
    swatches = "".join(
        f'<span class="key"><span class="swatch {style}"></span>{escape(label)}</span>'
        for style, label in keys.items()
    )
    caption = f"<figcaption>{swatches}</figcaption>" if keys else ""
    return Markup(f'<figure class="card {kind}"><h3>{escape(heading)}</h3>{drawn}{caption}</figure>')


def figures(drawn: Iterable[str]) -> Markup:
    """Return pictures side by side, where there is room."""
    return Markup(f'<div class="figures">{"".join(drawn)}</div>')


def part(share: float, said: object) -> Markup:
    """Return a value with a bar beside it that shows its share (0 to 1) of the largest."""
    bar = f'<span class="part" style="width:{100 * min(share, 1.0):.1f}%"></span>' if share > 0 else ""
    return Markup(f'<span class="track">{bar}</span><span class="amount">{escape(said)}</span>')


def write_page(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page, in place of what was there, as `replacing` does."""
    try:
        with replacing(os.fspath(path)) as file:
            file.write(text.encode())
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None  # the name that the caller knows
        raise
    return Path(path)


_LONGEST = 2000  # characters of an answer that are shown
_MOST = 20  # rows of errors


@as_html.register(ClientStats)
def stats_table(of: ClientStats) -> Markup:
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


@as_html.register(CostEstimate)
def estimate_table(of: CostEstimate) -> Markup:
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


@as_html.register(BatchJobStatus)
def job_table(of: BatchJobStatus) -> Markup:
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


@as_html.register(CostLedger)
def bill_table(of: CostLedger) -> Markup:
    """Return a bill, row by row."""
    head = ("model", "channel", "tier", "calls", "input", "cached", "output", "unpriced", "cost")
    rows = [
        (
            name(row.model),
            row.channel,
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


@as_html.register(ModelResponse)
def answer_table(of: ModelResponse) -> Markup:
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


_LONG = 48  # characters of a name that are shown


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
    """Return a name as HTML; of a long one the middle is left out, and the whole is its title."""
    whole = str(text)
    if len(whole) <= _LONG:
        return escape(whole)
    half = _LONG // 2
    return Markup(f'<span title="{escape(whole)}">{escape(f"{whole[:half]}…{whole[-half + 1 :]}")}</span>')


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    caption: object = "",
    texts: int = 1,
) -> Markup:
    """Return a table."""
    parts = ["<table>"]
    if caption:
        parts.append(f"<caption>{escape(caption)}</caption>")
    if head:
        parts.append(f"<thead><tr>{_cells(head, 'th', texts, 'col')}</tr></thead>")
    body = "".join(f"<tr>{_row(row, texts)}</tr>" for row in rows)
    return Markup("".join([*parts, f"<tbody>{body}</tbody></table>"]))


def _row(row: Sequence[object], texts: int) -> str:
    return _cells(row[:1], "th", texts, "row") + _cells(row[1:], "td", texts - 1, "")


def _cells(cells: Sequence[object], tag: str, texts: int, scope: str) -> str:
    scoped = f' scope="{scope}"' if scope else ""
    return "".join(
        f'<{tag}{scoped} style="text-align:{"left" if number < texts else "right"}">{escape(cell)}</{tag}>'
        for number, cell in enumerate(cells)
    )
