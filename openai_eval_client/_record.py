"""What all that is handed out can do: become plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Any

from pydantic import BaseModel


class Record(BaseModel):
    """A model that programs pass on."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that every JSON parser, data frame and database takes.

        `model_dump()` keeps Python's types, and `model_dump(mode="json")` makes a text of a `Decimal`. Here
        amounts of money are floats, times are ISO 8601 texts, and numbers that JSON does not have (infinite,
        or none) are None.
        """
        plain: dict[str, Any] = _plain(self.model_dump())
        return plain


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.isoformat() if isinstance(value, date) else value
