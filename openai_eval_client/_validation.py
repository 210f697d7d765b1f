"""Reject bad input, naming field and value, before anything is sent."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")

_UNITS = {"h": 3600, "d": 86_400}
_SHOWN = 80  # characters of a value: one line of a terminal


def reject_input(
    name: str, value: object, why: str, *, field: str | None = None, index: int | None = None
) -> NoReturn:
    """Raise the ValidationError for `name=value: why`."""
    raise ValidationError(f"{name}={shown(value)}: {why}", field=field or name, index=index)


def shown(value: object) -> str:
    """Return the repr of a value, cut to one line; the first digits of a very long number."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int beyond the limit on digits; a list a million deep
        text = f"<{type(value).__name__}>"
        if isinstance(value, int):
            digits = int(value.bit_length() * math.log10(2))
            text = f"{value // 10 ** (digits - 20)}..."
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def config_of(name: str, given: T | None, kind: type[T]) -> T:
    """Return a config as given, or the default one for None; reject anything else, without showing it."""
    if given is None:
        return kind()
    if not isinstance(given, kind):
        why = f"{name}: must be of class {kind.__name__}, not {type(given).__name__}"
        raise ValidationError(why, field=name)
    return given


def check_text(text: object, name: str, *, field: str | None = None, index: int | None = None) -> None:
    """Reject anything but a str that is not blank and holds no half of a surrogate pair."""
    where = field or name
    if not isinstance(text, str):
        reject_input(name, text, f"must be a str, not {type(text).__name__}", field=where, index=index)
    if not text or text.isspace():
        reject_input(name, text, "must not be empty or blank", field=where, index=index)
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        why = f"lone surrogate {text[error.start]!r} at position {error.start}: not valid Unicode"
        raise ValidationError(f"{name}: {why}", field=where, index=index) from None


def check_number(value: object, name: str, *, above: float | None = None, least: float | None = None) -> None:
    """Reject anything but a finite number within its bound."""
    why = f"must be a finite number, {f'{least} or more' if above is None else f'greater than {above}'}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        reject_input(name, value, f"{why}, not {type(value).__name__}")
    fits = (above is None or value > above) and (least is None or value >= least)
    if not fits or not abs(value) <= sys.float_info.max:  # also an int that no float holds, and nan
        reject_input(name, value, why)


def check_cost(value: object, name: str) -> None:
    """Reject anything but an amount of money, 0 or more."""
    if not isinstance(value, Decimal):
        check_number(value, name, least=0)
    elif not value.is_finite() or value < 0:
        reject_input(name, value, "must be a finite number, 0 or more")


def check_count(value: object, name: str) -> None:
    """Reject anything but a whole number of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        reject_input(name, value, "must be a whole number, 1 or more")


def check_window(value: object, name: str) -> None:
    """Reject anything but a completion window."""
    if not isinstance(value, str) or not re.fullmatch(r"[1-9]\d{0,4}[hd]", value, re.ASCII):
        reject_input(name, value, "must be hours or days, such as '24h' or '7d'")


def window_seconds(window: str) -> int:
    """Return the length of a completion window in seconds."""
    return int(window[:-1]) * _UNITS[window[-1]]


def check_callback(value: object, name: str) -> None:
    """Reject what cannot be called with one number; None is no callback."""
    if value is None:
        return
    if not callable(value):
        reject_input(name, value, "must be callable")
    try:
        inspect.signature(value).bind(0.5)
    except TypeError as error:
        reject_input(name, value, f"must take one number, the finished fraction: {error}")
    except ValueError:  # some built-in functions have no signature
        return


def check_switch(value: object, name: str) -> None:
    """Reject anything but True and False."""
    if not isinstance(value, bool):
        reject_input(name, value, "must be True or False; pass a function as progress_callback")


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    """Reject anything but one of a few texts."""
    if value not in choices:
        reject_input(name, value, f"must be {' or '.join(map(repr, choices))}")


def check_event(value: object, name: str) -> None:
    """Reject anything but an event of asyncio or None."""
    if value is not None and not isinstance(value, asyncio.Event):
        reject_input(name, value, "must be an asyncio.Event")


def check_mapping(value: object, name: str) -> None:
    """Reject anything but a dict with str keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        reject_input(name, value, "must be a dict with str keys")


def check_headers(headers: Mapping[str, Any], name: str) -> None:
    """Reject anything but headers that HTTP may carry."""
    check_mapping(headers, name)
    for key, value in headers.items():
        if not isinstance(value, str) or not is_header_text(f"{key}{value}"):
            reject_input(name, {key: value}, "a header's name and value must be printable ASCII")


def is_header_text(text: str) -> bool:
    """Return whether an HTTP header may carry a text, printable ASCII (RFC 9110, section 5.5)."""
    return text.isascii() and text.isprintable()


def check_json(values: Mapping[str, Any], *, field: str | None = None, index: int | None = None) -> None:
    """Reject what cannot be written as JSON in UTF-8."""
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = f"{name}: holds a lone surrogate: not valid Unicode"
        except (TypeError, ValueError, RecursionError) as error:
            message = f"{name}={shown(value)}: not valid JSON: {error}"
        else:
            continue
        raise ValidationError(message, field=field or name, index=index)
