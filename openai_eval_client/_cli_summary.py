"""What `run` says in the end: what came of it, with which exit code, and how to go on."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import openai
import typer

from openai_eval_client._cli_common import BAD_INPUT, INTERRUPTED, SOME_FAILED, code_of, say, sentence
from openai_eval_client._cli_stop import command

if TYPE_CHECKING:
    from openai_eval_client._cli_work import Order, Result


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
        parts.append(
            f"{stats.cost:.4f} USD" + (f" and {stats.unpriced:,} unpriced" if stats.unpriced else "")
        )
        parts += [f"{stats.rate_limited:,} x 429"] if stats.rate_limited else []
    return ", ".join([*parts, f"{result.seconds:.1f} s"])


def _hint(order: Order, result: Result, output: str, code: int) -> str:
    """Return how to go on, where something is left."""
    if result.jobs and order.cache is None:
        return f"the batches go on; their results: openai-eval-client batch results {result.jobs}"
    if result.jobs:
        return f"the batches go on; to wait for them: {again()}"
    if code == SOME_FAILED and output != "-":
        return f"to ask again for what failed: {again()} --retry-failed"
    if code == 0 or (code == BAD_INPUT and not result.answered):
        return ""
    if output == "-":
        return "" if order.cache is None else "what was answered is in the cache: the same command goes on"
    return f"to go on: {again()}"
