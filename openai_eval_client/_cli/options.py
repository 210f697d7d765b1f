"""The options that several commands have, and the settings made of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from openai_eval_client.config import BatchConfig, OpenAIConfig, RateLimitConfig
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterable

_LIMITS, _BATCH = RateLimitConfig(), BatchConfig()
DEFAULT_RPM, DEFAULT_TPM = _LIMITS.requests_per_minute or 0, _LIMITS.tokens_per_minute or 0
DEFAULT_CONCURRENT = _LIMITS.max_concurrent
DEFAULT_WINDOW, DEFAULT_INTERVAL = _BATCH.completion_window, _BATCH.polling_interval
DEFAULT_MODEL = OpenAIConfig.model_fields["default_model"].default

Api = Literal["chat", "responses"]
Form = Literal["jsonl", "csv", "tsv"]

Input = Annotated[
    str,
    Argument(
        metavar="INPUT",
        help="A file of JSON lines, CSV or TSV; - is standard input. A line of JSON is a text, or an object "
        "with prompt or messages, whose other keys are copied to the output.",
    ),
]
PromptColumn = Annotated[
    str | None, Option(metavar="NAME", help="The key or column of the prompt. (default: prompt or messages)")
]
FormOption = Annotated[
    Form | None, Option("--format", help="The input's format. (default: as the file's name ends, else jsonl)")
]
Limit = Annotated[int | None, Option(min=1, metavar="N", help="Only the first N rows. (default: all)")]
Model = Annotated[str | None, Option(help=f"The model to ask. (default: {DEFAULT_MODEL})")]
System = Annotated[str | None, Option(metavar="TEXT", help="A system prompt for all rows. (default: none)")]
Schema = Annotated[
    Path | None,
    Option(metavar="FILE", help="The JSON schema that answers must fit: structured outputs. (default: none)"),
]
Temperature = Annotated[float | None, Option(min=0, help="Sampling temperature. (default: the API's)")]
MaxTokens = Annotated[
    int | None, Option(min=1, metavar="N", help="Output tokens of an answer at most. (default: the API's)")
]
ApiOption = Annotated[Api, Option("--api", help="Chat completions, or the Responses API.")]
Params = Annotated[
    list[str] | None,
    Option(
        "--param",
        metavar="KEY=JSON",
        help="Any other parameter of the API, such as seed=7; may be repeated. (default: none)",
    ),
]
Rpm = Annotated[int, Option(min=0, metavar="N", help="Requests per minute; 0: as many as the server states.")]
Tpm = Annotated[int, Option(min=0, metavar="N", help="Tokens per minute; 0: as many as the server states.")]
MaxConcurrent = Annotated[int, Option(min=1, metavar="N", help="Requests in flight at most.")]
BaseUrl = Annotated[
    str | None,
    Option(metavar="URL", help="The API's address, up to /v1. (default: OPENAI_BASE_URL, or OpenAI's)"),
]
KeyFile = Annotated[
    Path | None,
    Option(
        "--api-key-file", metavar="FILE", help="A file with the API key. (default: the key in OPENAI_API_KEY)"
    ),
]
OutputFile = Annotated[
    str, Option("--output", "-o", metavar="FILE", help="Where to write rows; - is standard output.")
]
Cache = Annotated[
    Path | None,
    Option(
        metavar="FILE", help="Keep answers and batches in this file, and use those it has. (default: none)"
    ),
]
Window = Annotated[str, Option(metavar="TIME", help="The time limit of a batch, such as 24h or 7d.")]
Interval = Annotated[float, Option(metavar="SECONDS", help="Time between two looks at a batch.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of text.")]


def api_config(
    *, base_url: str | None = None, key_file: Path | None = None, needs_key: bool = True, **fields: Any
) -> OpenAIConfig:
    """Return where the API is, and with which key it is asked."""
    given = {"base_url": base_url, **fields}
    if key_file is not None:
        given["api_key"] = key_file.expanduser().read_text("utf-8").strip()
    elif not needs_key and not os.environ.get("OPENAI_API_KEY"):
        given["api_key"] = "none"
    return OpenAIConfig(**{name: value for name, value in given.items() if value is not None})


def rate_limit(rpm: int, tpm: int, max_concurrent: int = DEFAULT_CONCURRENT) -> RateLimitConfig:
    """Return the limits; 0 stands for what the server states."""
    return RateLimitConfig(
        requests_per_minute=rpm or None, tokens_per_minute=tpm or None, max_concurrent=max_concurrent
    )


def split_pairs(option: str, texts: Iterable[str], form: str) -> dict[str, str]:
    """Return the keys and values of an option that is repeated, such as KEY=VALUE."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or key in pairs:
            why = f"{key} was given before" if key in pairs else f"not {form}"
            raise ValidationError(f"{option} {text!r}: {why}", field=option.removeprefix("--"))
        pairs[key] = value
    return pairs


def request_params(pairs: Iterable[str], schema: Path | None, api: Api, **named: Any) -> dict[str, Any]:
    """Return what the client is asked with every row: --param, --schema, and the options for the rest."""
    params: dict[str, Any] = {
        key: _value(key, text) for key, text in split_pairs("--param", pairs, "KEY=JSON").items()
    }
    if schema is not None:
        params["response_format"] = _response_format(schema, api)
    named["api"] = api
    twice = sorted(params.keys() & {*named, "max_cost", "model", "temperature", "timeout"})
    if twice:
        raise ValidationError(f"--param {twice[0]}: there is an option for it", field="param")
    return {**params, **{name: value for name, value in named.items() if value is not None}}


def _value(key: str, text: str) -> Any:
    """Return the JSON value, or the text itself if it does not look like JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text[:1] in {"{", "[", '"'}:
            raise ValidationError(f"--param {f'{key}={text}'!r}: not JSON: {error}", field="param") from None
        return text


def _response_format(path: Path, api: Api) -> dict[str, Any]:
    """Return the response_format for a schema: strict, unless the file itself says otherwise."""
    try:
        schema = json.loads(path.expanduser().read_text("utf-8"))
    except ValueError as error:
        raise ValidationError(f"{path}: not JSON: {error}", field="schema") from None
    if not isinstance(schema, dict):
        raise ValidationError(f"{path}: must be a JSON object", field="schema")
    if isinstance(schema.get("json_schema"), dict):
        schema = schema["json_schema"]
    if not isinstance(schema.get("schema"), dict):
        name = re.sub(r"[^a-zA-Z0-9_-]+", "_", str(schema.get("title") or path.stem))[:64]
        schema = {"name": name, "schema": schema, "strict": True}
    if api == "responses":
        return {"type": "json_schema", **schema}
    return {"type": "json_schema", "json_schema": schema}
