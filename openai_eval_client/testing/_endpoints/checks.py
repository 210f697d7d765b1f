"""What the API refuses in a request, in its own words; a lenient server does not ask."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .._faults import ApiError, missing_parameter, out_of_bounds, wrong_type, wrong_value

if TYPE_CHECKING:
    from collections.abc import Collection

Json = dict[str, Any]
NAME = "^[a-zA-Z0-9_-]+$"
MOST_STOPS = 4
ROLES = ("system", "assistant", "user", "function", "tool", "developer")
ITEM_ROLES = ("assistant", "system", "developer", "user")
FORMATS = ("json_object", "json_schema", "text")
CHOICES = {
    "service_tier": ("auto", "default", "flex", "scale", "priority", "fast"),
    "reasoning_effort": ("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "truncation": ("auto", "disabled"),
    "encoding_format": ("float", "base64"),
}
NUMBERS: dict[str, tuple[str, int | None, int | None]] = {
    "temperature": ("decimal", 0, 2), "top_p": ("decimal", 0, 1), "frequency_penalty": ("decimal", -2, 2),
    "presence_penalty": ("decimal", -2, 2), "n": ("integer", 1, 128), "top_logprobs": ("integer", 0, 20),
    "seed": ("integer", None, None), "best_of": ("integer", 1, 20), "max_tokens": ("integer", 1, None),
    "max_completion_tokens": ("integer", 1, None), "max_output_tokens": ("integer", 1, None),
    "max_tool_calls": ("integer", 1, None), "dimensions": ("integer", 1, None),
}  # fmt: skip
TYPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("stream", "store", "background", "parallel_tool_calls"), (bool, "a boolean")),
    **dict.fromkeys(("metadata", "logit_bias", "stream_options", "reasoning", "text"), (dict, "an object")),
    **dict.fromkeys(("tools", "messages", "include"), (list, "an array")),
}
TEXT = "model stream stream_options temperature top_p user"
SHARED = f"""{TEXT} metadata moderation parallel_tool_calls prompt_cache_key prompt_cache_options service_tier
    prompt_cache_retention safety_identifier store tool_choice tools top_logprobs"""
CHAT = frozenset(f"""{SHARED} audio frequency_penalty function_call functions logit_bias logprobs messages
    max_completion_tokens max_tokens modalities n prediction presence_penalty reasoning_effort
    response_format seed stop verbosity web_search_options""".split())  # fmt: skip
RESPONSES = frozenset(f"""{SHARED} access_programs background background_options context_management image
    conversation include input instructions max_output_tokens max_tool_calls previous_response_id prompt
    reasoning text truncation""".split())  # fmt: skip
COMPLETIONS = frozenset(f"""{TEXT} best_of echo frequency_penalty logit_bias logprobs max_tokens n
    presence_penalty prompt seed stop suffix""".split())  # fmt: skip
EMBEDDINGS = frozenset(("dimensions", "encoding_format", "input", "model", "user"))


def check(body: Json, known: Collection[str]) -> None:
    """Raise the 400 for the first parameter that is unknown, of another type, or out of bounds."""
    if unknown := [name for name in body if name not in known]:
        if known is RESPONSES:
            first = unknown[0]
            raise ApiError(400, f"Unknown parameter: '{first}'.", param=first, code="unknown_parameter")
        plural = "s" if len(unknown) > 1 else ""
        raise ApiError(400, f"Unrecognized request argument{plural} supplied: {', '.join(unknown)}")
    for name, value in body.items():
        if value is not None:
            _check_value(name, value)


def check_chat(body: Json) -> None:
    """Raise the 400 for the first thing that is wrong with a chat completion."""
    check(body, CHAT)
    if None not in (body.get("max_tokens"), body.get("max_completion_tokens")):
        both = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
        raise ApiError(400, both, param="max_tokens", code="invalid_parameter_combination")
    _check_length("messages", body.get("messages"))
    _check_roles("messages", body.get("messages"), ROLES)
    _check_length("tools", body.get("tools"))
    for index, tool in enumerate(body.get("tools") or ()):
        where = f"tools[{index}]"
        if _part(tool, where, "type", ("function", "custom")) == "function":
            _check_name(_part(tool, where, "function"), f"{where}.function")
    wanted = body.get("response_format")
    if wanted is not None and _part(wanted, "response_format", "type", FORMATS) == "json_schema":
        _check_name(_part(wanted, "response_format", "json_schema"), "response_format.json_schema")


def check_response(body: Json) -> None:
    """Raise the 400 for the first thing that is wrong with a response."""
    check(body, RESPONSES)
    if body.get("background") and body.get("store") is False:
        raise ApiError(400, "Background mode requires 'store' to be true.", param="background")
    items = body.get("input") if isinstance(body.get("input"), list) else None
    messages = [item if isinstance(item, dict) and "role" in item else None for item in items or ()]
    _check_roles("input", messages, ITEM_ROLES)
    for index, tool in enumerate(body.get("tools") or ()):
        if _part(tool, f"tools[{index}]", "type") == "function":
            _check_name(tool, f"tools[{index}]")
    wanted = (body.get("text") or {}).get("format")
    if wanted is not None and _part(wanted, "text.format", "type", FORMATS) == "json_schema":
        _check_name(wanted, "text.format")
        _part(wanted, "text.format", "schema")


def _check_value(name: str, value: Any) -> None:
    if name in NUMBERS:
        kind, least, most = NUMBERS[name]
        allowed = int if kind == "integer" else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise wrong_type(name, f"{'an' if kind == 'integer' else 'a'} {kind}", value)
        if refusal := out_of_bounds(name, value, least, most, kind):
            raise refusal
    if name in TYPES and not isinstance(value, TYPES[name][0]):
        raise wrong_type(name, TYPES[name][1], value)
    if name in CHOICES and value not in CHOICES[name]:
        raise wrong_value(name, value, CHOICES[name])
    if name == "stop" and isinstance(value, list) and len(value) > MOST_STOPS:
        needs = f"Expected an array with maximum length {MOST_STOPS}"
        message = (
            f"Invalid 'stop': array too long. {needs}, but got an array with length {len(value)} instead."
        )
        raise ApiError(400, message, param=name, code="array_above_max_length")


def _check_length(name: str, value: Any) -> None:
    if value == []:
        empty = "empty array. Expected an array with minimum length 1, but got an empty array instead."
        raise ApiError(400, f"Invalid '{name}': {empty}", param=name, code="empty_array")


def _check_roles(name: str, messages: Any, roles: Collection[str]) -> None:
    for index, message in enumerate(messages or ()):
        if message is not None:
            _part(message, f"{name}[{index}]", "role", roles)


def _part(holder: Any, where: str, name: str, allowed: Collection[str] = ()) -> Any:
    """Return a part that must be there, and be one of those allowed."""
    if not isinstance(holder, dict):
        raise wrong_type(where, "an object", holder)
    if holder.get(name) is None:
        raise missing_parameter(f"{where}.{name}")
    if allowed and holder[name] not in allowed:
        raise wrong_value(f"{where}.{name}", holder[name], allowed)
    return holder[name]


def _check_name(holder: Any, where: str) -> None:
    name = _part(holder, where, "name")
    if not (isinstance(name, str) and re.match(NAME, name)):
        wrong = f"string does not match pattern. Expected a string that matches the pattern '{NAME}'."
        raise ApiError(400, f"Invalid '{where}.name': {wrong}", param=f"{where}.name", code="invalid_value")
