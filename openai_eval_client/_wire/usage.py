"""What an answer used, from its body or the end of its stream, whatever a compatible server leaves out."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import from_json

from openai_eval_client._format import valid_text

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_TOKENS = 10**12  # more than any limit; larger numbers would not fit a float
_MOST_COUNTED = 10**9  # of one answer; a larger number is no count
_TAIL = 32_768  # bytes; usage stands at the end of an answer, before at most 16 KB of metadata
_USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')
_MODEL_BEFORE = re.compile(rb'(?<!\\)"model"\s*:\s*"([^"\\]*)"\s*,\s*$')
_TIER = re.compile(rb'(?<!\\)"service_tier"\s*:\s*"(\w+)"')
_LONGEST_NAME = 500  # bytes
_LARGEST_USAGE = 16_384  # bytes
_TRIES = 100  # `usage` objects that are looked at, from the last one on
_LONGEST_COUNT = 30  # characters of a number sent as text
_MOST_LEVELS = 200  # of nesting; pydantic writes 255
_LONGEST_INT = 4000  # digits; Python refuses those above 4,300

# What servers call their counts, and what each is: OpenAI's two APIs, Anthropic, DeepSeek, Moonshot, Mistral,
# OpenRouter, LiteLLM, DashScope. Transcriptions have their details in the singular.
_CACHE = {
    **dict.fromkeys(("cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens"), "cached"),
    **dict.fromkeys(("cache_read_tokens", "cached_input_tokens", "num_cached_tokens"), "cached"),
    **dict.fromkeys(("cache_write_tokens", "cache_creation_input_tokens"), "written"),
    **dict.fromkeys(("cache_creation_tokens", "cache_write_input_tokens"), "written"),
    "cache_creation": {
        "ephemeral_5m_input_tokens": "written for 5 minutes",
        "ephemeral_1h_input_tokens": "written for an hour",
    },
}
_INPUTS = ("prompt_tokens", "prompt_token", "input_tokens", "input_token")
_OUTPUTS = ("completion_tokens", "completion_token", "output_tokens", "output_token")
_COUNTS: dict[str, Any] = {
    **dict.fromkeys(("prompt_tokens", "input_tokens"), "prompt"),
    **dict.fromkeys(("completion_tokens", "output_tokens"), "completion"),
    "total_tokens": "total",
    "reasoning_tokens": "reasoning",
    **_CACHE,
    **{f"{name}_details": {**_CACHE, "audio_tokens": "audio input"} for name in _INPUTS},
    **{
        f"{name}_details": {"reasoning_tokens": "reasoning", "audio_tokens": "audio output"}
        for name in _OUTPUTS
    },
}
_AS_TEXT = "text"  # stands among the kinds for a count that is one
_BESIDE = frozenset({"cache_read_input_tokens", "cache_creation_input_tokens"})  # Anthropic's


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
    estimated: bool = False  # true where the server did not count all of it, or its counts cannot be read
    partial: bool = False  # true where nothing stands for what cannot be read: it used at least this much
    long_write_tokens: int = 0  # the part of `cache_write_tokens` that is kept for an hour, not for minutes


def usage_of(body: Mapping[str, Any]) -> Usage | None:
    """Return what the answer of any endpoint used, from its decoded body; None where it does not say."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    counts: dict[str, int] = {}
    unread: set[str] = set()
    _collect(usage, _COUNTS, counts, unread)
    prompt, completion, total = counts.get("prompt"), counts.get("completion"), counts.get("total")
    if prompt is None and completion is None and total is None:
        return None
    partial = bool(unread and unread - counts.keys() - {"total"})
    # Where one of the two is missing, the total tells; where both are, all of it counts as input.
    if completion is None:
        said, has_output = total or 0, "choices" in body or "output" in body
        # Embeddings have no output. Elsewhere a total that is all input leaves out what there was.
        partial |= prompt is None or (said <= prompt if has_output else said < prompt and "data" not in body)
        completion = 0 if prompt is None else max(0, (total or 0) - prompt)
    if prompt is None:
        partial, prompt = True, max(0, (total or 0) - completion)
    cached, reasoning = counts.get("cached", 0), counts.get("reasoning", 0)
    long = counts.get("written for an hour", 0)
    written = max(counts.get("written", 0), counts.get("written for 5 minutes", 0) + long)
    # What a total has beyond input and output is output: most of all, reasoning that is not counted in it.
    # But where the cache is counted beside the input, it is that.
    rest = None if total is None else total - prompt - completion
    if _is_beside(usage, cached + written, prompt, rest, reasoning):
        prompt += cached + written
        rest = None if rest is None else rest - cached - written
    output = completion + max(0, rest or 0)
    if reasoning > output:  # so it is not in the total either
        output = completion + reasoning
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        cached_tokens=cached,
        cache_write_tokens=written,
        audio_input_tokens=min(counts.get("audio input", 0), prompt),
        audio_output_tokens=min(counts.get("audio output", 0), output),
        reasoning_tokens=reasoning,
        model=text_in(body.get("model")) or None,
        service_tier=text_in(body.get("service_tier")) or None,
        estimated=partial,
        partial=partial,
        long_write_tokens=long,
    )


def _collect(
    values: Mapping[str, Any], names: dict[str, Any], counts: dict[str, int], unread: set[str]
) -> None:
    """Add the counts that have one of these names, the largest of each kind, and the kinds not readable."""
    for name, value in values.items():
        kind = names.get(name)
        if kind is None:
            continue
        if isinstance(kind, dict):
            if isinstance(value, dict):
                _collect(value, kind, counts, unread)
            continue
        count = value if type(value) is int and 0 <= value <= _MOST_COUNTED else _count(value)
        if count is not None:
            if count > counts.get(kind, -1):
                counts[kind] = count
            if isinstance(value, str):  # read, but no count as a server makes it
                unread.add(_AS_TEXT)
        elif value is not None or kind in {"prompt", "completion"}:  # null stands for no such part
            unread.add(kind)


def _count(value: object) -> int | None:
    """Return a number of tokens, rounded up, sent as a float or a text perhaps; None for anything else."""
    if isinstance(value, str) and len(value) <= _LONGEST_COUNT:
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_COUNTED:
        return None
    return math.ceil(value)


def _is_beside(usage: Mapping[str, Any], cache: int, prompt: int, rest: int | None, reasoning: int) -> bool:
    """Return whether the tokens of the cache are counted beside the input, not in it."""
    if not cache:
        return False
    if cache > prompt:
        return True
    if rest is not None and rest < cache:
        return False
    is_anthropic = _BESIDE & usage.keys() and not {"prompt_tokens", "input_tokens_details"} & usage.keys()
    return bool(is_anthropic) or (rest in {cache, cache + reasoning} and rest != reasoning)


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
    line = position = len(tail)  # where the line begins that was read last; where to search before
    tries = 0
    while usage is None and tries < _TRIES and (position := tail.rfind(b'"usage"', 0, position)) >= 0:
        match = _USAGE.match(tail, position)
        if match is None:
            continue
        tries += 1
        if position < line:
            line = tail.rfind(b"\n", 0, position) + 1
            usage = _read_event(tail, line)
        usage = usage or _read_cut(tail, match)
    return usage


def _read_event(tail: bytes, start: int) -> Usage | None:
    """Return what the event of a stream on the line from here says, where it is whole."""
    end = tail.find(b"\n", start)
    field, _, data = tail[start : end if end >= 0 else len(tail)].partition(b":")
    event = read_object(data) if field == b"data" else {}
    within = event.get("response")
    return usage_of(within if isinstance(within, dict) else event)


def _read_cut(tail: bytes, match: re.Match[bytes]) -> Usage | None:
    """Return what a `usage` object says whose surroundings are cut or unknown."""
    text = tail[match.end() : match.end() + _LARGEST_USAGE].decode(errors="replace")
    try:
        counts, _ = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    usage = usage_of({"usage": counts})
    if usage is None:
        return None
    named = _MODEL_BEFORE.search(tail, max(0, match.start() - _LONGEST_NAME), match.start())
    tiers = list(_TIER.finditer(tail, 0, match.start())) or list(_TIER.finditer(tail, match.end()))
    model, tier = (
        found and found[1].decode(errors="replace") for found in (named, tiers[-1] if tiers else None)
    )
    return usage._replace(model=text_in(model) or None, service_tier=text_in(tier) or None)


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
    except ValueError:  # also for half a surrogate pair and for endless numbers, which this takes
        return json.loads(data, parse_int=_parse_int)


def _parse_int(digits: str) -> float:
    return int(digits) if len(digits) <= _LONGEST_INT else float(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_int)


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
    if isinstance(value, str):
        return value if value.isascii() else valid_text(value)
    return ""


def clean(value: Any, levels: int = _MOST_LEVELS) -> Any:
    """Return JSON that can be written: every text is valid Unicode, and what is nested too deeply is null."""
    if isinstance(value, str):
        return text_in(value)
    if not levels:
        return None if isinstance(value, list | dict) else value
    if isinstance(value, list):
        return [clean(item, levels - 1) for item in value]
    if isinstance(value, dict):
        return {text_in(key): clean(item, levels - 1) for key, item in value.items()}
    return value
