"""The commands `batch submit`, `status`, `results`, `cancel`, `list`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from typing import IO, TYPE_CHECKING, Annotated, Any

import openai
import pydantic
import typer
from typer import Argument, Option

from openai_eval_client._cli import common
from openai_eval_client._cli.common import exit_codes, say, show_log, with_client
from openai_eval_client._cli.rows import Source, line_of
from openai_eval_client._format import count, duration, printable_json
from openai_eval_client._report import outcomes_of
from openai_eval_client._runtime import replacing
from openai_eval_client._validation import check_number, shown
from openai_eval_client._wire import read_failure
from openai_eval_client.errors import PartialFailureError, ValidationError
from openai_eval_client.models import BatchRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openai_eval_client.client import OpenAIClient
    from openai_eval_client.errors import BatchError
    from openai_eval_client.models import BatchJobStatus

batch_app = typer.Typer(no_args_is_help=True)

_SHOWN_ERRORS = 10  # of a job's, in its table
Job = Annotated[str, Argument(metavar="JOB", help="The id that submit printed, or that of any batch.")]


@batch_app.callback()
def _batch(ctx: typer.Context, *, base_url: common.BaseUrl = None, key_file: common.KeyFile = None) -> None:
    """Submit requests as jobs of the Batch API, at half the price, and collect their results.

    Exit codes: 0 all answered; 1 some failed, or not ended yet; 2 bad input;
    4 refused by the server (key, model, quota, no such job); 130 interrupted.
    """
    show_log()
    ctx.obj = {"base_url": base_url, "key_file": key_file}


# --- submit -----------------------------------------------------------------------------------------------

# The names by which a line may give itself what an option is the default of.
_NAMES = {
    "temperature": {"temperature"},
    "max_tokens": {"max_tokens", "max_completion_tokens", "max_output_tokens"},
    "system": {"system", "instructions"},
}
_SYSTEM_ROLES = frozenset({"system", "developer"})
_OWN_INDEX = re.compile(r"\Arequests\[\d+\][.:]? ?")
_OTHER_INDEX = re.compile(r"requests\[(\d+)\](?= has the same)")


@batch_app.command()
def submit(
    ctx: typer.Context,
    source: Annotated[
        str,
        Argument(
            metavar="INPUT",
            help="A file of JSON lines; - is standard input. A line is a text, or an object with prompt or "
            "messages and any parameter of the API.",
        ),
    ],
    *,
    model: common.Model = None,
    temperature: common.Temperature = None,
    max_tokens: common.MaxTokens = None,
    system: common.System = None,
    api: common.ApiOption = "chat",
    window: common.Window = common.DEFAULT_WINDOW,
    on_unclear: common.OnUnclear = "raise",
    cache: common.Cache = None,
    metadata: Annotated[
        list[str] | None,
        Option(
            metavar="KEY=VALUE",
            help="A note that the provider keeps with the job; up to 14 of them. (default: none)",
        ),
    ] = None,
) -> None:
    """Submit requests as a job and print its id, which is all that the other commands need.

    A line's own model, temperature, max_tokens or system prompt wins over the option.
    """
    options = {"temperature": temperature, "max_tokens": max_tokens, "system": system}
    defaults = {name: value for name, value in options.items() if value is not None}
    interrupted = "interrupted; what was created already is listed by: openai-eval-client batch list"
    with exit_codes(interrupted=interrupted):
        pairs = common.split_pairs("--metadata", metadata or [], "KEY=VALUE")
        terms: Any = {"completion_window": window, "metadata": pairs, "api": api, "on_unclear": on_unclear}
        config = common.api_config(**ctx.obj, default_model=model)
        lines = Source(source, form="jsonl")
        requests, numbers = read_requests(lines, defaults)
        if model is None and any(request.model is None for request in requests):
            say(f"model: {config.default_model}, the default; --model names another")
        try:
            job = with_client(config, lambda client: client.submit_batch_job(requests, **terms), cache=cache)
        except ValidationError as error:
            common.fail(common.BAD_INPUT, by_lines(error, lines.name, numbers))
        sent = count(job.request_count)
        say(f"requests submitted: {sent}, to {config.base_url}, to be answered within {window}")
        common.show(job.job_id)


def read_requests(source: Source, defaults: Mapping[str, Any]) -> tuple[list[BatchRequest], list[int]]:
    """Read a request from each line, and return the numbers of the lines as well."""
    requests = {line: _request(data, defaults, source, line) for line, data in source.objects()}
    if not requests:
        raise ValidationError(f"{source.name}: empty: give a request a line", field="input")
    return list(requests.values()), list(requests)


def _request(data: Mapping[str, Any], defaults: Mapping[str, Any], source: Source, line: int) -> BatchRequest:
    parameters = {name: value for name, value in data.items() if value is not None}
    added = {name: value for name, value in defaults.items() if not _NAMES[name] & parameters.keys()}
    if _has_system_message(parameters):
        added.pop("system", None)
    try:
        return BatchRequest.model_validate({**added, **parameters}, strict=True)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        why = problem["msg"].removeprefix("Value error, ")
        where = f"{problem['loc'][0]}={shown(problem['input'])}: " if problem["loc"] else ""
        source.reject_input(line, f"{where}{why}")


def _has_system_message(parameters: Mapping[str, Any]) -> bool:
    messages = parameters.get("messages", parameters.get("prompt"))
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") in _SYSTEM_ROLES for message in messages
    )


def by_lines(error: ValidationError, name: str, numbers: Sequence[int]) -> str:
    """Return an error's message with the lines of the input in place of the indexes of the requests."""
    message = str(error)
    if error.index is None:
        return message
    own = f"{name}, line {numbers[error.index]}: {_OWN_INDEX.sub('', message)}"
    return _OTHER_INDEX.sub(lambda match: f"line {numbers[int(match[1])]}", own)


# --- status, results, cancel, list ------------------------------------------------------------------------


@batch_app.command()
def status(
    ctx: typer.Context,
    job: Job,
    *,
    wait: Annotated[bool, Option("--wait", help="Look every --interval until the job has ended.")] = False,
    interval: common.Interval = common.DEFAULT_INTERVAL,
    as_json: common.AsJson = False,
) -> None:
    """Show how far a job is.

    With --wait the exit code says how it ended: 0 all answered, 1 some failed,
    4 none was run. Without --wait it is 0, whatever the status.
    """
    with exit_codes(interrupted="interrupted; the job goes on"):
        latest = with_client(
            common.api_config(**ctx.obj),
            lambda client: _wait_for(client, job, interval) if wait else client.get_batch_status(job),
        )
        _show_job(latest, as_json=as_json)
    if wait and latest.status == "failed" and not latest.completed_count:
        sys.exit(common.REFUSED)
    if wait and latest.completed_count != latest.request_count:
        sys.exit(common.SOME_FAILED)


async def _wait_for(client: OpenAIClient, job: str, interval: float) -> BatchJobStatus:
    """Look at a job until it has ended; once it was found, no outage of the server ends the wait."""
    check_number(interval, "interval", above=0)
    latest = await client.get_batch_status(job)
    shown_last = ""
    while not latest.has_ended:
        line = f"{latest.status}: {count(latest.completed_count)} of {count(latest.request_count)} answered"
        line += f", {count(latest.failed_count)} failed" if latest.failed_count else ""
        if line != shown_last:
            shown_last = line
            say(line)
        await asyncio.sleep(interval)
        try:
            latest = await client.get_batch_status(job)
        except openai.APIError as error:
            if not read_failure(error).retry:
                raise
            say(f"no answer ({error}): again in {duration(interval)}", style="yellow")
    return latest


@batch_app.command()
def results(ctx: typer.Context, job: Job, *, output: common.OutputFile = "-") -> None:
    """Write a job's results as JSON lines, one for each request, in the order of the input.

    A line has the index, counted from 0, and the response or the error. A file
    gets its name once it is complete. If the job has not ended, nothing is
    written, and the exit code is 1.
    """
    whole: contextlib.AbstractContextManager[IO[bytes]]
    whole = contextlib.nullcontext(sys.stdout.buffer) if output == "-" else replacing(output)
    with exit_codes(), whole as file:
        outcomes = with_client(common.api_config(**ctx.obj), lambda client: _outcomes(client, job))
        for index, outcome in enumerate(outcomes):
            custom_id = getattr(outcome, "custom_id", None)
            named = {} if custom_id is None else {"custom_id": custom_id}
            line = line_of({"index": index, **named}, outcome, only_ascii=True)
            file.write(printable_json(line.decode()).encode())
        file.flush()  # a pipe that was closed is found out here
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if failures:
        refused = len(failures) == len(outcomes) and all(map(common.is_refusal, failures))
        sys.exit(common.REFUSED if refused else common.SOME_FAILED)


async def _outcomes(client: OpenAIClient, job: str) -> list[Any]:
    try:
        responses = await client.retrieve_batch_results(job)
    except PartialFailureError as error:
        say(str(error), style="red")
        return outcomes_of(error)
    costs = [response.usage.estimated_cost for response in responses]
    cost = common.cost_text(sum(amount or 0 for amount in costs), costs.count(None))
    say(f"requests answered: {count(len(responses))}, {cost}")
    return responses


@batch_app.command()
def cancel(ctx: typer.Context, job: Job, *, as_json: common.AsJson = False) -> None:
    """Cancel a job; what is answered already stays, and is paid."""
    with exit_codes():
        latest = with_client(common.api_config(**ctx.obj), lambda client: client.cancel_batch_job(job))
        _show_job(latest, as_json=as_json)


@batch_app.command("list")
def list_jobs(
    ctx: typer.Context,
    *,
    limit: Annotated[int, Option(min=1, metavar="N", help="Show N jobs at most.")] = 20,
    as_json: common.AsJson = False,
) -> None:
    """List the jobs submitted by this program or its library, the newest first."""
    with exit_codes():
        jobs = with_client(common.api_config(**ctx.obj), lambda client: _newest(client, limit))
        if as_json:
            common.show_json(f"[{','.join(job.model_dump_json() for job in jobs)}]")
        else:
            counted = ("requests", "answered", "failed")
            rows = []
            for job in jobs:
                counts = map(count, (job.request_count, job.completed_count, job.failed_count))
                created = f"{job.created_at:%Y-%m-%d %H:%M}" if job.created_at else ""
                rows.append((created, job.status, *counts, job.job_id))
            common.print_table(("created (UTC)", "status", *counted, "job"), rows, right=counted)


async def _newest(client: OpenAIClient, limit: int) -> list[BatchJobStatus]:
    jobs: list[BatchJobStatus] = []
    async for job in client.list_batch_jobs():
        jobs.append(job)
        if len(jobs) == limit:
            break
    return jobs


def _show_job(job: BatchJobStatus, *, as_json: bool) -> None:
    if as_json:
        common.show_json(job.model_dump_json())
        return
    common.print_fields(
        {
            "job": job.job_id,
            "status": job.status,
            "created": f"{job.created_at:%Y-%m-%d %H:%M:%S} UTC" if job.created_at else "",
            "ended": f"{job.completed_at:%Y-%m-%d %H:%M:%S} UTC" if job.completed_at else "",
            "requests": count(job.request_count),
            "answered": count(job.completed_count),
            "failed": count(job.failed_count),
            "errors": _errors(job.errors),
        }
    )


def _errors(errors: Sequence[BatchError]) -> str:
    lines = [
        (f"request {error.index}: " if error.line else "")
        + (f"{error.code}: " if error.code else "")
        + error.message
        for error in errors[:_SHOWN_ERRORS]
    ]
    more = len(errors) - len(lines)
    return "\n".join([*lines, f"and {more} more"] if more else lines)
