"""What an answer says, whatever a compatible server leaves out: its text, what it used, and its headers."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import from_json

from openai_eval_client._format import valid_text
from openai_eval_client._log import warn
from openai_eval_client.models import ModelResponse, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from openai_eval_client._wire.requests import Parameters

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
# Items of a response that wait for the caller; the API runs its hosted tools itself.
_CALLS = frozenset({"function_call", "custom_tool_call", "computer_call", "local_shell_call"})
_DEFAULT_TEMPERATURE = 1.0  # https://platform.openai.com/docs/api-reference/chat/create


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
        model=_text(body.get("model")) or None,
        service_tier=_text(body.get("service_tier")) or None,
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


# --- its text ------------------------------------------------------------------------------------------


def is_answer(body: object, api: str) -> bool:
    """Return whether a body is an answer at all, and not what something on the way makes of it."""
    wanted = "choices" if api == "chat" else "output"
    return isinstance(body, dict) and isinstance(body.get(wanted), list)


def read_answer(
    body: Mapping[str, Any],
    parameters: Parameters,
    *,
    usage: Usage | None,
    cost: float | None = None,
    kept: bytes | None = None,
    temperature: float | None,
    request_id: str | None,
    latency: float,
) -> ModelResponse:
    """Build the response to one prompt; a field that a server gets wrong reads as missing."""
    values = _chat_fields(body) if parameters.api == "chat" else _responses_fields(body)
    values |= {
        "usage": _token_usage(body, usage, cost),
        "model": _text(body.get("model")) or parameters.model,
        "request_id": request_id or _text(body.get("id")),
        "latency_ms": latency * 1000,
        "temperature": _DEFAULT_TEMPERATURE if temperature is None else float(temperature),
        "cached": False,
    }
    response: ModelResponse = ModelResponse._of(values, {"_parsed": None, "_body": kept or body})  # noqa: SLF001
    if parameters.schema is not None:
        response._parsed = _parsed(response, parameters.schema)  # noqa: SLF001
    return response


def _chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    choices = _dicts(body["choices"])
    first = choices[0] if choices else {}
    message = _dict(first.get("message"))
    content = _content(message)
    calls, logprobs = message.get("tool_calls"), first.get("logprobs")
    return {
        "content": content,
        "choices": [content if each is first else _content(_dict(each.get("message"))) for each in choices],
        "finish_reason": _text(first.get("finish_reason")),
        "tool_calls": _clean(_dicts(calls)) if calls else [],
        "refusal": _text(message.get("refusal")) or None,
        "logprobs": _clean(_dict(logprobs)) or None if logprobs else None,
    }


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of a message; some servers send it in parts, among others that are no text."""
    content = message.get("content")
    if not isinstance(content, list):
        return _text(content)
    return "".join(_text(part.get("text")) for part in _dicts(content) if part.get("type") == "text")


def _responses_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    items = _dicts(body["output"])
    parts = [part for item in items if item.get("type") == "message" for part in _dicts(item.get("content"))]
    calls = [item for item in items if _text(item.get("type")) in _CALLS]
    text = "".join(_text(part.get("text")) for part in parts if part.get("type") == "output_text")
    refusals = [_text(part.get("refusal")) for part in parts if part.get("type") == "refusal"]
    logprobs = [entry for part in parts for entry in _dicts(part.get("logprobs"))]
    return {
        "content": text,
        "choices": [text],
        "finish_reason": _finish_reason(body, calls=bool(calls)),
        "tool_calls": _clean(calls),
        "refusal": refusals[0] if refusals else None,
        "logprobs": {"content": _clean(logprobs)} if logprobs else None,
    }


def _finish_reason(body: Mapping[str, Any], *, calls: bool) -> str:
    """Return the Responses API's status in the words of chat completions."""
    status = _text(body.get("status")) or "completed"
    if status == "incomplete":
        reason = _text(_dict(body.get("incomplete_details")).get("reason"))
        return "length" if reason == "max_output_tokens" else reason
    if status != "completed":
        return status
    return "tool_calls" if calls else "stop"


def _token_usage(body: Mapping[str, Any], usage: Usage | None, cost: float | None) -> TokenUsage:
    counts = usage or Usage(0, 0, estimated=True)
    total = None if usage is None else token_count(body["usage"].get("total_tokens"))
    fields = {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": total or counts.prompt_tokens + counts.completion_tokens,
        "estimated_cost": cost,
        "cached_tokens": counts.cached_tokens,
        "reasoning_tokens": counts.reasoning_tokens,
        "estimated": counts.estimated,
    }
    return TokenUsage._of(fields)  # type: ignore[no-any-return]  # noqa: SLF001


def _parsed(response: ModelResponse, schema: type[BaseModel]) -> BaseModel | None:
    if response.refusal is not None or not response.content:
        return None
    try:
        return schema.model_validate_json(response.content)
    except Exception as error:  # noqa: BLE001  # a validator may raise anything; the answer is paid for
        kind, name = type(error).__name__, schema.__name__
        about = {"model": response.model, "request_id": response.request_id, "error_type": kind}
        text = "answer %s does not fit %s (%s): parsed is None"
        warn(text, response.request_id, name, kind, event="not_parsed", **about)
        return None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return valid_text(value) if isinstance(value, str) else ""


def _clean(value: Any) -> Any:
    """Return JSON in which every text is valid Unicode."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_text(key): _clean(item) for key, item in value.items()}
    return value


# --- its headers: the limits, what is left of them, and when to come back --------------------------------

_DIGITS = 10  # of a number below _LONGEST
_LONGEST = 1e9  # a number in a header: thirty years, or more tokens than any limit
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_LONGEST_RESET = 86_400.0  # seconds; beyond it a plain number is no duration, but perhaps a date
_NUMBER = r"\d+(?:\.\d+)?"
_PART = re.compile(rf"({_NUMBER})(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_NUMBER}(?:ms|s|m|h|d))+")
_WAIT = re.compile(rf"(?:try again in|retry after) (?:({_DURATION.pattern})|({_NUMBER}) seconds?)")
DIMENSIONS = ("requests", "tokens")


@dataclass(frozen=True, slots=True)
class StatedLimit:
    """One dimension of a limit, as the `x-ratelimit-*` headers state it."""

    limit: int  # per minute
    remaining: int  # what is left now
    reset: float | None  # seconds until it is full again; None where the server does not say


def read_stated_limits(headers: Mapping[str, str]) -> dict[str, StatedLimit]:
    """Return what the headers say of requests and of tokens, each only where they do."""
    # Where a project has a limit of its own beside the organisation's, the one with less left counts.
    limits: dict[str, StatedLimit] = {}
    stated = _ratelimits(headers)
    for dimension in DIMENSIONS if stated else ():
        both = read_stated_limit(stated, dimension), read_stated_limit(stated, f"project-{dimension}")
        known = [limit for limit in both if limit is not None]
        if known:
            limits[dimension] = min(known, key=lambda limit: (limit.remaining, limit.limit))
    return limits


def _ratelimits(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that state limits, by their names in lower case; httpx's are slow to look up in."""
    raw = getattr(headers, "raw", None)
    if raw is None:
        return {name: text for name, text in headers.items() if name.startswith("x-ratelimit-")}
    stated = [(name.lower(), text) for name, text in raw if name[:12].lower() == b"x-ratelimit-"]
    return {name.decode("ascii", "replace"): text.decode("ascii", "replace") for name, text in stated}


def refused_dimension(message: str) -> str | None:
    """Return which limit the message of a 429 names, "requests" or "tokens"; None where it names neither."""
    # The API's wording is "Rate limit reached for MODEL ... on tokens per min (TPM): Limit ...", Azure's
    # "... have exceeded token rate limit of your current OpenAI S0 pricing tier".
    if any(text in message for text in ("on requests per", "call rate limit", "request rate limit")):
        return "requests"
    return "tokens" if "on tokens per" in message or "token rate limit" in message else None


def stated_wait(headers: Mapping[str, str], message: str = "") -> float | None:
    """Return the seconds that a refusal asks to wait: its headers, else its message; None: neither says."""
    # The API's wording is "Please try again in 6m0s", Azure's "Please retry after 6 seconds".
    seconds = retry_after(headers)
    if seconds is not None:
        return seconds
    match = _WAIT.search(message)
    return None if match is None else duration(match[1]) or _number(match[2])


def read_stated_limit(headers: Mapping[str, str], dimension: str) -> StatedLimit | None:
    """Read the limit of one dimension."""
    limit = _whole(headers.get(f"x-ratelimit-limit-{dimension}"))
    remaining = _whole(headers.get(f"x-ratelimit-remaining-{dimension}")) if limit else None
    if not limit or remaining is None:
        return None
    text = headers.get(f"x-ratelimit-reset-{dimension}")
    seconds = duration(text)
    reset = _number(text) if seconds is None else seconds
    if reset == 0 and remaining < limit / 2:  # full already, and yet not: nonsense
        return None
    is_duration = reset is not None and reset <= _LONGEST_RESET
    return StatedLimit(limit, min(remaining, limit), reset if is_duration else None)


def duration(text: str | None) -> float | None:
    """Return the seconds of "1s", "6m0s", "17.25ms" or "1h2m3.5s"; None for anything else."""
    if text is None or not _DURATION.fullmatch(text):
        return None
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    return seconds if seconds < float("inf") else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds the server asks to wait, from retry-after-ms, else retry-after."""
    # The latter is a number of seconds or an HTTP date (RFC 9110, section 10.2.3). None where there is
    # neither, or only nonsense.
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or not text:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return min(value, _LONGEST) if value is not None and 0 <= value < float("inf") else None


def _whole(text: str | None) -> int | None:
    if text is not None and len(text) < _DIGITS and text.isdecimal():
        return int(text)
    value = _number(text)
    return None if value is None else int(value)
