"""The work of `run`: a file of prompts answered, online or by batch, and summed up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import openai
import typer

from openai_eval_client._cli import exits
from openai_eval_client._cli.exits import cost_text, say
from openai_eval_client._cli.rows import carried, fingerprint, line_of, read_in_thread
from openai_eval_client._format import count, duration
from openai_eval_client._wire import read_failure
from openai_eval_client.client import OpenAIClient
from openai_eval_client.models import ClientStats

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Iterator

    from openai_eval_client._cli.rows import Output, Row, Source
    from openai_eval_client.config import BatchConfig, OpenAIConfig, RateLimitConfig
    from openai_eval_client.models import ModelResponse

T = TypeVar("T")

_REASONS = 3  # kinds of error that are listed


@dataclass(slots=True)
class FileRun:
    """A file of prompts, and how it is to be answered."""

    source: Source
    config: OpenAIConfig
    limits: RateLimitConfig
    params: dict[str, Any]  # what the client is asked with every row
    output: str = "-"  # the file of the rows, or "-" for standard output
    resume: bool = False  # whether to go on with it
    retry_failed: bool = False  # whether to ask again for its rows that failed
    overwrite: bool = False  # whether to empty it first
    cache: Path | None = None
    by_batch: bool = False  # whether to use the Batch API
    batch: BatchConfig | None = None  # how to use it
    report: Path | None = None  # the page about the run
    progress: bool = False  # whether to show it
    quiet: bool = False  # whether to say errors only
    as_json: bool = False  # whether to sum up as JSON
    done: dict[int, bytes] = field(default_factory=dict)  # rows in the output: index and fingerprint
    total: int = 0  # rows to answer; not known for a stream

    def rows(self) -> Iterator[Row]:
        """Yield the rows that are to be answered."""
        for row in self.source.rows():
            known = self.done.get(row.index)
            if known is None:
                yield row
            elif known != fingerprint(carried(row.data)):
                why = f"not what the output has at index {row.index}: the input changed"
                self.source.reject_input(row.line, why)

    def each(self, take: Callable[[Row], T]) -> Iterable[T] | AsyncIterable[T]:
        """Return what `take` makes of each row, in the form that the client needs."""
        taken = map(take, self.rows())
        return read_in_thread(taken) if self.source.is_stream else _Sized(taken, self.total)


class _Sized:
    """An iterable whose length is known beforehand."""

    def __init__(self, items: Iterable[Any], length: int) -> None:
        self._items, self._length = items, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)


@dataclass(slots=True)
class Result:
    """What a run came to."""

    answered: int = 0  # rows with a response
    failed: int = 0  # rows with an error
    kinds: Counter[exits.ErrorKind] = field(default_factory=Counter)  # of those errors
    cached: int = 0  # answers from the cache
    seconds: float = 0.0  # wall time
    stats: ClientStats = field(default_factory=ClientStats)
    error: Exception | None = None  # what ended the run early
    interrupted: bool = False  # whether a signal did
    jobs: str | None = None  # batches that go on
    report_error: OSError | None = None  # why there is no report

    def count(self, outcome: ModelResponse | Exception) -> None:
        """Count the outcome of a row."""
        if isinstance(outcome, Exception):
            self.failed += 1
            self.kinds[exits.kind_of(outcome)] += 1
        else:
            self.answered += 1
            self.cached += outcome.cached

    def exit_code(self, failed_before: int) -> int:
        """Return the exit code, given the rows of the output that had failed before."""
        if self.interrupted:
            return exits.INTERRUPTED
        if self.error is not None:
            return exits.exit_code_of(self.error)
        if self.failed or failed_before:
            return exits.SOME_FAILED
        return exits.BAD_INPUT if self.report_error else 0


async def answer(run: FileRun, output: Output) -> Result:
    """Answer the rows, write their outcomes, and then the report, however the run ended."""
    result, began = Result(), time.monotonic()
    last_words = "" if run.output == "-" else f"to go on: {resume_command()}"
    answer_all = _answer_by_batch if run.by_batch else _answer_online
    client = OpenAIClient(run.config, rate_limit=run.limits, batch=run.batch, cache=run.cache)
    async with client:
        with exits.Interrupts(at_once=run.by_batch, last_words=last_words) as signals:
            try:
                await answer_all(run, client, output, result, signals.event)
            except asyncio.CancelledError:
                if not signals.event.is_set():
                    raise
            except (openai.OpenAIError, OSError) as error:  # what the rows without an outcome had in common
                result.error = error
            result.interrupted = signals.event.is_set()
        result.stats = client.stats
        if run.report is not None:
            try:
                client.report(run.report)
            except OSError as error:
                result.report_error = error
    result.seconds = time.monotonic() - began
    return result


async def _answer_online(
    run: FileRun, client: OpenAIClient, output: Output, result: Result, stop: asyncio.Event
) -> None:
    """Write each outcome as it comes."""
    taken: dict[int, Row] = {}
    positions = itertools.count()

    def take(row: Row) -> Any:
        taken[next(positions)] = row
        return row.prompt

    stream = client.as_completed(run.each(take), progress=run.progress, stop_event=stop, **run.params)
    async with contextlib.aclosing(stream) as outcomes:
        async for position, outcome in outcomes:
            row = taken.pop(position)
            if isinstance(outcome, Exception) and read_failure(outcome).ends_run(
                run.limits.max_wait, answered=bool(result.answered)
            ):
                continue  # raised in the end: it is not this row's fault
            line = _line_of(row, outcome)
            if output.is_regular:
                output.write(line)
            else:
                await asyncio.to_thread(output.write, line)  # a pipe may be full
            result.count(outcome)  # what is not written is not done


async def _answer_by_batch(
    run: FileRun, client: OpenAIClient, output: Output, result: Result, _: asyncio.Event
) -> None:
    """Write the outcomes in the end, in order; a signal cancels the task."""
    rows = [row async for row in read_in_thread(run.rows())]
    outcomes: list[Any] = []
    try:
        outcomes = await client.batch_generate(
            [row.prompt for row in rows],
            use_batch_api=True,
            return_exceptions=True,
            progress=run.progress,
            **run.params,
        )
    except (openai.OpenAIError, asyncio.CancelledError) as error:
        outcomes = getattr(error, "responses", [])
        result.jobs = getattr(error, "job_id", None)
        raise
    finally:
        for row, outcome in zip(rows, outcomes, strict=False):
            if outcome is not None:
                output.write(_line_of(row, outcome))
                result.count(outcome)


def _line_of(row: Row, outcome: ModelResponse | Exception) -> bytes:
    return line_of({**carried(row.data), "index": row.index}, outcome)


# --- the summary ------------------------------------------------------------------------------------------


def sum_up(run: FileRun, result: Result, code: int) -> None:
    """Say what a run came to, and how to go on."""
    reader_left = isinstance(result.error, BrokenPipeError)
    quiet = run.quiet or reader_left or (code == exits.BAD_INPUT and not result.answered + result.failed)
    if run.as_json:
        print_to = sys.stderr if run.output == "-" else sys.stdout
        typer.echo(json.dumps(_summary(run, result, code)), file=print_to)
    elif not quiet:
        say(_counts(run, result))
        for kind, times in result.kinds.most_common(_REASONS):
            say(f"  {count(times)} x {exits.explain(kind)}")
    if result.report_error is not None:
        say(f"no report: {run.report}: {result.report_error.strerror}", style="red")
    elif run.report is not None and not quiet:
        say(f"report: {run.report}")
    if isinstance(result.error, openai.OpenAIError):
        say(exits.message_of(result.error), style="red")
    hint = _hint(run, result, code)
    if hint and not quiet:
        say(hint)
    if isinstance(result.error, OSError):
        raise result.error


def _summary(run: FileRun, result: Result, code: int) -> dict[str, Any]:
    stats = ("unpriced", "prompt_tokens", "completion_tokens", "rate_limited", "retries")
    return {
        "exit_code": code,
        "input": run.source.name,
        "output": run.output,
        "model": run.config.default_model,
        "answered": result.answered,
        "failed": result.failed,
        "skipped": len(run.done),
        "cached": result.cached,
        "cost": float(result.stats.cost),
        **{name: getattr(result.stats, name) for name in stats},
        "seconds": round(result.seconds, 3),
        "interrupted": result.interrupted,
        "error": None if result.error is None else str(result.error),
    }


def _counts(run: FileRun, result: Result) -> str:
    stats = result.stats
    total = "" if run.source.is_stream else f" of {count(run.total)}"
    parts = [f"{count(result.answered)}{total} answered"]
    parts += [f"{count(result.failed)} failed"] if result.failed else []
    parts += [f"{count(len(run.done))} there before"] if run.done else []
    parts += [f"{count(result.cached)} from the cache"] if result.cached else []
    parts.append(cost_text(stats.cost, stats.unpriced))
    parts += [f"{count(stats.rate_limited)} x 429"] if stats.rate_limited else []
    return ", ".join([*parts, duration(result.seconds)])


def _hint(run: FileRun, result: Result, code: int) -> str:
    """Return how to go on, if anything is left to do."""
    if result.jobs:
        results = f"their results: openai-eval-client batch results {result.jobs}"
        waiting = f"to wait for them: {resume_command()}"
        return f"the batches go on; {results if run.cache is None else waiting}"
    if code == exits.SOME_FAILED and run.output != "-":
        return f"to ask again for what failed: {resume_command()} --retry-failed"
    if code == 0 or (code == exits.BAD_INPUT and not result.answered):
        return ""
    check = exits.what_to_check(result.error, answered=bool(result.answered))
    if check:
        resumable = run.output != "-" and (result.answered or run.done)
        return f"{check}; then: {resume_command()}" if resumable else check
    if run.output != "-":
        return f"to go on: {resume_command()}"
    return "" if run.cache is None else "what was answered is in the cache: the same command goes on"


def resume_command() -> str:
    """Return the command line that goes on with this one's output."""
    program = Path(sys.argv[0]).name
    start = "python -m openai_eval_client" if program == "__main__.py" else program
    kept = [argument for argument in sys.argv[1:] if argument not in {"--overwrite", "--resume"}]
    return f"{start} {shlex.join([*kept, '--resume'])}"
