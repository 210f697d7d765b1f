"""The commands `batch submit`, `status`, `results`, `cancel`, `list`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import IO, TYPE_CHECKING, Annotated, Any

import openai
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openai_eval_client._cli import options as opt
from openai_eval_client._cli.options import (
    BAD_INPUT,
    REFUSED,
    SOME_FAILED,
    account,
    exit_codes,
    fail,
    is_refusal,
    say,
    show_log,
)
from openai_eval_client._cli.rows import by_lines, read_requests, row_of
from openai_eval_client._cli.work import with_client
from openai_eval_client._format import usd
from openai_eval_client._runtime import replacing
from openai_eval_client._validation import check_number
from openai_eval_client._wire import read_failure
from openai_eval_client.config import BatchConfig
from openai_eval_client.errors import PartialFailureError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from openai_eval_client._wire import StatedLimit
    from openai_eval_client.client import OpenAIClient
    from openai_eval_client.config import OpenAIConfig
    from openai_eval_client.models import BatchJobStatus, ModelResponse


_MOST_ERRORS = 10  # of a job's, in its table
_WIDE = 1000  # columns where no terminal says how many: a job's id stays on one line


def show_job(found: BatchJobStatus, *, as_json: bool) -> None:
    """Write a job's status to standard output."""
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        _print(_table(found))


def show_jobs(jobs: Sequence[BatchJobStatus], *, as_json: bool) -> None:
    """Write the status of several jobs to standard output."""
    if as_json:
        typer.echo(f"[{','.join(job.model_dump_json() for job in jobs)}]")
    else:
        _print(_table_of(jobs))


def show_limits(found: Mapping[str, Mapping[str, StatedLimit]]) -> None:
    """Write the limits of several models to standard output."""
    table = Table(box=box.SIMPLE)
    table.add_column("model", overflow="fold")
    for name in ("RPM", "left", "full in", "TPM", "left", "full in"):
        table.add_column(name, justify="right")
    for model, quotas in found.items():
        cells = [cell for name in ("requests", "tokens") for cell in _cells(quotas.get(name))]
        table.add_row(Text(model), *cells)
    _print(table)


def _cells(quota: StatedLimit | None) -> tuple[str, str, str]:
    if quota is None:
        return "", "", ""
    return f"{quota.limit:,}", f"{quota.remaining:,}", "" if quota.reset is None else f"{quota.reset:g} s"


def _print(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(table)


def _table(found: BatchJobStatus) -> Table:
    rows = {
        "job": found.job_id,
        "status": found.status,
        "created": f"{found.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "ended": f"{found.completed_at:%Y-%m-%d %H:%M:%S} UTC" if found.completed_at else "",
        "requests": f"{found.request_count:,}",
        "answered": f"{found.completed_count:,}",
        "failed": f"{found.failed_count:,}",
        "errors": _errors(found),
    }
    table = Table(show_header=False, box=box.SIMPLE)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _errors(found: BatchJobStatus) -> str:
    lines = [
        (f"request {error.index}: " if error.line else "")
        + (f"{error.code}: " if error.code else "")
        + error.message
        for error in found.errors[:_MOST_ERRORS]
    ]
    more = len(found.errors) - len(lines)
    return "\n".join([*lines, f"and {more} more"] if more else lines)


def _table_of(jobs: Sequence[BatchJobStatus]) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("created (UTC)", "status"):
        table.add_column(name)
    for name in ("requests", "answered", "failed"):
        table.add_column(name, justify="right")
    table.add_column("job", overflow="fold")
    for job in jobs:
        counts = (job.request_count, job.completed_count, job.failed_count)
        created = f"{job.created_at:%Y-%m-%d %H:%M}"
        table.add_row(created, job.status, *(f"{count:,}" for count in counts), Text(job.job_id))
    return table


batch_app = typer.Typer(no_args_is_help=True)

_DEFAULTS = BatchConfig()

Job = Annotated[str, typer.Argument(metavar="JOB", help="The id that submit printed, or that of any batch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@batch_app.callback()
def _batch(ctx: typer.Context, *, base_url: opt.BaseUrl = None, key_file: opt.KeyFile = None) -> None:
    """Submit requests as jobs of the Batch API, at half the price, and collect their results."""
    # Exit codes: 0 all answered; 1 some failed, or not ended yet; 2 bad input;
    # 4 refused by the server (key, model, quota, no such job); 130 interrupted.
    show_log()
    ctx.obj = {"base_url": base_url, "key_file": key_file}


@batch_app.command()
def submit(
    ctx: typer.Context,
    source: Annotated[
        typer.FileBinaryRead,
        typer.Argument(
            metavar="INPUT",
            help="JSON lines, - for standard input: each a text, or an object with prompt or messages and "
            "any parameter of the API.",
        ),
    ],
    *,
    model: Annotated[str | None, typer.Option(help="The model of lines that name none.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="The temperature of lines that give none."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Output tokens at most, for lines that give no number."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt of lines that have none.")] = None,
    api: Annotated[opt.Api, typer.Option(help="Chat completions, or the Responses API.")] = opt.Api.chat,
    window: Annotated[
        str,
        typer.Option(help="What the provider may take: 24h, or 7d where it has that."),
    ] = _DEFAULTS.completion_window,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Note the batches there: submitted again, they are gone on with."),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Kept with the job by the provider; up to 14 of them."),
    ] = None,
) -> None:
    """Submit requests as a job and print its id, which is all that the other commands need."""
    pairs = _pairs(metadata or [])
    given = {"temperature": temperature, "max_tokens": max_tokens, "system": system}
    defaults = {name: value for name, value in given.items() if value is not None}
    interrupted = "interrupted; what was created already is listed by: openai-eval-client batch list"
    with exit_codes(interrupted=interrupted):
        config = _config(ctx, default_model=model)
        requests, numbers = read_requests(source, defaults)
        if model is None and any(request.model is None for request in requests):
            say(f"model: {config.default_model}, the default; --model names another")
        try:
            job = with_client(
                config,
                lambda client: client.submit_batch_job(
                    requests,
                    completion_window=window,
                    metadata=pairs,
                    api=api.value,
                ),
                cache=cache,
            )
        except ValidationError as error:
            fail(BAD_INPUT, by_lines(error, numbers))
        say(f"requests submitted: {job.request_count}, to {config.base_url}, to be answered within {window}")
        typer.echo(job.job_id)


@batch_app.command()
def status(
    ctx: typer.Context,
    job: Job,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Look again until it has ended.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = _DEFAULTS.polling_interval,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is."""
    # With --wait the exit code says how it ended: 0 all answered, 1 some failed,
    # 4 not one was run. Without, it is 0 whatever the status.
    with exit_codes(interrupted="interrupted; the job goes on"):
        found = with_client(
            _config(ctx),
            lambda client: _waited(client, job, interval) if wait else client.get_batch_status(job),
        )
        show_job(found, as_json=as_json)
    if wait:
        sys.exit(_code_of(found))


@batch_app.command()
def results(
    ctx: typer.Context,
    job: Job,
    *,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="Where to; - is standard output."),
    ] = "-",
) -> None:
    """Write a job's results as JSON lines, one for each request, in the order of the input."""
    # A line has the index, counted from 0, and the response or the error. A file
    # gets its name when it is whole. Of a job that has not ended nothing is
    # written, and the exit code is 1.
    with exit_codes(), _opened(output) as file:
        outcomes = with_client(_config(ctx), lambda client: _outcomes(client, job))
        for index, outcome in enumerate(outcomes):
            file.write(row_of(index, outcome))
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if failures:
        refused = len(failures) == len(outcomes) and all(map(is_refusal, failures))
        sys.exit(REFUSED if refused else SOME_FAILED)


@batch_app.command()
def cancel(ctx: typer.Context, job: Job, *, as_json: AsJson = False) -> None:
    """Cancel a job; what is answered already stays, and is paid."""
    with exit_codes():
        show_job(with_client(_config(ctx), lambda client: client.cancel_batch_job(job)), as_json=as_json)


@batch_app.command("list")
def list_jobs(
    ctx: typer.Context,
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the jobs submitted by this program or its library, the newest first."""
    with exit_codes():
        jobs = with_client(_config(ctx), lambda client: _newest(client, limit))
        show_jobs(jobs, as_json=as_json)


def _config(ctx: typer.Context, **fields: Any) -> OpenAIConfig:
    """Return where the API is, as the options before the command say."""
    return account(**ctx.obj, **fields)


def _pairs(metadata: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in metadata:
        key, equals, value = text.partition("=")
        if not equals or key in pairs:
            why = "not KEY=VALUE" if not equals else "this key was given before"
            raise typer.BadParameter(f"{text!r}: {why}", param_hint="--metadata")
        pairs[key] = value
    return pairs


async def _waited(client: OpenAIClient, job: str, interval: float) -> BatchJobStatus:
    """Look at a job until it has ended; once it was there, no outage of the server ends the wait."""
    check_number(interval, "interval", above=0)
    found = await client.get_batch_status(job)
    told = ""
    while not found.has_ended:
        line = f"{found.status}: {found.completed_count} of {found.request_count} answered"
        line += f", {found.failed_count} failed" if found.failed_count else ""
        if line != told:
            told = line
            say(line)
        await asyncio.sleep(interval)
        try:
            found = await client.get_batch_status(job)
        except openai.APIError as error:
            if not read_failure(error).retry:
                raise
            say(f"no answer ({error}): again in {interval:g} s", style="yellow")
    return found


async def _outcomes(client: OpenAIClient, job: str) -> list[Any]:
    try:
        outcomes: list[Any] = await client.retrieve_batch_results(job)
    except PartialFailureError as error:
        say(str(error), style="red")
        return [error.failures.get(index, found) for index, found in enumerate(error.responses)]
    say(f"requests answered: {len(outcomes)}, {_cost(outcomes)}")
    return outcomes


def _cost(responses: Sequence[ModelResponse]) -> str:
    costs = [response.usage.estimated_cost for response in responses]
    known = [cost for cost in costs if cost is not None]
    if not known:
        return "at a price that is not known"
    unpriced = len(costs) - len(known)
    return f"at {usd(sum(known))} USD" + (f" and {unpriced} unpriced" if unpriced else "")


async def _newest(client: OpenAIClient, limit: int) -> list[BatchJobStatus]:
    found: list[BatchJobStatus] = []
    async for job in client.list_batch_jobs():
        found.append(job)
        if len(found) == limit:
            break
    return found


def _code_of(found: BatchJobStatus) -> int:
    if found.status == "failed" and not found.completed_count:
        return REFUSED
    return 0 if found.completed_count == found.request_count else SOME_FAILED


@contextlib.contextmanager
def _opened(output: str) -> Iterator[IO[bytes]]:
    if output == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()  # a pipe that was closed is found out here
    else:
        with replacing(output) as file:
            yield file
