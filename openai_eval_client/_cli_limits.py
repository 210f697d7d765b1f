"""The command that asks the server what this key's limits are."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import openai
import typer

from openai_eval_client import _cli_options as opt
from openai_eval_client import _cli_tables
from openai_eval_client._cli_common import account, exit_codes, say, show_log
from openai_eval_client._cli_stop import with_client
from openai_eval_client._headers import DIMENSIONS, read_quotas
from openai_eval_client.config import RateLimitConfig

if TYPE_CHECKING:
    from openai_eval_client._headers import Quota
    from openai_eval_client.client import OpenAIClient

_FREE = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
_QUESTION: Any = [{"role": "user", "content": "hi"}]
_BRIEFLY: tuple[dict[str, int], ...] = ({"max_tokens": 1}, {"max_completion_tokens": 16})


def limits(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="The model to ask about; repeatable.")
    ] = None,
    *,
    base_url: opt.BaseUrl = None,
    key_file: opt.KeyFile = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show this key's limits, as the server states them: sends a request of one word for each model.

    Exit codes: 0 asked; 2 bad usage; 4 refused by the server.
    """
    show_log()
    with exit_codes():
        config = account(base_url=base_url, key_file=key_file)
        asked = models or [config.default_model]
        found = with_client(config, lambda client: _ask(client, asked), rate_limit=_FREE)
        if as_json:
            typer.echo(json.dumps({name: _plain(quotas) for name, quotas in found.items()}))
        else:
            _cli_tables.show_limits(found)
        for name, quotas in found.items():
            if not quotas:
                say(f"{name}: the server states no limits; --rpm and --tpm set them")


async def _ask(client: OpenAIClient, models: list[str]) -> dict[str, dict[str, Quota]]:
    return {model: read_quotas(await _headers(client, model)) for model in models}


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
        if not read_quotas(error.response.headers):
            raise
        return error.response.headers


def _plain(quotas: dict[str, Quota]) -> dict[str, Any]:
    return {name: dataclasses.asdict(quotas[name]) for name in DIMENSIONS if name in quotas}
