"""Options that several commands have, and what becomes of them."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openai_eval_client.config import OpenAIConfig, RateLimitConfig
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIMITS = RateLimitConfig()
_DEFAULT_MODEL = OpenAIConfig.model_fields["default_model"].default


class Api(str, Enum):
    """The endpoints that a request may be for."""

    chat = "chat"
    responses = "responses"


class Form(str, Enum):
    """The forms of an input."""

    jsonl = "jsonl"
    csv = "csv"
    tsv = "tsv"


Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="JSON lines or CSV, - for standard input. A line is a text, or an object with prompt or "
        "messages; its other keys are carried to the output.",
    ),
]
PromptColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="The key or column of the prompt. (default: prompt)")
]
FormOption = Annotated[
    Form | None, typer.Option("--format", help="Of the input; by default as its name ends, else jsonl.")
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N rows only.")]
Model = Annotated[str | None, typer.Option(help=f"The model to ask. (default: {_DEFAULT_MODEL})")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt for all rows.")]
Schema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A JSON schema that the answers are to fit (structured outputs)."),
]
Temperature = Annotated[float | None, typer.Option(min=0, help="Not sent unless given.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, metavar="N", help="Output tokens at most, of a row.")]
ApiOption = Annotated[Api, typer.Option("--api", help="Chat completions, or the Responses API.")]
Params = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="KEY=JSON",
        help="Any other parameter of the API, such as seed=7 or stop='[\"END\"]'; repeatable.",
    ),
]
Rpm = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Requests per minute; 0: as the server says (see limits)."),
]
Tpm = Annotated[
    int, typer.Option(min=0, metavar="N", help="Tokens per minute; 0: as the server says (see limits).")
]
MaxConcurrent = Annotated[int, typer.Option(min=1, metavar="N", help="Requests in flight at once.")]
BaseUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="The API's address, up to /v1. (default: OPENAI_BASE_URL)")
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", metavar="FILE", help="A file with the key. (default: OPENAI_API_KEY)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Say it as a JSON object.")]

DEFAULT_RPM, DEFAULT_TPM = _LIMITS.requests_per_minute or 0, _LIMITS.tokens_per_minute or 0
DEFAULT_CONCURRENT = _LIMITS.max_concurrent


def limits(rpm: int, tpm: int, max_concurrent: int) -> RateLimitConfig:
    """Return the limits; 0 stands for what the server says."""
    return RateLimitConfig(
        requests_per_minute=rpm or None, tokens_per_minute=tpm or None, max_concurrent=max_concurrent
    )


def chat_params(pairs: Sequence[str], schema: Path | None, api: Api) -> dict[str, Any]:
    """Return the parameters that --param and --schema name.

    Raises:
        OSError: The schema cannot be read.
        ValidationError: A pair is none, or the schema is none.
    """
    params: dict[str, Any] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or not key or key in params:
            why = "given before" if key in params else "not KEY=JSON"
            raise ValidationError(f"--param {text!r}: {why}", field="param")
        params[key] = _value(text, value)
    if schema is not None:
        params["response_format"] = _format(schema, api)
    return params


def _value(text: str, value: str) -> Any:
    """Return the JSON value, or the text itself where it does not look like JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        if value[:1] in {"{", "[", '"'}:
            raise ValidationError(f"--param {text!r}: not JSON: {error}", field="param") from None
        return value


def _format(path: Path, api: Api) -> dict[str, Any]:
    """Return the response_format of a schema: strict, unless the file says itself how it is to be taken."""
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
    if api is Api.responses:
        return {"type": "json_schema", **schema}
    return {"type": "json_schema", "json_schema": schema}
