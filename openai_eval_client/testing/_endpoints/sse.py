"""Server-sent events."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    """Compact JSON in ASCII, which carries even a lone surrogate."""
    return json.dumps(value, separators=(",", ":")).encode()


def event(data: dict[str, Any], *, named: bool = False) -> bytes:
    """One event, its `event:` line taken from the data's type where `named`."""
    head = f"event: {data['type']}\n".encode() if named else b""
    return head + b"data: " + dumps(data) + b"\n\n"
