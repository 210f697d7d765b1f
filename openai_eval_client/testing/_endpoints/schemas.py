"""A small instance of a JSON schema, for structured outputs and tool calls.

Only required properties are made, within their bounds; `pattern` is ignored.
"""

from __future__ import annotations

import math
from typing import Any

from .._faults import ApiError

Schema = dict[str, Any]
DEEPEST = 60
FORMATS = {
    "date-time": "2000-01-01T00:00:00Z", "date": "2000-01-01", "time": "00:00:00Z", "duration": "PT0S",
    "email": "a@example.com", "hostname": "example.com", "ipv4": "127.0.0.1", "ipv6": "::1",
    "uri": "https://example.com", "uuid": "00000000-0000-4000-8000-000000000000",
}  # fmt: skip


def minimal(schema: Any) -> Any:
    """Return a small instance of a schema; raise a 400 if the schema refers to nothing or never ends."""
    return _Maker(schema).make(schema, 0)


class _Maker:
    """Makes instances; knows the root that references point into."""

    def __init__(self, root: Any) -> None:
        self._root = root

    def make(self, schema: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise _invalid("it never ends")
        if not isinstance(schema, dict):
            return None
        schema = self._resolved(schema, depth)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][0]
        options = schema.get("anyOf") or schema.get("oneOf")
        if options:
            return self.make(_simplest(options), depth + 1)
        return self._of_type(schema, depth)

    def _resolved(self, schema: Schema, depth: int) -> Schema:
        """Return the schema with its reference followed and its allOf merged."""
        parts = list(schema.get("allOf", ()))
        if "$ref" in schema:
            parts.append(self._target(schema["$ref"]))
        merged = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        for part in parts:
            if depth > DEEPEST:
                raise _invalid("it never ends")
            merged = _merged(self._resolved(part, depth + 1), merged)
        return merged

    def _target(self, reference: str) -> Schema:
        target = self._root
        try:
            for step in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
                target = target[step.replace("~1", "/").replace("~0", "~")]
        except (KeyError, TypeError, IndexError):
            raise _invalid(f"{reference!r} points nowhere") from None
        return dict(target)

    def _of_type(self, schema: Schema, depth: int) -> Any:
        kind = _kind(schema)
        if kind == "object":
            known = schema.get("properties", {})
            return {name: self.make(known.get(name), depth + 1) for name in schema.get("required", ())}
        if kind == "array":
            heads = list(schema.get("prefixItems", ()))
            length = max(len(heads), schema.get("minItems", 0))
            schemas = heads + [schema.get("items")] * (length - len(heads))
            return [self.make(item, depth + 1) for item in schemas]
        if kind == "string":
            return FORMATS.get(schema.get("format", ""), "").ljust(schema.get("minLength", 0), "x")
        if kind in ("integer", "number"):
            return _number(schema, whole=kind == "integer")
        return False if kind == "boolean" else None


def _kind(schema: Schema) -> str | None:
    kind = schema.get("type")
    if isinstance(kind, list):
        return "null" if "null" in kind else str(kind[0])
    return kind or ("object" if "properties" in schema else None)


def _simplest(options: list[Any]) -> Any:
    """Return null if allowed, else the first that is not a reference: so a recursive schema ends."""
    plain = [option for option in options if isinstance(option, dict) and "$ref" not in option]
    nulls = [option for option in plain if option.get("type") == "null"]
    return (nulls or plain or options)[0]


def _merged(first: Schema, second: Schema) -> Schema:
    both = {**first, **second}
    if "properties" in first and "properties" in second:
        both["properties"] = {**first["properties"], **second["properties"]}
    if "required" in first and "required" in second:
        both["required"] = list(dict.fromkeys([*first["required"], *second["required"]]))
    return both


def _number(schema: Schema, *, whole: bool) -> float:
    step = schema.get("multipleOf") or (1 if whole else None)
    low = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
    high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    if step is None:
        return _between(schema, low, high)
    value = math.ceil(low / step) * step if low > 0 else 0
    if low <= 0 and high < 0:
        value = math.floor(high / step) * step
    if value == schema.get("exclusiveMinimum"):
        value += step
    if value == schema.get("exclusiveMaximum"):
        value -= step
    return int(value) if whole else value


def _between(schema: Schema, low: float, high: float) -> float:
    if low < 0 < high:
        return 0
    if math.isinf(high):
        return low + 1 if "exclusiveMinimum" in schema else low
    return high - 1 if math.isinf(low) else (low + high) / 2


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"Invalid schema for response_format: {reason}.", code="invalid_json_schema")
