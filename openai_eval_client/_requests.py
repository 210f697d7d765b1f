"""From a prompt and its parameters to the body of a request, with everything wrong found before sending."""

from __future__ import annotations

import functools
import inspect
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai
from pydantic import BaseModel

from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PATHS = {"chat": "/chat/completions", "responses": "/responses"}
_OURS = {"self", "messages", "input", "model", "stream", "stream_options", "timeout", "background"}


@dataclass(frozen=True, slots=True)
class Parameters:
    """What all prompts of one call share, checked.

    Attributes:
        api: "chat" or "responses".
        model: The model asked.
        timeout: Seconds for one attempt.
        body: The body, all but the prompt.
        system: The system prompt, where there is one.
        temperature: As sent; None: not sent.
        schema: The pydantic class the answer is to fit.
        headers: Extra HTTP headers.
        query: Extra query parameters.
    """

    api: str
    model: str
    timeout: float
    body: dict[str, Any]
    system: str | None = None
    temperature: float | None = None
    schema: type[BaseModel] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, object] = field(default_factory=dict)

    def with_prompt(self, prompt: str | Sequence[Any]) -> dict[str, Any]:
        """Return the whole body for one prompt, which must have passed `check_prompt`."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _plain(prompt)
        if self.api == "responses":
            return {**self.body, "input": prompt if isinstance(prompt, str) else messages}
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        return {**self.body, "messages": messages}


def check_parameters(  # one argument for each parameter of the specification
    *,
    model: str,
    timeout: float,
    temperature: float | None,
    max_tokens: int | None,
    system: str | None,
    api: str,
    params: Mapping[str, Any],
) -> Parameters:
    """Check the parameters of a call.

    Args:
        model: The model asked.
        timeout: Seconds for one attempt.
        temperature: Sampling temperature; None: not sent.
        max_tokens: Output tokens at most; None: not sent.
        system: The system prompt.
        api: "chat" or "responses".
        params: Everything else, for the API as it is; None values are not sent.

    Returns:
        What all prompts of the call share.

    Raises:
        ValidationError: Names the parameter and its value.
    """
    if api not in PATHS:
        raise ValidationError(f"api={api!r}: must be 'chat' or 'responses'", field="api")
    _check_text(model, "model")
    _check_number(timeout, "timeout", above=0)
    if temperature is not None:
        _check_number(temperature, "temperature", least=0)
    if max_tokens is not None:
        _check_count(max_tokens, "max_tokens")
    if system is not None:
        _check_text(system, "system")
    given = {name: value for name, value in params.items() if value is not None}
    _check_names(given, api)
    options = {name: given.pop(f"extra_{name}", {}) for name in ("body", "headers", "query")}
    schema = _take_schema(given, api)
    named = _named(api, model=model, temperature=temperature, max_tokens=max_tokens, system=system)
    body = {**named, **given, **options["body"]}
    _check_json(body)
    return Parameters(
        api=api,
        model=model,
        timeout=float(timeout),
        body=body,
        system=system,
        temperature=temperature,
        schema=schema,
        headers=options["headers"],
        query=options["query"],
    )


def check_prompt(prompt: object, index: int | None = None) -> None:
    """Refuse a prompt that no API would take.

    Args:
        prompt: A text, or a list of chat messages.
        index: Its position in the list of prompts, where there is one.

    Raises:
        ValidationError: It is empty, blank, of another type, or holds half a surrogate pair.
    """
    name = "prompt" if index is None else f"prompts[{index}]"
    if isinstance(prompt, str):
        _check_text(prompt, name, index)
    elif isinstance(prompt, list | tuple):
        _check_messages(prompt, name, index)
    else:
        kind = type(prompt).__name__
        message = f"{name}={_short(prompt)}: must be a str or a list of messages, not {kind}"
        raise ValidationError(message, field="prompt", index=index)


def _check_messages(messages: Sequence[Any], name: str, index: int | None) -> None:
    if not messages:
        raise ValidationError(f"{name}=[]: must hold at least one message", field="prompt", index=index)
    plain = _plain(messages)
    for position, message in enumerate(plain):
        if not isinstance(message, dict) or not isinstance(message.get("role", message.get("type")), str):
            text = f"{name}[{position}]={_short(message)}: must be a message with a role"
            raise ValidationError(text, field="prompt", index=index)
    _check_json({name: plain}, index)


def _check_text(text: object, name: str, index: int | None = None) -> None:
    where = name.partition("[")[0].removesuffix("s") if index is not None else name
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValidationError(f"{name}={_short(text)}: must be a str, not {kind}", field=where, index=index)
    if not text or text.isspace():
        raise ValidationError(f"{name}={_short(text)}: must not be empty or blank", field=where, index=index)
    _check_unicode(text, name, where, index)


def _check_unicode(text: str, name: str, where: str, index: int | None) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        message = f"{name}: lone surrogate {text[error.start]!r} at position {error.start}: not valid Unicode"
        raise ValidationError(message, field=where, index=index) from None


def _check_number(
    value: object, name: str, *, above: float | None = None, least: float | None = None
) -> None:
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (above is None or value > above)
        and (least is None or value >= least)
    )
    if not fits:
        bound = f"greater than {above}" if above is not None else f"{least} or more"
        raise ValidationError(f"{name}={_short(value)}: must be a finite number, {bound}", field=name)


def _check_count(value: object, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValidationError(f"{name}={_short(value)}: must be a whole number, 1 or more", field=name)


def check_max_concurrent(value: int | None) -> None:
    """Refuse a concurrency bound that is not a whole number of 1 or more.

    Raises:
        ValidationError: Names the value.
    """
    if value is not None:
        _check_count(value, "max_concurrent")


def _check_names(given: Mapping[str, Any], api: str) -> None:
    if "stream" in given:
        raise ValidationError(
            f"stream={given['stream']!r}: not here; stream with client.openai.chat.completions.create",
            field="stream",
        )
    for name in given:
        if name not in _known_names(api):
            message = (
                f"{name}={_short(given[name])}: not a parameter; send it with extra_body={{{name!r}: ...}}"
            )
            raise ValidationError(message, field=name)
    if "n" in given:
        _check_count(given["n"], "n")


@functools.cache
def _known_names(api: str) -> frozenset[str]:
    """Return the parameters that the installed SDK knows."""
    from openai.resources.chat import AsyncCompletions  # noqa: PLC0415  # heavy: only when a call is made
    from openai.resources.responses import AsyncResponses  # noqa: PLC0415

    resource: Any = AsyncCompletions if api == "chat" else AsyncResponses
    return frozenset(inspect.signature(resource.create).parameters) - _OURS | {"response_format"}


def _named(
    api: str, *, model: str, temperature: float | None, max_tokens: int | None, system: str | None
) -> dict[str, Any]:
    """Return the specification's parameters by the names that the API has for them."""
    limit = "max_tokens" if api == "chat" else "max_output_tokens"
    instructions = system if api == "responses" else None
    values = {"model": model, "temperature": temperature, limit: max_tokens, "instructions": instructions}
    return {name: value for name, value in values.items() if value is not None}


def _take_schema(given: dict[str, Any], api: str) -> type[BaseModel] | None:
    """Replace a pydantic class given as response_format by its JSON schema, and return the class."""
    wanted = given.pop("response_format", None)
    is_class = isinstance(wanted, type) and issubclass(wanted, BaseModel)
    form = _schema_of(wanted) if is_class else wanted
    if form is None:
        return None
    if api == "chat":
        given["response_format"] = {"type": "json_schema", "json_schema": form} if is_class else form
    else:
        given["text"] = {
            **given.get("text", {}),
            "format": {"type": "json_schema", **form} if is_class else form,
        }
    return wanted if is_class else None


def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    strict: Any = openai.pydantic_function_tool(model)["function"]["parameters"]
    return {"name": model.__name__, "schema": strict, "strict": True}


def _check_json(values: Mapping[str, Any], index: int | None = None) -> None:
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = f"{name}: holds a lone surrogate: not valid Unicode"
        except (TypeError, ValueError) as error:
            message = f"{name}={_short(value)}: not valid JSON: {error}"
        else:
            continue
        raise ValidationError(message, field="prompt" if index is not None else name, index=index)


def _plain(value: Any) -> Any:
    """Return messages as plain JSON: the SDK's own message objects are taken too."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."  # noqa: PLR2004  # one line of a terminal
