"""Keys stay out of what is kept and shown: of errors, their causes and frames, of replies and batches."""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from openai_eval_client._format import to_json
from openai_eval_client._wire.failures import headers_of
from openai_eval_client._wire.usage import read_json
from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

E = TypeVar("E", bound=BaseException)

_SHOWN = "[key]"
_SHORTEST = 6  # characters of a key; shorter ones are placeholders, and stand in ordinary words
_LONG = 20  # characters from which a key stands in no answer by chance
_PREFIX = 16  # characters by which a long key is known that was cut
_CREDENTIAL = re.compile(
    r"auth|(?:key|token|secret|cookie|passw\w*|credential|signature|jwt)s?$", re.IGNORECASE
)
_NO_CREDENTIAL = "idempotency-key"
_ID = "x-request-id"


def is_credential(name: str) -> bool:
    """Return whether a header, or a query parameter, of this name holds a key."""
    return _CREDENTIAL.search(name) is not None and name.lower() != _NO_CREDENTIAL


def secrets_in(headers: Mapping[str, str]) -> Iterator[str]:
    """Yield the keys and tokens that headers carry."""
    for name, value in headers.items():
        if is_credential(name):
            yield value.rpartition(" ")[2]  # what follows the scheme
            if "cookie" in name.lower():
                yield from (pair.partition("=")[2].strip() for pair in value.split(";"))


def forget_key(error: E, *keys: str) -> E:
    """Take keys, also those that its request carried, out of an error and its causes; return the error."""
    errors = list(_with_causes(error))
    requests = {id(request): request for each in errors for request in _requests_of(each)}.values()
    pattern = _pattern(frozenset(keys).union(*map(_carried_by, requests)))
    for each in errors:
        _clear_frames(each)
        if pattern is not None:
            _mask_fields(each, pattern)
    for each in errors:
        for link in ("__cause__", "__context__"):  # some errors keep their text where it cannot be changed
            if pattern is not None and pattern.search(str(getattr(each, link))):
                setattr(each, link, None)
    for request in requests:
        _strip(request)
    return error


def masked(value: Any, *keys: str) -> Any:
    """Return decoded JSON, or an object of the SDK, without keys."""
    pattern = _pattern(frozenset(keys))
    return value if pattern is None else _masked(value, pattern)


def without_echo(reply: Any, key: str, headers: Mapping[str, str]) -> Any:
    """Return a reply that repeats neither the key nor one of the request's own headers."""
    # Only a long key: a short one may stand in an answer by chance, which is left as it is.
    for secret in (key, *secrets_in(headers)) if headers else (key,):
        echoed = secret.encode() in reply.content or secret in reply.headers.get(_ID, "")
        if echoed and len(secret) >= _LONG:
            reply = _masked_reply(reply, _pattern(frozenset([secret])))
    return reply


def without_key(text: bytes, key: str) -> bytes:
    """Return an answer that does not repeat a long key; a short one may stand in it by chance."""
    shown = len(key) >= _LONG and key.encode() in text
    return text.replace(key.encode(), _SHOWN.encode()) if shown else text


def clear_frames(error: E) -> E:
    """Drop the variables of our frames and of libraries', which hold headers, from an error's tracebacks."""
    for each in _with_causes(error):
        _clear_frames(each)
    return error


def _clear_frames(error: BaseException) -> None:
    trace = error.__traceback__
    while trace is not None:
        if _is_library(trace.tb_frame.f_code.co_filename):
            with contextlib.suppress(RuntimeError):  # it is not done yet
                trace.tb_frame.clear()
        trace = trace.tb_next


_LIBRARIES = ("<frozen", str(Path(os.__file__).parent), str(Path(__file__).parents[1]))


_SENDERS = re.compile(r"[/\\](?:aiohttp|anyio|async_timeout|httpcore2?|httpx2?|httpx_aiohttp|openai)[/\\]")


@functools.lru_cache(maxsize=1024)
def _is_sender(path: str) -> bool:
    """Return whether it is code of ours, of Python or of a library that sends our requests."""
    in_python = path.startswith(_LIBRARIES) and "-packages" not in path
    return in_python or path.startswith(_LIBRARIES[-1]) or _SENDERS.search(path) is not None


@functools.lru_cache(maxsize=1024)
def _is_library(path: str) -> bool:
    return path.startswith(_LIBRARIES) or "site-packages" in path or "dist-packages" in path


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that led to it, each once, but no error that the caller is handling."""
    seen: set[int] = set()
    left: list[Any] = [error]
    while left:
        each = left.pop()
        if not isinstance(each, BaseException) or id(each) in seen:
            continue
        trace = each.__traceback__
        if each is not error and trace and not _is_sender(trace.tb_frame.f_code.co_filename):
            continue  # caught by the caller's code, which may go on
        seen.add(id(each))
        yield each
        left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ()), *_fields(each).values()]


# --- what an error holds -----------------------------------------------------------------------------------


def _fields(error: BaseException) -> dict[str, Any]:
    return getattr(error, "__dict__", {})  # those written in C have none


def _requests_of(error: BaseException) -> Iterator[Any]:
    """Yield the HTTP requests that an error names, those before a redirect too."""
    fields = _fields(error)
    response = fields.get("response")
    answers = [response, *getattr(response, "history", ())]
    named = [
        fields.get("request"),
        fields.get("_request"),
        *(vars(each).get("_request") for each in answers if each),
    ]
    yield from (request for request in named if hasattr(request, "headers"))


def _carried_by(request: Any) -> list[str]:
    params = getattr(request.url, "params", {})
    return [*secrets_in(request.headers), *(params[name] for name in params if is_credential(name))]


def _strip(request: Any) -> None:
    """Take the credentials out of a request that is done."""
    for name in [name for name in request.headers if is_credential(name)]:
        del request.headers[name]
    if any(map(is_credential, getattr(request.url, "params", ()))):
        request.url = request.url.copy_with(query=None)


def _mask_fields(error: BaseException, pattern: re.Pattern[str]) -> None:
    fields = _fields(error)
    for name, value in list(fields.items()):
        is_reply = hasattr(value, "status_code") and hasattr(value, "headers")
        fields[name] = _masked_reply(value, pattern) if is_reply else _masked(value, pattern)
    error.args = _masked(error.args, pattern)


def _masked_reply(reply: Any, pattern: Any) -> Any:
    """Return a reply without keys: its headers say how long to wait, and whether to try again."""
    headers = [(name, pattern.sub(_SHOWN, text)) for name, text in headers_of(reply)]
    try:
        content = _masked_body(reply.content, pattern)
    except sdk_httpx().StreamError:  # it was not read
        reply.headers = sdk_httpx().Headers(headers)
        reply.history = []
        return reply
    if content == reply.content and headers == headers_of(reply) and not reply.history:
        return reply
    request = vars(reply).get("_request")
    return sdk_httpx().Response(reply.status_code, headers=headers, content=content, request=request)


def _masked_body(content: bytes, pattern: re.Pattern[str]) -> bytes:
    content = pattern.sub(_SHOWN, content.decode("latin-1")).encode("latin-1")  # which keeps every byte
    if b"\\" in content:  # what is escaped does not look like itself
        with contextlib.suppress(ValueError, RecursionError):
            body = read_json(content)
            plain = _masked(body, pattern)
            return content if plain == body else to_json(plain)
    return content


def _masked(value: Any, pattern: re.Pattern[str], depth: int = 99) -> Any:
    """Return a value without keys; what it holds beyond some depth is left out."""
    if isinstance(value, str):
        return pattern.sub(_SHOWN, value)
    if isinstance(value, dict | list | tuple) and not depth:
        return None
    if isinstance(value, dict):
        return {_masked(key, pattern): _masked(item, pattern, depth - 1) for key, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(_masked(item, pattern, depth - 1) for item in value)
    if isinstance(value, BaseModel) and pattern.search(repr(value)):
        for fields in filter(None, (value.__dict__, value.__pydantic_extra__)):
            fields.update(_masked(dict(fields), pattern, depth - 1))
    return value


# --- how a key may look ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """Return a pattern of all forms of these keys; None where none is long enough."""
    flags = re.IGNORECASE | re.ASCII
    forms = {form for secret in secrets if len(secret) >= _SHORTEST for form in _forms(secret)}
    return re.compile("|".join(sorted(forms, key=len, reverse=True)), flags) if forms else None


def _forms(secret: str) -> Iterator[str]:
    """Yield patterns of a key: itself, quoted for URLs, HTML or JSON, in base64 with what surrounds it."""
    texts = [secret, quote(secret, safe=""), html.escape(secret), json.dumps(secret)[1:-1]]
    for before in range(3):  # bytes, modulo 3
        size = before + len(secret)
        coded = base64.b64encode(bytes(before) + secret.encode()).decode()[
            -(-before * 8 // 6) : size * 8 // 6
        ]
        texts += [coded, coded.replace("+", "-").replace("/", "_")]
    for text in texts:
        yield re.escape(text)
        if len(secret) >= _LONG:  # it may have been cut
            yield re.escape(text[:_PREFIX]) + r"[\w.~%+/=-]*"
