"""What came with a status: an answer, or the error for it. The one reader for all roads."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import openai

from openai_eval_client._wire.answers import REASONING
from openai_eval_client._wire.failures import Kind, Outcome, class_of, headers_of, read_refusal
from openai_eval_client._wire.refusals import words_of
from openai_eval_client._wire.requests import PATHS
from openai_eval_client._wire.usage import dict_in, dicts_in, read_json, read_object, read_usage, text_in
from openai_eval_client.errors import QuotaError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NUMBER = re.compile("[45][0-9][0-9]")
_STATUS_OF = {  # the API's codes and types, in bodies that name no number
    "authentication_error": 401, "invalid_api_key": 401, "invalid_request_error": 400,
    "permission_error": 403, "model_not_found": 404, "not_found_error": 404, "insufficient_quota": 429,
    "rate_limit_error": 429, "rate_limit_exceeded": 429, "server_error": 500, "internal_server_error": 500,
    "api_error": 500, "vector_store_timeout": 504, "overloaded_error": 529, "server_overloaded": 503,
}  # fmt: skip
_ABOUT_INPUT = re.compile(r"invalid_prompt|(?:\w+_)?image(?:_\w+)?|content_(?:filter|policy_violation)")
_CUT_OFF = frozenset({"length", "content_filter"})  # reasons why an answer may have no text
_ERROR = re.compile(rb'"error"(?!\s*:\s*null\b)')  # every whole response has an error of null
_DONE = b"data: [DONE]"
_LAST_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed"})
_COMMENTS = re.compile(rb"^(?:\s*:[^\n]*\n)+")  # lines of a stream by which some servers keep it open
_SHOWN = 300  # characters of an error that names no status


class Fault(NamedTuple):
    """Why a body is no answer."""

    what: str  # for a reader
    status: int | None = None  # of the error that it is; None: it names none
    body: object = None  # where that error stands


def fault_in(body: object, api: str) -> Fault | None:
    """Return why a decoded body is no answer of an API; None where it is one."""
    if not isinstance(body, dict):
        return Fault(f"not what {PATHS[api]} returns")
    if body.get("error") or body.get("object") == "error":
        return _stated(body)
    return _chat_fault(body) if api == "chat" else _responses_fault(body)


def _chat_fault(body: Mapping[str, Any]) -> Fault | None:
    choices = body.get("choices")
    if not isinstance(choices, list):
        return Fault("not what /chat/completions returns")
    if not choices:
        return Fault("no choices")
    for choice in choices:
        fields = dict_in(choice)
        if fields.get("error") or fields.get("finish_reason") == "error":
            return _stated(fields)
        if not _holds_something(dict_in(fields.get("message"))) and not _is_cut_off(fields):
            return Fault("a choice without an answer")
    return None


def _is_cut_off(choice: Mapping[str, Any]) -> bool:
    return text_in(choice.get("finish_reason")) in _CUT_OFF and "delta" not in choice


def _holds_something(message: Mapping[str, Any]) -> bool:
    """Return whether a message has a field that an answer can be: a text, even an empty one, or a call."""
    if any(isinstance(message.get(name), str) for name in ("content", "refusal", *REASONING)):
        return True
    parts = (dicts_in(message.get(name)) for name in ("content", "tool_calls", "images", *REASONING))
    return any(parts) or any(isinstance(message.get(name), dict) for name in ("function_call", "audio"))


def _responses_fault(body: Mapping[str, Any]) -> Fault | None:
    status, output = body.get("status") or "completed", body.get("output")
    if status == "failed":
        return _stated(body)
    if status not in ("completed", "incomplete"):  # a server may send anything
        return Fault(f"a response of status {status!r}"[:80])
    if not isinstance(output, list):
        return Fault("not what /responses returns")
    if status == "completed" and not any(map(_is_something, dicts_in(output))):
        return Fault("a response without an answer")
    return None


def _is_something(item: Mapping[str, Any]) -> bool:
    if item.get("type") != "message":
        return isinstance(item.get("type"), str)
    parts = dicts_in(item.get("content"))
    return any(isinstance(part.get(name), str) for part in parts for name in ("text", "refusal"))


def _stated(body: Mapping[str, Any]) -> Fault:
    """Return the fault of a body, or of a part of it, that states an error."""
    error = body.get("error")
    fields = error if isinstance(error, dict) else body
    values = (fields.get(name) for name in ("code", "status", "status_code", "type"))
    status = next((found for value in values if (found := _status_of(value)) is not None), None)
    return Fault(f"an error: {str(error or body)[:_SHOWN]}", status, body)


def _status_of(word: object) -> int | None:
    text = str(word).lower() if isinstance(word, str | int) else ""
    if _NUMBER.fullmatch(text):
        return int(text)
    return _STATUS_OF.get(text) or (400 if _ABOUT_INPUT.fullmatch(text) else None)


def read_body(reply: Any, api: str) -> tuple[dict[str, Any], bytes]:
    """Return the answer that came with a 200, decoded and as bytes of JSON.

    Raises:
        openai.APIResponseValidationError: It is cut short, or no answer at all.
        openai.APIStatusError: It is an error that names a status.
    """
    content: bytes = reply.content
    body, is_plain = decoded(content, api)
    if not is_plain:
        content = b"" if body is None else json.dumps(body).encode()
    fault = fault_in(body, api)
    if fault is not None:
        raise error_of(fault, body, reply)
    answer: dict[str, Any] = body
    return answer, content


def decoded(content: bytes, api: str) -> tuple[Any, bool]:
    """Return the body of an answer, None where it cannot be read, and whether it is plain JSON."""
    try:
        return read_json(content), True
    except (ValueError, RecursionError):
        return _unwrapped(content, api), False


def error_of(fault: Fault, body: object, reply: Any) -> openai.APIError:
    """Return the error for a 200 that holds no answer."""
    # Proxies answer 200 before they know what comes of a request, and put an error into the body; its code is
    # often the status of the server behind them. Where it names none, the error is one that is tried again.
    if fault.status is not None:
        headers, request = headers_of(reply), reply.request
        answer = sdk_httpx().Response(fault.status, headers=headers, content=reply.content, request=request)
        return status_error(fault.status, fault.body, answer)
    content: bytes = reply.content
    shown = repr(content[:80])
    if _is_html(reply):
        message = f"an HTML page came in place of an answer: this is no API; check base_url: {shown}"
    elif body is None and _COMMENTS.sub(b"", content).lstrip()[:5] in {b"data:", b"event"}:
        message = f"a stream of events came, and no answer can be read from it: {shown}"
    else:
        message = f"the answer is {fault.what}" + (f": {shown}" if fault.body is None else "")
    return openai.APIResponseValidationError(response=reply, body=body, message=message)


def _is_html(reply: Any) -> bool:
    start = reply.content[:200].lstrip().lower()
    is_named = reply.headers.get("content-type", "").lower().startswith("text/html")
    return start.startswith((b"<!doctype html", b"<html")) or (
        is_named and not start.startswith((b"{", b"["))
    )


def status_error(status: int, body: Any, answer: Any) -> openai.APIStatusError:
    """Return the error that the SDK raises for a status, or ours where the account's credit is used up."""
    details = body.get("error", body) if isinstance(body, dict) else body
    words = words_of(body)
    failure = read_refusal(status, answer.headers, words)
    kind = QuotaError if failure.kind is Kind.OUT_OF_QUOTA else class_of(status)
    return kind(words.message or f"status {status}", response=answer, body=details)


def read_outcome(status: int, headers: Mapping[str, str], content: bytes, api: str | None) -> Outcome:
    """Return what came of an attempt that was answered, where its answer is another's to read."""
    usage = read_usage(content)
    if api is not None and _ERROR.search(content):
        fault = fault_in(read_object(content), api)
        if fault is not None and fault.status is not None:
            failure = read_refusal(fault.status, headers, words_of(fault.body))
            return Outcome(fault.status, headers, usage, failure)
    return Outcome(status, headers, usage)


# --- an answer in a stream of events that was not asked for -----------------------------------------------


def _unwrapped(content: bytes, api: str) -> Any:
    """Return the one answer that a stream of events holds, or that one follows; None where there is none."""
    text = _COMMENTS.sub(b"", content).strip()
    if text.startswith(b"{"):
        return _leading_object(text)
    if not text.startswith((b"data:", b"event:")):
        return None
    events = list(_events(text))
    last = [dict_in(event.get("response")) for event in events if event.get("type") in _LAST_EVENTS]
    found = [event for event in [*events, *last] if fault_in(event, api) is None]
    found = found or [event for event in [*events, *last] if event.get("error")]
    if len(found) == 1:
        return found[0]
    return _assembled(events) if api == "chat" and text.endswith(_DONE) and not found else None


def _leading_object(text: bytes) -> Any:
    """Return the object that a text begins with; None where another may follow, or it is cut short."""
    shown = text.decode(errors="replace")
    try:
        value, end = json.JSONDecoder().raw_decode(shown)
    except (ValueError, RecursionError):
        return None
    return value if "{" not in shown[end:] else None


def _events(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        name, _, data = line.partition(b":")
        if name == b"data" and (event := read_object(data.strip())):
            yield event


def _assembled(events: list[dict[str, Any]]) -> Any:
    """Return the answer that the chunks of a stream make up; None where they are not all there."""
    from openai.lib.streaming.chat import ChatCompletionStreamState  # heavy: only where it is needed
    from openai.types.chat import ChatCompletionChunk

    state = ChatCompletionStreamState()
    try:
        for event in events:
            state.handle_chunk(ChatCompletionChunk.model_validate(event))
        answer = state.current_completion_snapshot.model_dump(mode="json", exclude_unset=True)
    except Exception:  # noqa: BLE001  # the chunks may hold anything
        return None
    answer["object"] = "chat.completion"
    return answer if all(choice.get("finish_reason") for choice in answer["choices"]) else None
