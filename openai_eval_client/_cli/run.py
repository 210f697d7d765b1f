"""The commands `run` and `estimate`: a file of prompts answered, online or by batch, and summed up."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import openai
from typer import Option

from openai_eval_client._cli import common
from openai_eval_client._cli.common import cost_text, exit_codes, say, show_log, with_client
from openai_eval_client._cli.rows import Output, Source, carried, fingerprint, line_of, read_in_thread
from openai_eval_client._format import count, duration, to_json
from openai_eval_client._report import remarks
from openai_eval_client._wire import read_failure
from openai_eval_client.config import BatchConfig, OpenAIConfig
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import ClientStats

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable, Iterator

    from openai_eval_client._cli.rows import Row
    from openai_eval_client.client import OpenAIClient
    from openai_eval_client.config import RateLimitConfig
    from openai_eval_client.models import ModelResponse

T = TypeVar("T")

_TIMEOUT, _RETRIES = (OpenAIConfig.model_fields[name].default for name in ("timeout", "max_retries"))


def run(  # one name for each option
    source: common.Input,
    *,
    output: common.OutputFile = "-",
    resume: Annotated[bool, Option("--resume", help="Continue an output: ask for rows it lacks.")] = False,
    retry_failed: Annotated[
        bool, Option("--retry-failed", help="With --resume: ask again for rows that failed.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Begin anew; the old output is lost.")] = False,
    model: common.Model = None,
    system: common.System = None,
    schema: common.Schema = None,
    temperature: common.Temperature = None,
    max_tokens: common.MaxTokens = None,
    param: common.Params = None,
    api: common.ApiOption = "chat",
    prompt_column: common.PromptColumn = None,
    form: common.FormOption = None,
    limit: common.Limit = None,
    rpm: common.Rpm = common.DEFAULT_RPM,
    tpm: common.Tpm = common.DEFAULT_TPM,
    max_concurrent: common.MaxConcurrent = common.DEFAULT_CONCURRENT,
    max_cost: Annotated[
        float | None,
        Option(min=0, metavar="USD", help="The most it may cost; needs --max-tokens. (default: any amount)"),
    ] = None,
    max_failures: Annotated[
        str | None,
        Option(
            metavar="N|SHARE",
            help="End the run when more rows failed: a number, or a share below 1.0 of those done. "
            "(default: any number)",
        ),
    ] = None,
    cache: common.Cache = None,
    report: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="When the run ends, however it ends, write a page about it: what held it up, what it cost, "
            "what failed. (default: none)",
        ),
    ] = None,
    batch: Annotated[bool, Option("--batch", help="Use the Batch API: half the price, in a day.")] = False,
    window: common.Window = common.DEFAULT_WINDOW,
    on_unclear: common.OnUnclear = "raise",
    interval: common.Interval = common.DEFAULT_INTERVAL,
    timeout: Annotated[
        float | None, Option(metavar="SECONDS", help=f"Time limit of an attempt. (default: {_TIMEOUT:g})")
    ] = None,
    max_retries: Annotated[
        int | None, Option(min=0, metavar="N", help=f"Attempts after the first. (default: {_RETRIES})")
    ] = None,
    base_url: common.BaseUrl = None,
    key_file: common.KeyFile = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what it would cost, and send nothing.")] = False,
    progress: Annotated[bool, Option(help="Show progress on standard error.")] = True,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Show waits and retries as well.")] = False,
    as_json: Annotated[
        bool,
        Option("--json", help="Print the summary as JSON; to standard error if rows go to standard output."),
    ] = False,
) -> None:
    """Answer a file of prompts, one output row for each.

    An output row is the input row with its index (from 0), and the response or
    the error. Rows are written as they come, each whole, so the output is JSON
    lines at any time. Options that take no value are off unless given, but for
    --progress.

    Exit codes: 0 all answered; 1 some failed; 2 bad input or usage; 3 budget
    reached; 4 no server there, or it refuses every row (key, model, quota);
    130 interrupted. After Ctrl-C, requests in flight have 5 seconds to finish.
    """
    show_log(verbose=verbose)
    settings: Any = {"default_model": model, "timeout": timeout, "max_retries": max_retries}
    named = {"temperature": temperature, "max_tokens": max_tokens, "system": system, "max_cost": max_cost}
    with exit_codes():
        named["max_failures"] = common.number_of("max_failures", max_failures)
        work = FileRun(
            Source(source, column=prompt_column, form=form, limit=limit),
            common.api_config(base_url=base_url, key_file=key_file, needs_key=not dry_run, **settings),
            common.rate_limit(rpm, tpm, max_concurrent),
            common.request_params(param or [], schema, api, **named),
            output=output,
            resume=resume,
            retry_failed=retry_failed,
            overwrite=overwrite,
            cache=cache and cache.expanduser(),
            by_batch=batch,
            on_unclear=on_unclear,
            batch=BatchConfig(auto_batch_threshold=1, completion_window=window, polling_interval=interval),
            report=report and report.expanduser(),
            quiet=quiet or (as_json and output == "-"),  # the summary is then alone on standard error
            as_json=as_json,
        )
        work.progress = progress and not work.quiet and not (output == "-" and sys.stdout.isatty())
        _check_usage(work)
        if model is None:
            work.note(f"model: {work.config.default_model}, the default; --model names another")
        code = _show_estimate(work) if dry_run else _carry_out(work)
    sys.exit(code)


def estimate(
    source: common.Input,
    *,
    model: common.Model = None,
    system: common.System = None,
    schema: common.Schema = None,
    max_tokens: common.MaxTokens = None,
    param: common.Params = None,
    api: common.ApiOption = "chat",
    prompt_column: common.PromptColumn = None,
    form: common.FormOption = None,
    limit: common.Limit = None,
    rpm: common.Rpm = common.DEFAULT_RPM,
    tpm: common.Tpm = common.DEFAULT_TPM,
    as_json: common.AsJson = False,
) -> None:
    """Estimate what a file of prompts needs: tokens, dollars, minutes. Nothing is sent; no key is needed."""
    show_log()
    with exit_codes():
        work = FileRun(
            Source(source, column=prompt_column, form=form, limit=limit),
            common.api_config(needs_key=False, default_model=model),
            common.rate_limit(rpm, tpm),
            common.request_params(param or [], schema, api, max_tokens=max_tokens, system=system),
            as_json=as_json,
        )
        _show_estimate(work)


# --- what is to be done -----------------------------------------------------------------------------------


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
    on_unclear: str = "raise"  # what to do about a batch that may have been created
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

    def feed(self, prompts: Iterable[T]) -> Iterable[T] | AsyncIterable[T]:
        """Return the rows' prompts in the form that the client needs."""
        return read_in_thread(prompts) if self.source.is_stream else _Sized(prompts, self.total)

    def note(self, message: str, *, style: str | None = None) -> None:
        """Say it, unless only errors are to be said."""
        if not self.quiet:
            say(message, style=style)


class _Sized:
    """An iterable whose length is known beforehand."""

    def __init__(self, items: Iterable[Any], length: int) -> None:
        self._items, self._length = items, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)


def _check_usage(run: FileRun) -> None:
    if run.resume and run.overwrite:
        raise ValidationError("--resume goes on, --overwrite begins anew: give one of them", field="resume")
    if run.retry_failed and not run.resume:
        raise ValidationError("--retry-failed needs --resume", field="retry_failed")
    if run.resume and run.output == "-":
        raise ValidationError("--resume needs --output: standard output cannot be read back", field="resume")
    source = None if run.source.is_stream else run.source.path
    output = None if run.output == "-" else Path(run.output).expanduser()
    _check_apart("output", output, input=source, cache=run.cache)
    if run.report is not None:
        _check_apart("report", run.report, input=source, output=output, cache=run.cache)
        _check_can_write(run.report)


def _check_apart(option: str, path: Path | None, **others: Path | None) -> None:
    """Reject a file that another option names as well."""
    for use, other in others.items():
        if path is None or other is None:
            continue
        both_exist = path.exists() and other.exists()
        if path.samefile(other) if both_exist else path.resolve() == other.resolve():
            raise ValidationError(f"--{option} {path}: is the {use} as well", field=option)


def _check_can_write(path: Path) -> None:
    """Find out before anything is paid, and without touching a page that is there."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.is_file() or not path.exists():  # not a device
            tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        error.filename = f"--report {path}"
        raise


def _look_at_output(run: FileRun, file: Output, *, only_look: bool = False) -> None:
    """Take from the output what is done already, or empty it."""
    if run.resume and not file.is_regular:
        raise ValidationError(f"--resume: {run.output} is no file that can be read back", field="resume")
    if run.resume:
        run.done = file.done(without_errors=run.retry_failed, only_look=only_look)
    elif run.overwrite and file.is_regular:
        file.clear()
    elif not file.is_empty:
        why = "is not empty: --resume goes on with it, --overwrite begins anew"
        raise ValidationError(f"{run.output}: {why}", field="output")
    version = re.compile(rf"{re.escape(run.config.default_model)}(-\d.*)?")  # the model, or a dated version
    if file.models and not any(version.fullmatch(name) for name in file.models):
        there = f"the answers there ({count(file.models.total())}) are of {', '.join(sorted(file.models))}"
        run.note(f"{there}; this run asks {run.config.default_model}", style="yellow")


# Keys of a row that look as if they were to be sent, though a run sends the same with every row.
_SAMPLING = {"max_completion_tokens", "max_tokens", "seed", "temperature", "top_p"}
_LIKE_PARAMETERS = _SAMPLING | {"model", "response_format", "system"}


def _look_at_input(run: FileRun) -> None:
    """Look at all rows, if they can be read twice, before anything is paid."""
    if run.source.is_stream:
        return
    unsent: set[str] = set()
    for row in run.rows():
        run.total += 1
        unsent |= _LIKE_PARAMETERS & row.data.keys()
    run.progress = run.progress and run.total > 0
    if not run.total and not run.done:
        raise ValidationError(f"{run.source.name}: no rows", field="input")
    if unsent:
        names = ", ".join(sorted(unsent))
        run.note(f"copied to the output, not sent: {names}; options set them for all rows", style="yellow")


# --- the commands' work -----------------------------------------------------------------------------------


def _show_estimate(run: FileRun) -> int:
    """Show what the rows that are not done would cost, and leave the output as it is."""
    if run.resume:
        with contextlib.closing(Output(run.output)) as file:
            _look_at_output(run, file, only_look=True)
        run.note(f"there already, and not estimated: {count(len(run.done))}")
    if run.cache is not None:
        run.note("the cache is not looked at: answers that it has are estimated as well, but cost nothing")
    _look_at_input(run)
    prompts = run.feed(row.prompt for row in run.rows())
    params = {name: value for name, value in run.params.items() if name not in {"max_cost", "max_failures"}}
    limits = run.limits
    estimated = with_client(run.config, lambda client: client.estimate(prompts, **params), rate_limit=limits)
    if run.as_json:
        common.show_json(estimated.model_dump_json())
    else:
        common.show(str(estimated))
    return 0


def _carry_out(run: FileRun) -> int:
    """Answer the rows that are not done, and return the exit code."""
    # Made first: where the cache or a limit is refused, the output stays as it is.
    options: Any = {"rate_limit": run.limits, "batch": run.batch, "cache": run.cache}
    client = common.open_client(run.config, **options)
    with contextlib.closing(Output(run.output)) as file:
        _look_at_output(run, file)
        _look_at_input(run)
        result = asyncio.run(_answer(run, client, file))
    if not (result.answered or result.failed or run.done or result.error or result.interrupted):
        raise ValidationError(f"{run.source.name}: no rows", field="input")
    code = result.exit_code(file.failed)
    _sum_up(run, result, code)
    return code


@dataclass(slots=True)
class Result:
    """What a run came to."""

    answered: int = 0  # rows with a response
    failed: int = 0  # rows with an error
    kinds: Counter[str] = field(default_factory=Counter)  # of those errors, each explained
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
            self.kinds[common.explain(outcome)] += 1
        else:
            self.answered += 1
            self.cached += outcome.cached

    def exit_code(self, failed_before: int) -> int:
        """Return the exit code, given the rows of the output that had failed before."""
        if self.interrupted:
            return common.INTERRUPTED
        if self.error is not None:
            return common.exit_code_of(self.error)
        if self.failed or failed_before:
            return common.SOME_FAILED
        return common.BAD_INPUT if self.report_error else 0


async def _answer(run: FileRun, client: OpenAIClient, output: Output) -> Result:
    """Answer the rows, write their outcomes, and then the report, however the run ended."""
    result, began = Result(), time.monotonic()
    last_words = "" if run.output == "-" else f"to go on: {_resume_command()}"
    answer_all = _answer_by_batch if run.by_batch else _answer_online
    async with client:
        with common.interruptible(at_once=run.by_batch, last_words=last_words) as stop:
            try:
                await answer_all(run, client, output, result, stop)
            except (openai.OpenAIError, OSError) as error:  # what the rows without an outcome had in common
                result.error = error
        result.interrupted = stop.is_set()
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
    held: list[tuple[Row, Exception]] = []  # not these rows' fault, if it turns out to end the run

    def prompts() -> Iterator[Any]:
        for position, row in enumerate(run.rows()):
            taken[position] = row
            yield row.prompt

    write = functools.partial(_write, output, result)
    feed = run.feed(prompts())
    stream = client.as_completed(feed, progress=run.progress, stop_event=stop, **run.params)
    try:
        async with contextlib.aclosing(stream) as outcomes:
            async for position, outcome in outcomes:
                row = taken.pop(position)
                if isinstance(outcome, Exception) and _may_end(run, outcome):
                    held.append((row, outcome))
                    continue
                while held and not isinstance(outcome, Exception) and not outcome.cached:
                    await write(*held.pop(0))  # the account works: it was their fault
                await write(row, outcome)
    except openai.OpenAIError:
        if taken or not run.done:
            held.clear()
        raise
    finally:
        for pair in held:
            await write(*pair)


def _may_end(run: FileRun, error: Exception) -> bool:
    """Return whether an error may turn out to end the run."""
    failure = read_failure(error)
    return failure.is_shared or failure.ends_run(run.limits.max_wait)


async def _write(output: Output, result: Result, row: Row, outcome: ModelResponse | Exception) -> None:
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
            on_unclear=run.on_unclear,
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


def _sum_up(run: FileRun, result: Result, code: int) -> None:
    """Say what a run came to, and how to go on."""
    reader_left = isinstance(result.error, BrokenPipeError)
    quiet = run.quiet or reader_left or (code == common.BAD_INPUT and not result.answered + result.failed)
    if run.as_json:
        print_to = sys.stderr if run.output == "-" else sys.stdout
        common.show_json(to_json(_summary(run, result, code), only_ascii=True).decode(), file=print_to)
    elif not quiet:
        say(_counts(run, result))
        for kind, times in result.kinds.most_common(3):
            say(f"  {count(times)} x {kind}")
        for remark in remarks(result.stats):
            say(f"  {remark}")
    if result.report_error is not None:
        say(f"no report: {run.report}: {result.report_error.strerror}", style="red")
    elif run.report is not None and not quiet:
        say(f"report: {run.report}")
    if isinstance(result.error, openai.OpenAIError):
        say(common.message_of(result.error), style="red")
    hint = _hint(run, result, code)
    if hint and not quiet:
        say(hint)
    if isinstance(result.error, OSError):
        raise result.error


def _summary(run: FileRun, result: Result, code: int) -> dict[str, Any]:
    stats = (
        *("unpriced", "prompt_tokens", "completion_tokens", "rate_limited", "retries"),
        *("finish_reasons", "schema_misses", "unsent_parameters"),
    )
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
        waiting = f"to wait for them: {_resume_command()}"
        return f"the batches go on; {results if run.cache is None else waiting}"
    if code == common.SOME_FAILED and run.output != "-":
        return f"to ask again for what failed: {_resume_command()} --retry-failed"
    if code == 0 or (code == common.BAD_INPUT and not result.answered):
        return ""
    check = common.what_to_check(result.error, answered=bool(result.answered))
    if check:
        resumable = run.output != "-" and (result.answered or run.done)
        return f"{check}; then: {_resume_command()}" if resumable else check
    if run.output != "-":
        return f"to go on: {_resume_command()}"
    return "" if run.cache is None else "what was answered is in the cache: the same command goes on"


def _resume_command() -> str:
    """Return the command line that goes on with this one's output."""
    program = Path(sys.argv[0]).name
    start = "python -m openai_eval_client" if program == "__main__.py" else program
    kept = [argument for argument in sys.argv[1:] if argument not in {"--overwrite", "--resume"}]
    return f"{start} {shlex.join([*kept, '--resume'])}"
