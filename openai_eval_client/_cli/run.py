"""The commands `run` and `estimate`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openai_eval_client._cli import options as opt
from openai_eval_client._cli.exits import complete, exit_codes, say, show_log
from openai_eval_client._cli.rows import Output, Source
from openai_eval_client._cli.work import FileRun, answer, sum_up
from openai_eval_client._cli.work import estimate as estimate_rows
from openai_eval_client._format import count
from openai_eval_client.config import BatchConfig, OpenAIConfig
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from openai_eval_client.models import CostEstimate

_BATCH = BatchConfig()
_TIMEOUT, _RETRIES = (OpenAIConfig.model_fields[name].default for name in ("timeout", "max_retries"))
# Keys of a row that look as if they were to be sent, though a run sends the same with every row.
_LIKE_PARAMETERS = frozenset(
    {
        "max_completion_tokens",
        "max_tokens",
        "model",
        "response_format",
        "seed",
        "system",
        "temperature",
        "top_p",
    }
)


def run(  # one name for each option
    source: opt.Input,
    *,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="The file for the rows; - is standard output."),
    ] = "-",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an output file: rows that it has are not asked again."),
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: ask again for the rows that failed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew: what is in the output file is lost.")
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
            min=0,
            metavar="USD",
            help="What this run may cost at most; needs --max-tokens. (default: any amount)",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep answers in this file, and take from it those that it has. (default: no cache)",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="When the run ends, however it ends, write an HTML page about it to this file: what held "
            "it up, what it cost, what failed. (default: no page)",
        ),
    ] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Use the Batch API: half the price, answers within a day.")
    ] = False,
    window: Annotated[
        str, typer.Option(help="With --batch: the time that the provider may take, such as 24h or 7d.")
    ] = _BATCH.completion_window,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --batch: how often to look at the batches.")
    ] = _BATCH.polling_interval,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help=f"The time for one attempt. (default: {_TIMEOUT})")
    ] = None,
    max_retries: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help=f"Attempts at a row after the first. (default: {_RETRIES})"),
    ] = None,
    base_url: opt.BaseUrl = None,
    key_file: opt.KeyFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would cost, and send nothing.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show progress on standard error.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show waits and retries as well.")] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the summary as JSON: to standard output, or to standard error if the rows go to "
            "standard output.",
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
    quiet = quiet or (as_json and output == "-")  # the summary is then alone on standard error
    with exit_codes():
        _check_usage(output, resume=resume, retry_failed=retry_failed, overwrite=overwrite)
        config = opt.api_config(
            base_url=base_url,
            key_file=key_file,
            needs_key=not dry_run,
            default_model=model,
            timeout=timeout,
            max_retries=max_retries,
        )
        settings = BatchConfig(auto_batch_threshold=1, completion_window=window, polling_interval=interval)
        work = FileRun(
            Source(source, column=prompt_column, form=form and form.value, limit=limit),
            config,
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
            cache=cache,
            batch=settings if batch else None,
            report=report and report.expanduser(),
            progress=progress and not quiet and not (output == "-" and sys.stdout.isatty()),
        )
        _check_files(work)
        if model is None and not quiet:
            say(f"model: {config.default_model}, the default; --model names another")
        if dry_run:
            if resume:
                _look(work, retry_failed=retry_failed, quiet=quiet)
            if cache is not None and not quiet:
                say("the cache is not looked at: answers that it has are estimated as well, but cost nothing")
            _prepare(work, quiet=quiet)
            _show_estimate(complete(estimate_rows(work)), as_json=as_json)
            return
        with _opened(work, resume=resume, retry_failed=retry_failed, overwrite=overwrite) as file:
            failed_before = file.failed
            if not quiet:
                _warn_of_models(file.models, config.default_model)
            _prepare(work, quiet=quiet)
            result = asyncio.run(answer(work, file))
        if not (result.answered or result.failed or work.done or result.error or result.interrupted):
            raise _no_rows(work)
        code = result.exit_code(failed_before)
        sum_up(work, result, code, quiet=quiet, as_json=as_json)
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
        )
        _prepare(work, quiet=False)
        _show_estimate(complete(estimate_rows(work)), as_json=as_json)


def _check_usage(output: str, *, resume: bool, retry_failed: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValidationError("--resume goes on, --overwrite begins anew: give one of them", field="resume")
    if retry_failed and not resume:
        raise ValidationError("--retry-failed needs --resume", field="retry_failed")
    if resume and output == "-":
        raise ValidationError("--resume needs --output: standard output cannot be read back", field="resume")


def _check_files(work: FileRun) -> None:
    """Reject files that would overwrite one another, and a report that cannot be written."""
    source = None if work.source.is_stream else work.source.path
    output = None if work.output == "-" else Path(work.output).expanduser()
    _reject_same("output", output, {"input": source})
    cache = work.cache and work.cache.expanduser()
    _reject_same("report", work.report, {"input": source, "output": output, "cache": cache})
    if work.report is not None:
        _check_can_write(work.report)


def _reject_same(option: str, path: Path | None, files: Mapping[str, Path | None]) -> None:
    for use, other in files.items():
        if path is not None and other is not None and _is_same(path, other):
            raise ValidationError(f"--{option} {path}: is the {use} as well", field=option)


def _is_same(path: Path, other: Path) -> bool:
    both_exist = path.exists() and other.exists()
    return path.samefile(other) if both_exist else path.resolve() == other.resolve()


def _check_can_write(path: Path) -> None:
    """Find out before anything is paid, and without touching a page that is there."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.is_file() or not path.exists():
            tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        error.filename = f"--report {path}"
        raise


@contextlib.contextmanager
def _opened(
    work: FileRun, *, resume: bool, retry_failed: bool, overwrite: bool, only_look: bool = False
) -> Iterator[Output]:
    """Open the output, and take from it what is done already."""
    name = work.output
    file = Output(name)
    try:
        if resume and not file.is_regular:
            raise ValidationError(f"--resume: {name} is no file that can be read back", field="resume")
        if resume:
            work.done = file.done(without_errors=retry_failed, only_look=only_look)
        elif overwrite and file.is_regular:
            file.clear()
        elif not file.is_empty:
            why = "is not empty: --resume goes on with it, --overwrite begins anew"
            raise ValidationError(f"{name}: {why}", field="output")
        yield file
    finally:
        file.close()


def _look(work: FileRun, *, retry_failed: bool, quiet: bool) -> None:
    """Take from the output what is done already, and leave it as it is."""
    with _opened(work, resume=True, retry_failed=retry_failed, overwrite=False, only_look=True) as file:
        if not quiet:
            say(f"there already, and not estimated: {count(len(work.done))}")
            _warn_of_models(file.models, work.config.default_model)


def _warn_of_models(models: Mapping[str, int], model: str) -> None:
    """Warn if no response in the output is by the model that is asked, or by a dated version of it."""
    version = re.compile(rf"{re.escape(model)}(-\d.*)?")
    if models and not any(version.fullmatch(name) for name in models):
        there, names = count(sum(models.values())), ", ".join(sorted(models))
        say(f"the answers there ({there}) are of {names}; this run asks {model}", style="yellow")


def _prepare(work: FileRun, *, quiet: bool) -> None:
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
    if unsent and not quiet:
        names = ", ".join(sorted(unsent))
        say(f"copied to the output, not sent: {names}; options set them for all rows", style="yellow")


def _no_rows(work: FileRun) -> ValidationError:
    return ValidationError(f"{work.source.name}: no rows", field="input")


def _show_estimate(found: CostEstimate, *, as_json: bool) -> None:
    typer.echo(found.model_dump_json() if as_json else str(found))
