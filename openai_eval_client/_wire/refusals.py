"""What a refusal says, whatever shape its body has: code, type, message, and when to come back."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from openai_eval_client._wire.headers import stated_wait
from openai_eval_client._wire.usage import dict_in, dicts_in, text_in

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST = 4096  # characters of a text that are looked at
_DEPTH = 6  # of nesting that is looked at
_DAY = 86_400.0  # seconds
_MILLISECONDS = 1e11  # from here on a date since 1970 is in milliseconds, not seconds
_MESSAGES = ("message", "msg", "error", "errors", "detail", "error_description", "title", "reason")
_CODES = ("code", "status_code")
_TYPES = ("type", "status")
_TAG = re.compile(r"<[^<>]*>|\s+")
_SHORTER = re.compile(r"per[ _-]?(?:min|sec|hour)", re.IGNORECASE)
_DAILY = re.compile(r"per[ _-]?day|daily|\bRPD\b|\bTPD\b", re.IGNORECASE)


class Words(NamedTuple):
    """What a refusal says; each "" where it does not."""

    code: str = ""
    type: str = ""
    message: str = ""  # for a reader
    details: str = ""  # further texts, which may tell what the message does not
    wait: float | None = None  # seconds until it is worth another attempt, as its body states them

    @property
    def text(self) -> str:
        """Message and details."""
        return f"{self.message}\n{self.details}"

    @property
    def is_daily(self) -> bool:
        """Whether it is about an allowance for a day alone."""
        return _DAILY.search(self.text) is not None and _SHORTER.search(self.text) is None


def words_of(body: object) -> Words:
    """Return what the body of a refusal says: decoded JSON of any shape, or a text."""
    if isinstance(body, list):  # as Google sends it
        body = next(iter(dicts_in(body)), {"message": body})
    if not isinstance(body, dict):
        return Words(message=_plain(body))
    fields = body["error"] if isinstance(body.get("error"), dict) else body
    metadata, inner = dict_in(fields.get("metadata")), dict_in(fields.get("innererror"))
    code = _first(fields, _CODES) or _first(inner, _CODES)
    kind = _first(fields, _TYPES) or ("moderation" if isinstance(metadata.get("reasons"), list) else "")
    details = [metadata, fields.get("details"), inner]
    return Words(code, kind, _message(fields), "\n".join(_texts(details))[:_LONGEST], _wait(fields, metadata))


def refusal_wait(headers: Mapping[str, str], words: Words) -> float | None:
    """Return the seconds that a refusal asks to wait: by its headers, its body, its message; else None."""
    wait = stated_wait(headers, words.text)
    return words.wait if wait is None else wait


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of these fields that is a word or a number."""
    values = (fields.get(name) for name in names)
    return next((str(v)[:_LONGEST] for v in values if isinstance(v, str | int) and v not in {"", False}), "")


def _message(value: object, depth: int = _DEPTH) -> str:
    """Return the text for a reader: of an object its message, of a list the first few."""
    if isinstance(value, dict) and depth:
        texts = (_message(value[name], depth - 1) for name in _MESSAGES if value.get(name))
        return next(filter(None, texts), "")
    if isinstance(value, list) and depth:
        return "; ".join(filter(None, (_message(each, depth - 1) for each in value[:3])))
    return _plain(value)


def _plain(value: object) -> str:
    """Return a text without markup, in one line."""
    return _TAG.sub(" ", text_in(value)[:_LONGEST]).strip()


def _texts(value: object, depth: int = _DEPTH) -> list[str]:
    """Return the texts in a value, with the names of the fields that hold them."""
    if isinstance(value, dict) and depth:
        return [f"{name}: {text}" for name, each in value.items() for text in _texts(each, depth - 1)]
    if isinstance(value, list) and depth:
        return [text for each in value[:9] for text in _texts(each, depth - 1)]
    return [text_in(value)[:_LONGEST]] if isinstance(value, str) else []


def _wait(fields: Mapping[str, Any], metadata: Mapping[str, Any]) -> float | None:
    """Return the seconds to wait that stand in a field of the body."""
    delays = [each.get("retryDelay") for each in dicts_in(fields.get("details"))]  # google.rpc.RetryInfo
    stated = {name.lower(): text for name, text in dict_in(metadata.get("headers")).items()}
    delays += [fields.get("retry_after"), metadata.get("retry_after"), metadata.get("retry_after_seconds")]
    headers = [{"retry-after": str(delay).removesuffix("s")} for delay in delays if delay is not None]
    named = ("retry-after", "retry-after-ms")
    headers.append({name: str(stated[name]) for name in named if name in stated})
    waits = [wait for each in headers if (wait := stated_wait(each)) is not None]
    reset = _number(stated.get("x-ratelimit-reset"))
    if not waits and reset is not None and reset > _DAY:  # a date since 1970, as OpenRouter passes it on
        waits.append(max(0.0, (reset / 1000 if reset > _MILLISECONDS else reset) - time.time()))
    return max(waits, default=None)


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def until_midnight() -> float:
    """Return the seconds until the next day begins in UTC."""
    return _DAY - time.time() % _DAY
