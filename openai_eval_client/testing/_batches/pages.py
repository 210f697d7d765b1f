"""Lists, page by page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._errors import ApiError

Json = dict[str, Any]
Query = Mapping[str, str]


def page(items: list[Json], query: Query, *, default: int, most: int) -> Json:
    """The page that `limit` and `after` ask for.

    Raises:
        ApiError: 400 for a limit outside 1 to `most`, or an `after` that is not in the list.
    """
    limit, start = _limit(query.get("limit"), default, most), _start(items, query.get("after"))
    data = items[start : start + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": start + limit < len(items),
    }


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    try:
        limit = int(text)
    except ValueError:
        raise ApiError(
            400, "Invalid type for 'limit': expected an integer.", param="limit", code="invalid_type"
        ) from None
    if 1 <= limit <= most:
        return limit
    side, word, bound = ("below_min", ">=", 1) if limit < 1 else ("above_max", "<=", most)
    raise ApiError(
        400,
        f"Invalid 'limit': integer {side.replace('_', ' ')}imum value. "
        f"Expected a value {word} {bound}, but got {limit} instead.",
        param="limit",
        code=f"integer_{side}_value",
    )


def _start(items: list[Json], after: str | None) -> int:
    if after is None:
        return 0
    for index, item in enumerate(items):
        if item["id"] == after:
            return index + 1
    raise ApiError(400, f"Invalid 'after': no object with id '{after}'.", param="after", code="invalid_value")
