"""The log of the library: one logger, records with fields, never the text of an error."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("openai_eval_client")

_LONGEST_ID = 200


def debug(text: str, *values: Any, event: str, **fields: Any) -> None:
    """Log what is of interest to who looks closely; see `warn`."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(text, *values, extra=_known(event, fields), stacklevel=2)


def inform(text: str, *values: Any, event: str, **fields: Any) -> None:
    """Log what is as it should be; see `warn`."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(text, *values, extra=_known(event, fields), stacklevel=2)


def warn(text: str, *values: Any, event: str, **fields: Any) -> None:
    """Log what somebody may have to look into."""
    logger.warning(text, *values, extra=_known(event, fields), stacklevel=2)


def request_id(headers: Any) -> str | None:
    """Return what the server calls a request; None where it says nothing that could be a name."""
    name = None if headers is None else headers.get("x-request-id")
    return name if isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_ID else None


def _known(event: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"event": event, **{name: value for name, value in fields.items() if value is not None}}
