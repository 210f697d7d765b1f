"""The log of the library: one logger, whose records carry fields and never the text of an error."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from openai_eval_client._format import printable

logger = logging.getLogger("openai_eval_client")
_LONGEST_ID = 200  # characters


def debug(text: str, *values: Any, event: str, **fields: Any) -> None:
    """Log a detail of one attempt or wait; see `warn`."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(text, *map(_plain, values), extra=_given(event, fields), stacklevel=2)


def inform(text: str, *values: Any, event: str, **fields: Any) -> None:
    """Log what goes as it should; see `warn`."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(text, *map(_plain, values), extra=_given(event, fields), stacklevel=2)


def warn(text: str, *values: Any, event: str, **fields: Any) -> None:
    """Log what a user may have to look into, as a sentence and as an event with fields; None is left out."""
    logger.warning(text, *map(_plain, values), extra=_given(event, fields), stacklevel=2)


def request_id(headers: Any) -> str | None:
    """Return the server's id of a request; None where there is none, or one too long or not printable."""
    given = None if headers is None else headers.get("x-request-id")
    return given if isinstance(given, str) and given.isprintable() and len(given) <= _LONGEST_ID else None


def _given(event: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"event": event, **{name: _plain(value) for name, value in fields.items() if value is not None}}


def _plain(value: Any) -> Any:
    """Return a value that cannot end the line of a log, nor change a terminal: ids are a server's."""
    is_text = isinstance(value, str | Path | Exception)
    return printable(str(value)).replace("\n", " ") if is_text else value
