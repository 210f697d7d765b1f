"""What an answer used, from its body or the end of its stream, whatever a compatible server leaves out."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import from_json

from openai_eval_client._format import valid_text

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_TOKENS = 10**12  # more than any limit; larger numbers would not fit a float
_TAIL = 32_768  # bytes; usage stands at the end of an answer, before at most 16 KB of metadata
_USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')
_MODEL_BEFORE = re.compile(rb'(?<!\\)"model"\s*:\s*"([^"\\]*)"\s*,\s*$')
_TIER = re.compile(rb'(?<!\\)"service_tier"\s*:\s*"(\w+)"')
_LONGEST_NAME = 500  # bytes
# Transcriptions say it in the singular.
_INPUTS = ("prompt_tokens", "prompt_token", "input_tokens", "input_token")
_INPUT_DETAILS = [f"{name}_details" for name in _INPUTS]
_OUTPUT_DETAILS = [name.replace("prompt", "completion").replace("input", "output") for name in _INPUT_DETAILS]


class Usage(NamedTuple):
    """What one answer used, of which model: all that its price depends on."""

    prompt_tokens: int  # all input tokens, those of the next three fields included
    completion_tokens: int  # all output tokens, reasoning and audio included
    cached_tokens: int = 0  # input read from the prompt cache
    cache_write_tokens: int = 0  # input written to the prompt cache, where that has a price of its own
    audio_input_tokens: int = 0  # input that was sound
    audio_output_tokens: int = 0  # output that is sound
    reasoning_tokens: int = 0  # output spent on reasoning
    model: str | None = None  # the model that answered, as the server names it; None where it does not say
    service_tier: str | None = None  # the tier that served, likewise
    estimated: bool = False  # true where the server sent no usage and the counts are ours


def usage_of(body: Mapping[str, Any]) -> Usage | None:
    """Return what the answer of any endpoint used, from its decoded body; None where it does not say."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt_tokens = token_count(usage.get("prompt_tokens", usage.get("input_tokens")))
    if prompt_tokens is None:
        return None
    inputs, outputs = _details(usage, _INPUT_DETAILS), _details(usage, _OUTPUT_DETAILS)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=token_count(usage.get("completion_tokens", usage.get("output_tokens"))) or 0,
        cached_tokens=_part(inputs, "cached_tokens"),
        cache_write_tokens=_part(inputs, "cache_write_tokens"),
        audio_input_tokens=_part(inputs, "audio_tokens"),
        audio_output_tokens=_part(outputs, "audio_tokens"),
        reasoning_tokens=_part(outputs, "reasoning_tokens"),
        model=text_in(body.get("model")) or None,
        service_tier=text_in(body.get("service_tier")) or None,
    )


def _details(usage: Mapping[str, Any], names: list[str]) -> Mapping[str, Any]:
    """Return the parts that a count is made of."""
    for name in names:
        details = usage.get(name)
        if details and isinstance(details, dict):
            return details
    return {}


def _part(details: Mapping[str, Any], name: str) -> int:
    value = details.get(name)
    return (token_count(value) or 0) if value else 0


def token_count(value: object) -> int | None:
    """Return a plausible number of tokens, None for anything else."""
    if type(value) is not int or value < 0:  # a bool is none
        return None
    return min(value, MOST_TOKENS)


def read_usage(tail: bytes) -> Usage | None:
    """Return what an answer used, from its body or the end of it, or the end of a stream."""
    # It is the last `usage` object that counts. Where the object round it is not there as a whole, its model
    # is known only if it stands right before, as with embeddings.
    whole = read_object(tail) if len(tail) <= _TAIL and tail.lstrip().startswith(b"{") else {}
    usage = usage_of(whole)
    if usage is not None:
        return usage
    for match in reversed(list(_USAGE.finditer(tail))):
        usage = _read_event(tail, match.start()) or _read_cut(tail, match)
        if usage is not None:
            return usage
    return None


def _read_event(tail: bytes, position: int) -> Usage | None:
    """Return what the event of a stream at a position says, where it is whole."""
    start, end = tail.rfind(b"\n", 0, position) + 1, tail.find(b"\n", position)
    field, _, data = tail[start : end if end >= 0 else len(tail)].partition(b":")
    event = read_object(data) if field == b"data" else {}
    within = event.get("response")
    return usage_of(within if isinstance(within, dict) else event)


def _read_cut(tail: bytes, match: re.Match[bytes]) -> Usage | None:
    """Return what a `usage` object says whose surroundings are cut or unknown."""
    try:
        usage, _ = json.JSONDecoder().raw_decode(tail[match.end() :].decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    named = _MODEL_BEFORE.search(tail, max(0, match.start() - _LONGEST_NAME), match.start())
    tiers = list(_TIER.finditer(tail, 0, match.start())) or list(_TIER.finditer(tail, match.end()))
    matches = {"model": named, "service_tier": tiers[-1] if tiers else None}
    names = {key: match and match[1].decode(errors="replace") for key, match in matches.items()}
    return usage_of({"usage": usage, **names})


def read_object(data: bytes) -> dict[str, Any]:
    """Decode a JSON object; return an empty one for anything else."""
    try:
        value = read_json(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json(data: bytes) -> Any:
    """Decode JSON in half the time of the standard library, which is asked where this fails."""
    try:
        return from_json(data, cache_strings="keys")
    except ValueError:  # also for half a surrogate pair, which json takes
        return json.loads(data)


class Tail:
    """Remembers the end of a stream, in bounded memory."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take in the next bytes."""
        self._data += chunk
        if len(self._data) > 2 * _TAIL:
            del self._data[:-_TAIL]

    def read(self) -> bytes:
        """Return the last bytes."""
        return bytes(self._data[-_TAIL:])


def dict_in(value: object) -> dict[str, Any]:
    """Return a value that should be an object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def dicts_in(value: object) -> list[dict[str, Any]]:
    """Return the objects in what should be a list of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text_in(value: object) -> str:
    """Return a value that should be a text, as valid Unicode; "" for anything else."""
    return valid_text(value) if isinstance(value, str) else ""


def clean(value: Any) -> Any:
    """Return JSON in which every text is valid Unicode."""
    if isinstance(value, str):
        return text_in(value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {text_in(key): clean(item) for key, item in value.items()}
    return value
