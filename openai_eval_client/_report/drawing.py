"""What reports and notebooks show: escaped text and tables as HTML, charts as SVG."""

from __future__ import annotations

import html
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from openai_eval_client._format import as_html, clock, count, dollars, duration, percent, short
from openai_eval_client._stats import Histogram
from openai_eval_client.models import BatchJobStatus, ClientStats, CostEstimate, CostLedger, ModelResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from openai_eval_client._limits import ModelLimits
    from openai_eval_client._stats import History, ReportData

# --- text and tables ------------------------------------------------------------------------------------

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


_WHOLE = {"stop", "tool_calls", "function_call"}  # reasons for which whole answers end
_CUT_OFF = {
    "length": "cut off: longer than max_tokens or the model allows",
    "content_filter": "cut off by a content filter",
}


def remarks(stats: ClientStats) -> list[str]:
    """Say what is odd about the answers: cut off, no fit, to less than was asked for, without a price."""
    ends = sorted(stats.finish_reasons.items(), key=lambda pair: -pair[1])
    found = [(n, _CUT_OFF.get(why, f"ended with {why!r}")) for why, n in ends if why not in _WHOLE]
    found.append((stats.schema_misses, "without what the schema asks for"))
    for parameter, n in stats.unsent_parameters.items():
        found.append((n, f"to requests without {parameter}, which the model refuses"))
    models = ", ".join(dict.fromkeys(repr(row.model) for row in stats.cost.rows if row.unpriced))
    found.append((stats.unpriced, f"unpriced: no price is known of {models or 'their models'}"))
    return [f"{count(n)} answer{'' if n == 1 else 's'} {what}" for n, what in found if n]


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
    rows += [("note", remark) for remark in remarks(stats)]
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
        ("created", _known(job.created_at, lambda at: clock(at.timestamp()))),
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


# --- charts ---------------------------------------------------------------------------------------------

_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 430.0, 22.0, 176.0  # the ends of the axes
_LABEL = 66.0  # the width of a label beside a mark
_TICKS, _TIME_TICKS = 4, 6  # of an axis of amounts, and of time at most
_ROUND_TIMES = (
    *(digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)),
    *(10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200),
    *(86_400 * days for days in (1, 2, 5, 10, 30)),
)
_FAR = 8.0  # times the highest column: a limit beyond is named, not drawn
_PEAK, _CUT = 2.0, 1.3  # times the other columns: one above the first is cut off at the second
_MANY = 10  # columns from which a peak may be cut off
_LABELLED = 3  # breaks whose length is written under them
_COLUMNS, _BARS = 80, 36  # of a chart over time, and of a histogram, at most
_DRAWN = 6  # models that have charts of their own
_MINUTE = 60.0
_CAUSES = {
    "server": "at the server",
    "requests": "waiting for requests per minute",
    "tokens": "waiting for tokens per minute",
    "concurrency": "waiting for a place in flight",
    "pause": "waiting out the server's pauses",
    "retries": "waiting before retries",
}


class _Chart:
    """Columns between an axis of amounts and an axis of time; what is added later is drawn above them."""

    def __init__(self, reach: float, unit: str, scale: Callable[[float], float], ticks: list[float]) -> None:
        self.top = top = 1.08 * reach
        self._scale = scale  # where a time stands on its axis, from 0 to 1
        self.parts: list[str] = []
        self.text(2, _TOP - 10, unit, "start")
        least = top / _TICKS * (1 - 1e-9)
        power = 10.0 ** math.floor(math.log10(least))
        step = next(power * nice for nice in (1.0, 2.0, 2.5, 5.0, 10.0) if power * nice >= least)
        for value in (number * step for number in range(_TICKS + 1) if number * step <= top):
            self.path("grid" if value else "axis", f"{_LEFT} {self.y(value):.1f}H{_RIGHT}")
            self.text(_LEFT - 5, self.y(value) + 4, short(value), "end")
        for seconds in ticks:
            self.path("axis", f"{self.x(seconds):.1f} {_BOTTOM}v4")
            self.text(self.x(seconds), _BOTTOM + 18, duration(seconds))

    def x(self, seconds: float) -> float:
        """Return where a time stands; what is beyond the axis stands at its end."""
        return _LEFT + (_RIGHT - _LEFT) * min(max(self._scale(seconds), 0.0), 1.0)

    def y(self, amount: float) -> float:
        """Return where an amount stands, likewise."""
        return _BOTTOM - (_BOTTOM - _TOP) * min(max(amount / self.top, 0.0), 1.0)

    def path(self, style: str, steps: str, tooltip: str = "") -> None:
        """Draw a line."""
        about = f"<title>{escape(tooltip)}</title>" if tooltip else ""
        self.parts.append(f'<path class="{style}" d="M{steps}">{about}</path>')

    def text(self, x: float, y: float, words: str, anchor: str = "", style: str = "") -> None:
        """Write a text; without an anchor it is centred, or ends at the right edge."""
        anchor = anchor or ("end" if x > _RIGHT - 3 * len(words) else "middle")
        kind = f' class="{style}"' if style else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f"<text{kind} {place}>{escape(words)}</text>")

    def label(self, x: float, y: float, words: str) -> None:
        """Write a text beside a mark, on the side where there is room."""
        anchor, shift = ("end", -5) if x > _RIGHT - _LABEL else ("start", 5)
        self.text(x + shift, y, words, anchor, "label")

    def column(self, style: str, times: tuple[float, float], below: float, amount: float, about: str) -> None:
        """Draw a column between two times, on what is below it."""
        left, upper = self.x(times[0]), self.y(below + amount)
        width = max(self.x(times[1]) - left - 0.6, 0.4)  # a gap to the next
        self.parts.append(_rect(style, about, x=left, y=upper, width=width, height=self.y(below) - upper))


def _rect(style: str, tooltip: str, **place: float) -> str:
    attributes = " ".join(f'{key}="{value:.3f}"' for key, value in place.items())
    return f'<rect class="{style}" {attributes}><title>{escape(tooltip)}</title></rect>'


class Layer(NamedTuple):
    """Columns of one colour, which stand on those of the layer before, or a line over them."""

    label: str  # what they count
    style: str  # their class in the style sheet
    values: Sequence[float] = ()  # one for each column
    is_line: bool = False


class TimeAxis:
    """The axis of time of all charts of a run: columns of a second at least, and not too many."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.seconds = max(history.seconds, 1.0)
        self._group = math.ceil(max(1.0, self.seconds / _COLUMNS) / history.width)  # intervals to a column
        self.step = self._group * history.width
        self._columns = math.ceil(self.seconds / self.step)
        minutes = self.seconds >= _MINUTE
        self.unit, self.symbol, self.scale = ("minute", "min", _MINUTE) if minutes else ("second", "s", 1.0)
        fitting = (step for step in _ROUND_TIMES if self.seconds / step <= _TIME_TICKS)
        step = next(fitting, self.seconds / _TIME_TICKS)
        self._ticks = [number * step for number in range(int(self.seconds / step) + 1)]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return what happened in each column."""
        return [sum(values[n * self._group : (n + 1) * self._group]) for n in range(self._columns)]

    def rates(self, values: Sequence[float]) -> list[float]:
        """Return the same per unit of time; the last column counts as half a column at least."""
        lengths = (self.seconds - n * self.step for n in range(self._columns))
        units = (min(max(length, self.step / 2), self.step) / self.scale for length in lengths)
        return [total / unit for total, unit in zip(self.sums(values), units, strict=True)]

    def means(self, values: Sequence[float]) -> list[float]:
        """Return the mean of what had a value in each interval, over each column."""
        width, end = self.history.width, self.history.seconds
        lengths = [min(width, max(end - n * width, 0.0)) for n in range(len(values))]
        areas = self.sums([value * length for value, length in zip(values, lengths, strict=True)])
        return [area / max(length, 1e-9) for area, length in zip(areas, self.sums(lengths), strict=True)]

    def draw(
        self, title: str, unit: str, *layers: Layer, limits: Sequence[tuple[str, float]] = (), model: str = ""
    ) -> Markup:
        """Return a figure of columns and lines, with limits marked by label."""
        columns = [layer for layer in layers if not layer.is_line]
        sums = [sum(values) for values in zip(*(layer.values for layer in columns), strict=True)]
        highest = max(sums + [value for layer in layers for value in layer.values])
        near = {label: value for label, value in limits if value <= _FAR * highest}
        reach = _reach(sums, max([highest, *near.values()]), near.values())
        chart = _Chart(reach, unit, lambda seconds: seconds / self.seconds, self._ticks)
        self._stack(chart, columns, unit)
        for layer in layers:
            if layer.is_line:
                steps = ((n + end, value) for n, value in enumerate(layer.values) for end in (0, 1))
                points = (f"{chart.x(n * self.step):.2f} {chart.y(value):.2f}" for n, value in steps)
                chart.path(f"line {layer.style}", "L".join(points))
        _mark_limits(chart, near)
        self._mark_breaks(chart)
        if far := ", ".join(sorted(label for label, _ in limits if label not in near)):
            chart.text(_RIGHT, _TOP - 10, f"far below {far}")
        mean, top = map(short, (sum(sums) / len(sums), max(sums)))
        about = f"{duration(self.seconds)}; {mean} {unit} on average, {top} at most."
        about += "".join(f" {label}." for label, _ in limits)
        return _figure(title, about, chart.parts, *layers, model=model)

    def _stack(self, chart: _Chart, layers: Sequence[Layer], unit: str) -> None:
        """Draw the layers, and mark the columns higher than the chart; the highest says how high."""
        below = [0.0] * self._columns
        for layer in layers:
            for number, value in enumerate(layer.values):
                if value:
                    begin = number * self.step
                    about = f"{duration(begin)}: {short(value)} {unit} {layer.label}"
                    chart.column(layer.style, (begin, begin + self.step), below[number], value, about)
                    below[number] += value
        for number, total in enumerate(below):
            if total > chart.top:
                x = chart.x((number + 0.5) * self.step)
                chart.path("cut", f"{x - 4:.1f} {_TOP + 1}l4 -6l4 6z")
                if below.index(max(below)) == number:
                    chart.label(x + 2, _TOP, f"up to {short(total)}")

    def _mark_breaks(self, chart: _Chart) -> None:
        """Mark where time is left out; where that is often, only the tooltip says how much."""
        for number, idle in self.history.breaks.items():
            x = chart.x((number + 0.5) * self.history.width)
            tooltip = f"{duration(idle)} in which nothing happened are left out here"
            chart.path("break", f"{x:.1f} {_TOP}V{_BOTTOM}", tooltip)
            if len(self.history.breaks) <= _LABELLED:
                chart.text(x, _BOTTOM + 34, f"{duration(idle)} idle")


def _reach(sums: Sequence[float], highest: float, limits: Iterable[float]) -> float:
    """Return how high a chart reaches: above all but a peak, as a full bucket at the start makes one."""
    usual = max([sorted(sums)[int(0.9 * (len(sums) - 1))], *limits])
    is_peak = len(sums) >= _MANY and highest > _PEAK * usual > 0
    return _CUT * usual if is_peak else max(highest, 1e-9)


def _mark_limits(chart: _Chart, limits: Mapping[str, float]) -> None:
    """Mark each limit; its label stands above the highest, and below the others where there is room."""
    for number, (label, value) in enumerate(sorted(limits.items(), key=lambda pair: -pair[1])):
        y = chart.y(value)
        chart.path("limit", f"{_LEFT} {y:.1f}H{_RIGHT}")
        chart.text(_RIGHT - 2, y + 11 if number and y + 22 < _BOTTOM else y - 4, label, "end", "label")


def histogram(classes: Mapping[int, int], marks: Mapping[str, float]) -> Markup:
    """Return how often requests took how long, by class of a `Histogram`, on a logarithmic axis of time."""
    first, last = min(classes), max(classes)
    wide = -(-(last - first + 1) // _BARS)  # classes in a bar
    bars: Counter[int] = Counter()
    for number, times in classes.items():
        bars[(number - first) // wide] += times
    margin = max(2, (12 - max(bars)) // 2)  # bars beside them: few do not fill the chart

    def edge(bar: int) -> float:
        return Histogram.value_of(first + bar * wide - 0.5)

    low, high = edge(-margin), edge(max(bars) + 1 + margin)
    width = math.log(high / low)
    ticks = [seconds for seconds in _ROUND_TIMES if low <= seconds <= high] or [math.sqrt(low * high)]
    ticks = ticks[:: 1 + (len(ticks) - 1) // (_TIME_TICKS + 1)]
    chart = _Chart(max(bars.values()), "requests", lambda seconds: math.log(seconds / low) / width, ticks)
    for bar, times in sorted(bars.items()):
        tooltip = f"{duration(edge(bar))} to {duration(edge(bar + 1))}: {times:,}"
        chart.column("time", (edge(bar), edge(bar + 1)), 0.0, times, tooltip)
    labels = [f"{label} {duration(seconds)}" for label, seconds in marks.items()]
    for level, (label, seconds) in enumerate(zip(labels, marks.values(), strict=True)):
        x, y = chart.x(seconds), _TOP - 10 + 13.2 * level
        chart.path("mark", f"{x:.1f} {_BOTTOM}V{y - 8:.1f}")
        chart.label(x, y, label)
    about = f"{sum(classes.values()):,} requests; {', '.join(labels)}."
    layer = Layer("attempts that were answered; the axis of time is logarithmic", "time")
    return _figure("How long answers took", about, chart.parts, layer)


def chart_sections(stats: ClientStats, data: ReportData, limits: Sequence[ModelLimits]) -> Iterator[str]:
    """Return the sections of a report that are charts."""
    if data.history.models:
        axis = TimeAxis(data.history)
        yield _against_limits(axis, limits)
        yield _figures("In flight, and refused", _in_flight(axis, limits))
    percentiles = {"p50": stats.latency_p50, "p95": stats.latency_p95, "p99": stats.latency_p99}
    marks = {label: value for label, value in percentiles.items() if value is not None}
    latency = [histogram(data.latency, marks)] if data.latency else []
    note = (
        "Time is summed over all requests: ten that wait for a second are ten seconds. "
        "Prompts that were not taken up yet do not count."
    )
    yield _figures("Where time went", [*_where_time_went(stats), *latency], note)


def _figures(heading: str, drawn: Iterable[str], note: str = "") -> str:
    content = "".join(drawn)
    return section(heading, f'<div class="figures">{content}</div>', note=note) if content else ""


def _figure(
    title: str,
    about: str,
    parts: Iterable[str],
    *layers: Layer,
    model: str = "",
    attributes: str = 'viewBox="0 0 440 214"',
    below: str = "",
) -> Markup:
    """Return an image that says what it shows, under its heading, with the keys of its colours."""
    heading = f"{name(model)}: {escape(title)}" if model else escape(title)
    keys = (f'<span class="key">{_swatch(layer.style, layer.label)}</span>' for layer in layers)
    caption = f"<figcaption>{''.join(keys)}</figcaption>" if layers else ""
    return Markup(
        f'<figure class="card"><h3>{heading}</h3>'
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {attributes}>'
        f"<title>{escape(f'{title}, {model}' if model else title)}</title><desc>{escape(about)}</desc>"
        f"{''.join(parts)}</svg>{below}{caption}</figure>"
    )


def _swatch(style: str, label: str) -> Markup:
    return Markup(f'<span class="swatch {style}"></span>{escape(label)}')


def _against_limits(axis: TimeAxis, limits: Sequence[ModelLimits]) -> str:
    """Return the charts of the models that reserved most, against their limits."""
    models, drawn = axis.history.models, []
    known = [limited for limited in limits if limited.model in models]
    largest = sorted(known, key=lambda each: (-sum(models[each.model].reserved), each.model))[:_DRAWN]
    for limited in largest:
        timeline = models[limited.model]
        sent = [Layer("sent", "admitted", axis.rates(timeline.admitted))]
        reserved = Layer("reserved when sent", "reserved", axis.rates(timeline.reserved))
        used = Layer("used by answers", "used", axis.rates(timeline.used), is_line=True)
        cases = ("requests", sent, limited.requests), ("tokens", [reserved, used], limited.tokens)
        for what, layers, limit in cases:
            server = None if limit.server == limit.configured else limit.server
            pairs = (("limit", limit.configured), ("server's limit", server))
            marks = [(f"{label} {short(n)}/min", n * axis.scale / _MINUTE) for label, n in pairs if n]
            title, unit = f"{what} per {axis.unit}", f"{what}/{axis.symbol}"
            drawn.append(axis.draw(title, unit, *layers, limits=marks, model=limited.model))
    left = len(models) - len(largest)
    more = f" The table of models has {count(left)} more." if left else ""
    wide = duration(axis.step)
    note = f"Each column is {wide}. At first, a full bucket lets more through than the limit.{more}"
    return _figures("Requests and tokens against their limits", drawn, note)


def _in_flight(axis: TimeAxis, limits: Sequence[ModelLimits]) -> Iterator[Markup]:
    """Return how many requests were in flight, and which attempts brought no answer."""
    means, bounds = axis.means(axis.history.in_flight), [each.max_concurrent for each in limits]
    is_marked = len(bounds) == 1 and max(means) <= bounds[0] < math.inf
    marks = [(f"max_concurrent {bounds[0]:g}", bounds[0])] if is_marked else []
    layer = Layer("in flight", "flight", means)
    yield axis.draw("Requests in flight, on average", "requests", layer, limits=marks)
    layers = []
    for label, counts in (("status 429", "rate_limited"), ("other failures", "failed")):
        models = (axis.sums(getattr(model, counts)) for model in axis.history.models.values())
        layers.append(Layer(label, counts, [sum(values) for values in zip(*models, strict=True)]))
    if any(any(layer.values) for layer in layers):
        step = duration(axis.step)
        yield axis.draw(f"Attempts without an answer, each {step}", f"in {step}", *layers)


def _where_time_went(stats: ClientStats) -> Iterator[Markup]:
    known = {"server": stats.server_seconds, "retries": stats.retry_seconds, **stats.wait_seconds_by}
    spent = {cause: known[cause] for cause in _CAUSES if known.get(cause, 0.0) > 0}
    rows, parts, about, at = [], [], [], 0.0
    for cause, seconds in spent.items():
        label, share = _CAUSES[cause], seconds / sum(spent.values())
        rows.append((_swatch(cause, label), duration(seconds), percent(share)))
        about.append(f"{label} {percent(share)}")
        parts.append(_rect(cause, about[-1], x=100 * at, y=0, width=100 * share, height=8))
        at += share
    if spent:
        attributes = 'class="bar" viewBox="0 0 100 8" preserveAspectRatio="none"'
        shares, title = table(("", "time", "share"), rows), "Time of all requests together"
        yield _figure(title, "; ".join(about), parts, attributes=attributes, below=shares)
