"""What `run` says in the end: what came of it, with which exit code, and how to go on."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import openai
import typer

from openai_eval_client._cli_common import (
    BAD_INPUT,
    BUDGET,
    INTERRUPTED,
    SOME_FAILED,
    code_of,
    say,
    sentence,
)
from openai_eval_client._cli_stop import command
from openai_eval_client._failures import Failure
from openai_eval_client._failures_shown import meaning
from openai_eval_client._retry import was_never_sent
from openai_eval_client.costs import usd
from openai_eval_client.errors import QuotaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._cli_work import Order, Result
    from openai_eval_client.models import ClientStats

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
    """Say what came of it, and how to go on.

    Raises:
        OSError: That of the output.
    """
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
    """Warn where no response that is there names the model asked, or a dated version of it.

    Args:
        models: How many responses name which model.
        asked: The model that this run asks.
    """
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
    if isinstance(error, openai.OpenAIError) and was_never_sent(error):
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
