"""The commands `run` and `estimate`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import sys
import tempfile
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openai_eval_client._cli import options as opt
from openai_eval_client._cli.exits import exit_codes, say, show_log, with_client
from openai_eval_client._cli.rows import Output, Source
from openai_eval_client._cli.work import FileRun, answer, sum_up
from openai_eval_client._format import count
from openai_eval_client.config import BatchConfig, OpenAIConfig
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TIMEOUT, _RETRIES = (OpenAIConfig.model_fields[name].default for name in ("timeout", "max_retries"))


def run(  # one name for each option
    source: opt.Input,
    *,
    output: opt.OutputFile = "-",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an output: ask only for rows that it lacks.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: ask again for rows that failed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew: what is in the output is lost.")
    ] = False,
    model: opt.Model = None,
    system: opt.System = None,
    schema: opt.Schema = None,
    temperature: opt.Temperature = None,
    max_tokens: opt.MaxTokens = None,
    param: opt.Params = None,
    api: opt.ApiOption = opt.Api.chat,
    prompt_column: opt.PromptColumn = None,
    form: opt.FormOption = None,
    limit: opt.Limit = None,
    rpm: opt.Rpm = opt.DEFAULT_RPM,
    tpm: opt.Tpm = opt.DEFAULT_TPM,
    max_concurrent: opt.MaxConcurrent = opt.DEFAULT_CONCURRENT,
    max_cost: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="USD", help="The most it may cost; needs --max-tokens. (default: any amount)"
        ),
    ] = None,
    cache: opt.Cache = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="When the run ends, however it ends, write a page about it: what held it up, what it cost, "
            "what failed. (default: none)",
        ),
    ] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Use the Batch API: half the price, within a day.")
    ] = False,
    window: opt.Window = opt.DEFAULT_WINDOW,
    interval: opt.Interval = opt.DEFAULT_INTERVAL,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help=f"Time limit of an attempt. (default: {_TIMEOUT:g})"),
    ] = None,
    max_retries: Annotated[
        int | None, typer.Option(min=0, metavar="N", help=f"Attempts after the first. (default: {_RETRIES})")
    ] = None,
    base_url: opt.BaseUrl = None,
    key_file: opt.KeyFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, and send nothing.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show progress on standard error.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show waits and retries as well.")] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the summary as JSON; if the rows go to standard output, to standard error."
        ),
    ] = False,
) -> None:
    """Answer a file of prompts, one output row for each.

    An output row is the input row with its index (from 0), and the response or
    the error. Rows are written as they come, each whole, so the output is JSON
    lines at any time. Options that take no value are off unless given, but for
    --progress.

    Exit codes: 0 all answered; 1 some failed; 2 bad input or usage; 3 budget
    reached; 4 refused by the server for all (key, model, quota, no server there);
    130 interrupted. After Ctrl-C, requests in flight may finish for 5 seconds.
    """
    show_log(verbose=verbose)
    with exit_codes():
        work = FileRun(
            Source(source, column=prompt_column, form=form and form.value, limit=limit),
            opt.api_config(
                base_url=base_url,
                key_file=key_file,
                needs_key=not dry_run,
                default_model=model,
                timeout=timeout,
                max_retries=max_retries,
            ),
            opt.rate_limit(rpm, tpm, max_concurrent),
            opt.request_params(
                param or [],
                schema,
                api,
                temperature=temperature,
                max_tokens=max_tokens,
                system=system,
                max_cost=max_cost,
            ),
            output=output,
            resume=resume,
            retry_failed=retry_failed,
            overwrite=overwrite,
            cache=cache and cache.expanduser(),
            by_batch=batch,
            batch=BatchConfig(auto_batch_threshold=1, completion_window=window, polling_interval=interval),
            report=report and report.expanduser(),
            quiet=quiet or (as_json and output == "-"),  # the summary is then alone on standard error
            as_json=as_json,
        )
        work.progress = progress and not work.quiet and not (output == "-" and sys.stdout.isatty())
        _check_usage(work)
        if model is None and not work.quiet:
            say(f"model: {work.config.default_model}, the default; --model names another")
        code = _estimate_rest(work) if dry_run else _carry_out(work)
    sys.exit(code)


def estimate(
    source: opt.Input,
    *,
    model: opt.Model = None,
    system: opt.System = None,
    schema: opt.Schema = None,
    max_tokens: opt.MaxTokens = None,
    param: opt.Params = None,
    api: opt.ApiOption = opt.Api.chat,
    prompt_column: opt.PromptColumn = None,
    form: opt.FormOption = None,
    limit: opt.Limit = None,
    rpm: opt.Rpm = opt.DEFAULT_RPM,
    tpm: opt.Tpm = opt.DEFAULT_TPM,
    as_json: opt.AsJson = False,
) -> None:
    """Say what a file of prompts would need: tokens, dollars, minutes. Sends nothing, and needs no key."""
    show_log()
    with exit_codes():
        work = FileRun(
            Source(source, column=prompt_column, form=form and form.value, limit=limit),
            opt.api_config(needs_key=False, default_model=model),
            opt.rate_limit(rpm, tpm),
            opt.request_params(param or [], schema, api, max_tokens=max_tokens, system=system),
            as_json=as_json,
        )
        _prepare(work)
        _show_estimate(work)


def _carry_out(work: FileRun) -> int:
    """Answer the rows that are not done, and return the exit code."""
    with _opened(work) as file:
        failed_before = file.failed
        _prepare(work)
        result = asyncio.run(answer(work, file))
    if not (result.answered or result.failed or work.done or result.error or result.interrupted):
        raise _no_rows(work)
    code = result.exit_code(failed_before)
    sum_up(work, result, code)
    return code


def _estimate_rest(work: FileRun) -> int:
    """Show what the rows that are not done would cost, and leave the output as it is."""
    if work.resume:
        with _opened(work, only_look=True):
            if not work.quiet:
                say(f"there already, and not estimated: {count(len(work.done))}")
    if work.cache is not None and not work.quiet:
        say("the cache is not looked at: answers that it has are estimated as well, but cost nothing")
    _prepare(work)
    _show_estimate(work)
    return 0


def _show_estimate(work: FileRun) -> None:
    params = {name: value for name, value in work.params.items() if name != "max_cost"}
    found = with_client(
        work.config,
        lambda client: client.estimate(work.each(attrgetter("prompt")), **params),
        rate_limit=work.limits,
    )
    typer.echo(found.model_dump_json() if work.as_json else str(found))


def _check_usage(work: FileRun) -> None:
    if work.resume and work.overwrite:
        raise ValidationError("--resume goes on, --overwrite begins anew: give one of them", field="resume")
    if work.retry_failed and not work.resume:
        raise ValidationError("--retry-failed needs --resume", field="retry_failed")
    if work.resume and work.output == "-":
        raise ValidationError("--resume needs --output: standard output cannot be read back", field="resume")
    source = None if work.source.is_stream else work.source.path
    output = None if work.output == "-" else Path(work.output).expanduser()
    _check_apart("output", output, input=source)
    if work.report is not None:
        _check_apart("report", work.report, input=source, output=output, cache=work.cache)
        _check_can_write(work.report)


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


@contextlib.contextmanager
def _opened(work: FileRun, *, only_look: bool = False) -> Iterator[Output]:
    """Open the output, and take from it what is done already."""
    name = work.output
    file = Output(name)
    try:
        if work.resume and not file.is_regular:
            raise ValidationError(f"--resume: {name} is no file that can be read back", field="resume")
        if work.resume:
            work.done = file.done(without_errors=work.retry_failed, only_look=only_look)
        elif work.overwrite and file.is_regular:
            file.clear()
        elif not file.is_empty:
            why = "is not empty: --resume goes on with it, --overwrite begins anew"
            raise ValidationError(f"{name}: {why}", field="output")
        if not work.quiet:
            _warn_of_models(file.models, work.config.default_model)
        yield file
    finally:
        file.close()


def _warn_of_models(models: Mapping[str, int], model: str) -> None:
    """Warn if no response in the output is by the model that is asked, or by a dated version of it."""
    version = re.compile(rf"{re.escape(model)}(-\d.*)?")
    if models and not any(version.fullmatch(name) for name in models):
        there, names = count(sum(models.values())), ", ".join(sorted(models))
        say(f"the answers there ({there}) are of {names}; this run asks {model}", style="yellow")


# Keys of a row that look as if they were to be sent, though a run sends the same with every row.
_SAMPLING = {"max_completion_tokens", "max_tokens", "seed", "temperature", "top_p"}
_LIKE_PARAMETERS = _SAMPLING | {"model", "response_format", "system"}


def _prepare(work: FileRun) -> None:
    """Look at all rows, if they can be read twice, before anything is paid."""
    if work.source.is_stream:
        return
    unsent: set[str] = set()
    for row in work.rows():
        work.total += 1
        unsent |= _LIKE_PARAMETERS & row.data.keys()
    work.progress = work.progress and work.total > 0
    if not work.total and not work.done:
        raise _no_rows(work)
    if unsent and not work.quiet:
        names = ", ".join(sorted(unsent))
        say(f"copied to the output, not sent: {names}; options set them for all rows", style="yellow")


def _no_rows(work: FileRun) -> ValidationError:
    return ValidationError(f"{work.source.name}: no rows", field="input")
