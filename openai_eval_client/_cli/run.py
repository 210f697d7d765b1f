"""The commands `run` and `estimate`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import openai
import typer

from openai_eval_client._cli import options as opt
from openai_eval_client._cli.options import (
    BAD_INPUT,
    BUDGET,
    INTERRUPTED,
    SOME_FAILED,
    account,
    code_of,
    exit_codes,
    say,
    sentence,
    show_log,
)
from openai_eval_client._cli.rows import Output, Source
from openai_eval_client._cli.work import (
    Order,
    answer_by_batch,
    answer_rows,
    check_some,
    command,
    complete,
    estimate_rows,
    survey,
)
from openai_eval_client._format import usd
from openai_eval_client._report import meaning
from openai_eval_client._stats import Failure
from openai_eval_client._wire import Kind, read_failure
from openai_eval_client.config import BatchConfig
from openai_eval_client.errors import QuotaError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from openai_eval_client._cli.work import Result
    from openai_eval_client.models import ClientStats, CostEstimate


_REASONS = 3  # kinds of error that are told
_CHECK_URL = "check --base-url or OPENAI_BASE_URL: it goes up to /v1"
_TO_CHECK: dict[type[Exception], str] = {
    openai.AuthenticationError: "check OPENAI_API_KEY or --api-key-file",
    openai.PermissionDeniedError: "check what the key may do, and --model",
    openai.NotFoundError: "check --model",
    openai.BadRequestError: "check --model and the parameters",
    QuotaError: "check the account's credit",
}


def again() -> str:
    """Return the command that goes on with this one's output."""
    return command(add="--resume", without="--overwrite")


def exit_code(result: Result, failed_before: int) -> int:
    """Return the exit code, where so many rows of the output had failed before."""
    if result.interrupted:
        return INTERRUPTED
    if isinstance(result.error, openai.OpenAIError):
        return code_of(result.error)
    if result.error is not None:
        return BAD_INPUT
    return SOME_FAILED if result.failed or failed_before else 0


def sum_up(order: Order, result: Result, output: str, code: int, *, quiet: bool, as_json: bool) -> None:
    """Say what came of it, and how to go on."""
    reader_left = isinstance(result.error, BrokenPipeError)
    quiet = quiet or reader_left or (code == BAD_INPUT and not result.answered + result.failed)
    if as_json:
        print_to = sys.stderr if output == "-" else sys.stdout
        typer.echo(json.dumps(_summary(order, result, output, code)), file=print_to)
    elif not quiet:
        say(_account_of(order, result))
        for line in _reasons(result):
            say(line)
    if isinstance(result.error, openai.OpenAIError):
        say(sentence(result.error), style="red")
    hint = _hint(order, result, output, code)
    if hint and not quiet:
        say(hint)
    if isinstance(result.error, OSError):
        raise result.error


def _summary(order: Order, result: Result, output: str, code: int) -> dict[str, Any]:
    stats = result.stats
    if stats is None:
        return {}
    return {
        "exit_code": code,
        "input": order.source.name,
        "output": output,
        "model": order.config.default_model,
        "answered": result.answered,
        "failed": result.failed,
        "skipped": len(order.done),
        "cached": result.cached,
        "cost": float(stats.cost),
        "unpriced": stats.unpriced,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "rate_limited": stats.rate_limited,
        "retries": stats.retries,
        "seconds": round(result.seconds, 3),
        "interrupted": result.interrupted,
        "error": None if result.error is None else str(result.error),
    }


def _account_of(order: Order, result: Result) -> str:
    stats = result.stats
    total = "" if order.total is None else f" of {order.total:,}"
    parts = [f"{result.answered:,}{total} answered"]
    parts += [f"{result.failed:,} failed"] if result.failed else []
    parts += [f"{len(order.done):,} there before"] if order.done else []
    parts += [f"{result.cached:,} from the cache"] if result.cached else []
    if stats is not None:
        parts.append(_cost_of(stats))
        parts += [f"{stats.rate_limited:,} x 429"] if stats.rate_limited else []
    return ", ".join([*parts, f"{result.seconds:.1f} s"])


def _cost_of(stats: ClientStats) -> str:
    if stats.unpriced and not stats.cost:
        return "cost unknown"
    return f"{usd(float(stats.cost))} USD" + (f" and {stats.unpriced:,} unpriced" if stats.unpriced else "")


def _reasons(result: Result) -> list[str]:
    """Return a line for each of the most frequent kinds of error; a message may quote a prompt."""
    lines = []
    for kind, times in result.kinds.most_common(_REASONS):
        said = " ".join(str(part) for part in kind if part)
        means = meaning(Failure("", *kind)).partition("; sent again")[0].replace("the exception", "its row")
        lines.append(f"  {times:,} x {said}: {means}")
    return lines


def say_models(models: Mapping[str, int], asked: str) -> None:
    """Warn where no response that is there names the model asked, or a dated version of it."""
    version = re.compile(rf"{re.escape(asked)}(-\d.*)?")
    if models and not any(version.fullmatch(model) for model in models):
        there, named = sum(models.values()), ", ".join(sorted(models))
        say(f"the answers there ({there:,}) are of {named}; this run asks {asked}", style="yellow")


def _to_check(result: Result, code: int) -> str:
    """Return what to look at where the same command would meet the same error again."""
    error = result.error
    if code == BUDGET and not result.answered:
        return "nothing fits: raise --max-cost, or lower --max-tokens"
    if isinstance(error, openai.NotFoundError) and "model" not in str(error).lower():
        return _CHECK_URL
    if isinstance(error, openai.OpenAIError) and read_failure(error).kind is Kind.UNREACHABLE:
        return f"{_CHECK_URL}, and whether its server runs"
    return next((said for kind, said in _TO_CHECK.items() if isinstance(error, kind)), "")


def _hint(order: Order, result: Result, output: str, code: int) -> str:
    """Return how to go on, where something is left."""
    if result.jobs:
        results = f"their results: openai-eval-client batch results {result.jobs}"
        return f"the batches go on; {results if order.cache is None else f'to wait for them: {again()}'}"
    if code == SOME_FAILED and output != "-":
        return f"to ask again for what failed: {again()} --retry-failed"
    if code == 0 or (code == BAD_INPUT and not result.answered):
        return ""
    check = _to_check(result, code)
    if check:
        return f"{check}; then: {again()}" if output != "-" and (result.answered or order.done) else check
    return _to_go_on(order, output)


def _to_go_on(order: Order, output: str) -> str:
    if output == "-":
        return "" if order.cache is None else "what was answered is in the cache: the same command goes on"
    return f"to go on: {again()}"


_BATCH = BatchConfig()


def run(  # one name for each option
    source: opt.Input,
    *,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="Where rows go; - is standard output."),
    ] = "-",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an output: rows that it has are not asked again."),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="With --resume: ask again for rows that failed."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Begin anew, and forget what is in the output."),
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
        typer.Option(min=0, metavar="USD", help="What this run may cost at most; needs --max-tokens."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep answers in this file, and answer from it what it has."),
    ] = None,
    batch: Annotated[
        bool,
        typer.Option("--batch", help="By the Batch API: half the price, within a day."),
    ] = False,
    window: Annotated[
        str,
        typer.Option(help="With --batch: what the provider may take, 24h, or 7d where it has that."),
    ] = _BATCH.completion_window,
    interval: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="With --batch: between two looks."),
    ] = _BATCH.polling_interval,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Of one attempt.")] = None,
    max_retries: Annotated[int | None, typer.Option(min=0, metavar="N", help="Of one row.")] = None,
    base_url: opt.BaseUrl = None,
    key_file: opt.KeyFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; send nothing.")] = False,
    progress: Annotated[bool, typer.Option(help="Show how far it is, on standard error.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell of waits and retries.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Answer a file of prompts, one output row for each."""
    # An output row is the input row with its index (from 0), and the response or
    # the error. Rows are written as they come, each whole, so the output is JSON
    # lines at any time. With --json a summary goes to standard output, or to
    # standard error where the rows go to standard output.
    # Exit codes: 0 all answered; 1 some failed; 2 bad input or usage; 3 budget
    # reached; 4 refused by the server for all (key, model, quota, no server there);
    # 130 interrupted. After Ctrl-C what is in flight may finish for 5 seconds.
    show_log(verbose=verbose)
    quiet = quiet or (as_json and output == "-")  # the summary is then alone on standard error
    with exit_codes():
        _check_usage(output, resume=resume, retry_failed=retry_failed, overwrite=overwrite)
        config = account(
            base_url=base_url,
            key_file=key_file,
            needs_key=not dry_run,
            default_model=model,
            timeout=timeout,
            max_retries=max_retries,
        )
        order = Order(
            config,
            opt.limits(rpm, tpm, max_concurrent),
            Source(source, column=prompt_column, form=form and form.value, limit=limit),
            params=_params(param, schema, api, temperature, max_tokens, system, max_cost),
            cache=cache,
            batch=BatchConfig(auto_batch_threshold=1, completion_window=window, polling_interval=interval),
            farewell="" if output == "-" else f"to go on: {again()}",
            progress=progress and not quiet and not (output == "-" and sys.stdout.isatty()),
        )
        if model is None and not quiet:
            say(f"model: {config.default_model}, the default; --model names another")
        if dry_run:
            if resume:
                _look(output, order, retry_failed=retry_failed, quiet=quiet)
            if cache is not None and not quiet:
                say("the cache is not looked at: answers that it has are estimated as well, but cost nothing")
            _prepare(order, quiet=quiet)
            _show_estimate(complete(estimate_rows(order)), as_json=as_json)
            return
        with _opened(output, order, resume=resume, retry_failed=retry_failed, overwrite=overwrite) as file:
            failed_before = file.failed
            if not quiet:
                say_models(file.models, config.default_model)
            _prepare(order, quiet=quiet)
            work = answer_by_batch if batch else answer_rows
            result = asyncio.run(work(order, file))
        check_some(order, result)
        code = exit_code(result, failed_before)
        sum_up(order, result, output, code, quiet=quiet, as_json=as_json)
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
        order = Order(
            account(needs_key=False, default_model=model),
            opt.limits(rpm, tpm, opt.DEFAULT_CONCURRENT),
            Source(source, column=prompt_column, form=form and form.value, limit=limit),
            params=_params(param, schema, api, None, max_tokens, system, None),
        )
        _prepare(order, quiet=False)
        _show_estimate(complete(estimate_rows(order)), as_json=as_json)


def _check_usage(output: str, *, resume: bool, retry_failed: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValidationError("--resume goes on, --overwrite begins anew: give one of them", field="resume")
    if retry_failed and not resume:
        raise ValidationError("--retry-failed needs --resume", field="retry_failed")
    if resume and output == "-":
        raise ValidationError("--resume needs --output: standard output cannot be read back", field="resume")


def _params(  # noqa: PLR0917  # in the order of the options
    pairs: list[str] | None,
    schema: Path | None,
    api: opt.Api,
    temperature: float | None,
    max_tokens: int | None,
    system: str | None,
    max_cost: float | None,
) -> dict[str, Any]:
    """Return what the client is asked with every row."""
    named = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "system": system,
        "max_cost": max_cost,
        "api": api.value,
    }
    given = opt.chat_params(pairs or [], schema, api)
    twice = sorted(given.keys() & {*named, "model", "timeout"})
    if twice:
        raise ValidationError(f"--param {twice[0]}: there is an option for it", field="param")
    return {**given, **{name: value for name, value in named.items() if value is not None}}


@contextlib.contextmanager
def _opened(
    name: str,
    order: Order,
    *,
    resume: bool,
    retry_failed: bool,
    overwrite: bool,
    only_look: bool = False,
) -> Iterator[Output]:
    """Open the output, and take from it what is done already."""
    if order.source.is_file(name):
        raise ValidationError(f"{name}: is the input as well", field="output")
    file = Output(name)
    try:
        if resume and not file.is_regular:
            raise ValidationError(f"--resume: {name} is no file that can be read back", field="resume")
        if resume:
            order.done = file.done(without_errors=retry_failed, only_look=only_look)
        elif overwrite and file.is_regular:
            file.clear()
        elif not file.is_empty:
            why = "is not empty: --resume goes on with it, --overwrite begins anew"
            raise ValidationError(f"{name}: {why}", field="output")
        yield file
    finally:
        file.close()


def _look(name: str, order: Order, *, retry_failed: bool, quiet: bool) -> None:
    """Take from an output what is done already, and leave it as it is."""
    with _opened(
        name,
        order,
        resume=True,
        retry_failed=retry_failed,
        overwrite=False,
        only_look=True,
    ) as file:
        if not quiet:
            say(f"there already, and not estimated: {len(order.done):,}")
            say_models(file.models, order.config.default_model)


def _prepare(order: Order, *, quiet: bool) -> None:
    """Look at all rows first, where they can be read twice: before anything is paid."""
    if order.source.is_stream:
        return
    found = survey(order)
    order.total = found.rows
    order.progress = order.progress and found.rows > 0
    if not found.rows and not order.done:
        raise ValidationError(f"{order.source.name}: no rows", field="input")
    if found.unsent and not quiet:
        named = ", ".join(sorted(found.unsent))
        say(f"carried to the output, not sent: {named}; options set them for all rows", style="yellow")


def _show_estimate(found: CostEstimate, *, as_json: bool) -> None:
    typer.echo(found.model_dump_json() if as_json else str(found))
