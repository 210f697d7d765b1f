"""The faults that are answers of a kind: what other servers and the API itself send in place of a good one.

`REFUSALS` are refusals, as they were reported. `SPOILERS` turn a good answer into a 200 that is none, or
into one whose usage is of another shape. What a server knows only when it answers is in braces.
"""

from __future__ import annotations

import json
import math
import time
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from functools import partial
from typing import Any

Json = dict[str, Any]
BEHIND, AHEAD = -20 * 60, 3 * 60  # seconds by which a server's clock is wrong
REASONING = 100  # tokens that are counted outside the completion
UPSTREAM = "Upstream error"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is sent in place of an answer, or, with status 200, as one."""

    status: int
    body: Any  # text and bytes as they are, all else as JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    tier: str | None = None  # only requests in this tier meet it

    def rendered(self, wait: float) -> tuple[bytes, int, dict[str, str]]:
        """Return body, status and headers, with the seconds to wait and dates filled in."""
        if isinstance(self.body, bytes):
            return self.body, self.status, dict(self.headers)
        now, later = int(time.time()), math.ceil(wait)
        text, kind = json.dumps(self.body), "application/json"
        if isinstance(self.body, str):
            text, kind = self.body, "text/plain; charset=utf-8"
        headers = {"content-type": kind, **self.headers}
        dates = {
            "{behind}": formatdate(now + BEHIND, usegmt=True),
            "{behind_later}": formatdate(now + BEHIND + later, usegmt=True),
            "{ahead}": formatdate(now + AHEAD, usegmt=True),
            "{ahead_later}": formatdate(now + AHEAD + later, usegmt=True),
            "{asctime}": time.asctime(time.gmtime(now + later)),
            "{zone}": formatdate(now + later),
        }
        for mark, date in dates.items():
            headers = {name: held.replace(mark, date) for name, held in headers.items()}
        return text.replace("{wait}", f"{wait:g}").encode(), self.status, headers


def outcome_of(given: Any) -> str | Refusal:
    """Return what a script gives: the name of a fault or a text as it is, anything else as sent."""
    match given:
        case str():
            return given
        case bytes():
            return Refusal(200, given, {"content-type": "application/json"})
        case {"base64": str(packed), **rest} if not rest:
            return outcome_of(b64decode(packed))
        case {"status": int(status), **rest} if rest.keys() <= {"body", "headers"}:
            headers: Any = rest.get("headers") or {}
            return Refusal(status, rest.get("body"), headers)
        case Mapping():
            return Refusal(200, dict(given))
    raise ValueError(f"{given!r} is neither a fault, a text, bytes, nor a mapping")


def _said(status: int, message: str, code: Any = None, kind: str = "invalid_request_error") -> Refusal:
    """Return a refusal in the API's words."""
    return Refusal(status, {"error": {"message": message, "type": kind, "param": None, "code": code}})


def _limited(**headers: str) -> Refusal:
    limit = _said(429, "Rate limit reached for requests.", "rate_limit_exceeded", "requests")
    return replace(limit, headers={name.replace("_", "-"): value for name, value in headers.items()})


HTML_TYPE = {"content-type": "text/html; charset=utf-8"}
SORRY = "The server had an error while processing your request. Sorry about that!"
DOCS = "read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
BILLING = "You exceeded your current quota, please check your plan and billing details."
QUOTA = f"{BILLING} For more information on this error, {DOCS}"
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "{wait}s"}
EXHAUSTED = {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": BILLING}
RETRY_IN = {**EXHAUSTED, "message": f"{BILLING} Please retry in {{wait}}s."}
FLAGGED = {"reasons": ["violence"], "flagged_input": "hello", "provider_name": "OpenAI"}
REFUSALS: dict[str, Refusal] = {
    # the server's own trouble, and a rate
    "500": _said(500, SORRY, None, "server_error"),
    "503": _said(503, "The engine is currently overloaded, please try again later.", None, "server_error"),
    "408": _said(408, "Request timed out.", None, "server_error"),
    "409": _said(409, "The resource was updated by another request."),
    "429": _limited(),
    # no money is left: the API's codes, whatever their type, and other servers' words
    "insufficient_quota": _said(429, QUOTA, "insufficient_quota", "insufficient_quota"),
    "billing_not_active": _said(429, BILLING, "billing_not_active", "billing_not_active"),
    "credit_balance_exhausted": _said(429, BILLING, "credit_balance_exhausted", "requests"),
    "organization_spend_limit_exceeded": _said(429, BILLING, "organization_spend_limit_exceeded", "tokens"),
    "project_spend_limit_exceeded": _said(429, BILLING, "project_spend_limit_exceeded", "requests"),
    "organization_usage_limit_exceeded": _said(429, BILLING, "organization_usage_limit_exceeded", "requests"),
    "billing_hard_limit_reached": _said(400, "Billing hard limit reached.", "billing_hard_limit_reached"),
    "402": _said(402, "Insufficient Balance", "invalid_request_error", "unknown_error"),
    "suspended": _said(429, "Your account is suspended.", None, "exceeded_current_quota_error"),
    "insufficient_balance": Refusal(429, {"error": {"code": "1113", "message": "Insufficient balance."}}),
    "exceeded_quota": Refusal(429, [{"error": EXHAUSTED}]),
    "daily_allowance": _said(429, "Rate limit exceeded: free-models-per-day.", 429),
    # this key or this model, if only once
    "401": _said(401, "Incorrect API key provided.", "invalid_api_key"),
    "403": _said(403, "You have insufficient permissions for this operation."),
    "404": _said(404, "The model does not exist or you do not have access to it.", "model_not_found"),
    # this prompt
    "guidelines": Refusal(403, {"code": "No permission", "error": "Content violates usage guidelines."}),
    "moderation": Refusal(403, {"error": {"code": 403, "message": "It was flagged.", "metadata": FLAGGED}}),
    "image_input": _said(404, "No endpoints found that support image input", 404),
    "invalid_prompt": _said(400, "Invalid prompt: it was flagged by our usage policy.", "invalid_prompt"),
    "content_policy": _said(400, "Rejected by our safety system.", "content_policy_violation"),
    "content_filter": _said(400, "Filtered due to the content management policy.", "content_filter"),
    "context_length": _said(400, "The maximum context length is 8192 tokens.", "context_length_exceeded"),
    # waits
    "date_behind": _limited(date="{behind}", retry_after="{behind_later}"),
    "date_ahead": _limited(date="{ahead}", retry_after="{ahead_later}"),
    "date_asctime": _limited(retry_after="{asctime}"),
    "date_zone": _limited(retry_after="{zone}"),
    "retry_in": Refusal(429, [{"error": RETRY_IN}]),
    "retry_delay": Refusal(429, {"error": {**EXHAUSTED, "details": [RETRY_INFO]}}),
    "slow_down": _said(503, "Slow Down", "slow_down", "service_unavailable_error"),
    "resource_unavailable": replace(_said(429, "Resource Unavailable", "resource_unavailable"), tier="flex"),
    "concurrency": _said(429, "Too many concurrent requests (max parallel 1)", None, "rate_limit_reached"),
    "overloaded": _said(429, "The engine is currently overloaded.", None, "engine_overloaded_error"),
    "529": Refusal(529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
    # bodies of other shapes
    "error_text": Refusal(400, {"error": "the prompt is too strange"}),
    "detail": Refusal(422, {"detail": [{"loc": ["body", "n"], "msg": "Input should be valid"}]}),
    "message": Refusal(400, {"object": "error", "message": "the prompt is too strange", "code": 40303}),
    "plain_text": Refusal(503, "upstream connect error or disconnect/reset before headers"),
    "502": Refusal(502, "<html><title>502 Bad Gateway</title></html>", HTML_TYPE),
    "login_page": Refusal(200, "<!doctype html><title>Sign in</title><form></form>", HTML_TYPE),
}  # fmt: skip


def _failed(body: Json, code: str | None, status: int | None, kept: float = 0) -> Json:
    """Return the answer as failed, with a share of its text; without a status no error is stated."""
    if "output" in body:
        error = code and {"code": code, "message": UPSTREAM}
        output = body["output"] if kept else []
        return {**body, "status": "failed", "error": error, "output": output, "usage": None}
    return _each_choice(body, lambda choice: _failed_choice(choice, status, kept))


def _each_choice(body: Json, change: Callable[[Json], Json]) -> Json:
    return {**body, "choices": list(map(change, body["choices"]))} if "choices" in body else body


def _failed_choice(choice: Json, status: int | None, kept: float) -> Json:
    error = {"error": {"code": status, "message": UPSTREAM}} if status else {}
    text = choice.get("message", {}).get("content") or choice.get("text") or ""
    text = text[: int(len(text) * kept)]
    said = {"message": {**choice["message"], "content": text}} if "message" in choice else {"text": text}
    return {**choice, **said, **error, "finish_reason": "error"}


def _ended(body: Json, status: str) -> Json:
    """Return a response that ended without output; a completion stays as it is."""
    if "output" not in body:
        return body
    return {**body, "status": status, "output": [], "usage": None}


def _filtered(body: Json) -> Json:
    if "output" in body:
        return {**body, "status": "incomplete", "incomplete_details": {"reason": "content_filter"}}
    return _each_choice(body, lambda choice: {**choice, "finish_reason": "content_filter"})


def _answers(body: Json, value: Any) -> Json:
    return {name: value if name in ("choices", "output", "data") else held for name, held in body.items()}


def _usage(body: Json, change: Callable[[Any], Any]) -> Json:
    """Return the body with every count of its usage changed."""

    def changed(value: Any) -> Any:
        return {k: changed(v) for k, v in value.items()} if isinstance(value, dict) else change(value)

    return {**body, "usage": changed(body["usage"])}


def _reasoning_outside(body: Json) -> Json:
    usage = body["usage"]
    name = "output_tokens_details" if "output_tokens" in usage else "completion_tokens_details"
    more = {name: {"reasoning_tokens": REASONING}, "total_tokens": usage["total_tokens"] + REASONING}
    return {**body, "usage": {**usage, **more}}


def _cached(body: Json, names: tuple[str, ...]) -> Json:
    """Return the body with half its prompt cached, stated under other names: cached, and not cached."""
    usage = {name: value for name, value in body["usage"].items() if not name.endswith("_details")}
    prompt: int = usage["input_tokens"] if "input_tokens" in usage else usage["prompt_tokens"]
    counts = zip(names, (prompt // 2, prompt - prompt // 2), strict=False)
    return {**body, "usage": {**usage, **dict(counts)}}


SPOILERS: dict[str, Callable[[Json], Json]] = {
    # a 200 that is no answer
    "failed": partial(_failed, code="server_error", status=502),
    "failed_rate_limit": partial(_failed, code="rate_limit_exceeded", status=429),
    "failed_half": partial(_failed, code="server_error", status=502, kept=0.5),
    "finish_error": partial(_failed, code=None, status=None),
    "status_cancelled": partial(_ended, status="cancelled"),
    "status_in_progress": partial(_ended, status="in_progress"),
    "filtered": _filtered,
    "error_beside": lambda body: {**body, "error": {"code": 502, "message": UPSTREAM}},
    "empty": partial(_answers, value=[]),
    "wrong_types": partial(_answers, value="none"),
    # usage of other shapes
    "null_usage": lambda body: {**body, "usage": None},
    "no_usage": lambda body: {name: value for name, value in body.items() if name != "usage"},
    "reasoning_outside": _reasoning_outside,
    "float_usage": partial(_usage, change=float),
    "negative_usage": partial(_usage, change=lambda count: -count),
    "huge_usage": partial(_usage, change=lambda _: 10**15),
    "text_usage": partial(_usage, change=lambda _: "many"),
    "null_counts": partial(_usage, change=lambda _: None),
    "cached_hits": partial(_cached, names=("prompt_cache_hit_tokens", "prompt_cache_miss_tokens")),
    "cached_beside": partial(_cached, names=("cached_tokens",)),
    # a tier that nobody asked for
    "priority": lambda body: {**body, "service_tier": "priority"},
    "fast": lambda body: {**body, "service_tier": "fast"},
}


def spoil(body: Json, fault: str | None) -> Json:
    """Return the answer as the fault leaves it: the same unless it is one of `SPOILERS`."""
    spoiler = SPOILERS.get(fault or "")
    return spoiler(body) if spoiler else body
