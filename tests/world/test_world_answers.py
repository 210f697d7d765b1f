"""A 200 that is no answer: an error, of the kind that it names; billed where it says so, never cached."""

from __future__ import annotations

import dataclasses
import json

import pytest
from wire_rows import (
    BAD,
    DENIED,
    FOREVER,
    KEYS,
    LIMITED,
    NO_ANSWER,
    QUOTA,
    SERVER,
    Row,
    check_alone,
    check_batch,
    check_drop_in,
    check_one,
    check_run,
    over,
)
from wire_server import GOOD, GOOD_RESPONSE, USAGE, USD, Reply, chat, response

pytestmark = pytest.mark.usefixtures("no_pauses", "few_certificates")
PAID_RESPONSE = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}


def failed(code, message="The model failed.", usage=None, **more):
    """A response of the Responses API that failed."""
    error = {"code": code, "message": message}
    body = response(None, usage=usage, **{"status": "failed", "error": error, **more})
    return Reply(body, usd=USD if usage else "0")


def upstream(content="", code=502, message="Upstream", usage=None):
    """A choice that holds an error, as routers send it."""
    body = chat(content, finish="error", usage=usage)
    body["choices"][0]["error"] = {"code": code, "message": message}
    return Reply(body, usd=USD if usage else "0")


def bare(body, usd="0"):
    return Reply(body, usd=usd)


def choices(*items):
    return {**chat(), "choices": list(items)}


def message(given):
    return choices({"index": 0, "finish_reason": "stop", "message": given})


EITHER = (SERVER, NO_ANSWER)
RESPONSES = [
    Row("failed: server_error", (failed("server_error"),), EITHER, FOREVER, words=("The model failed.",)),
    Row("failed, then answered", (failed("server_error"), GOOD_RESPONSE), calls=2),
    Row("failed: rate_limit_exceeded", (failed("rate_limit_exceeded", "Slow."),), LIMITED, FOREVER),
    Row("failed: rate limit, then answered", (failed("rate_limit_exceeded"), GOOD_RESPONSE), calls=2),
    Row(
        "failed: rate limit with waits, patiently",
        (*[failed("rate_limit_exceeded", "Please try again in 5ms.")] * 4, GOOD_RESPONSE),
        calls=5,
    ),
    Row("failed: server_is_overloaded, then answered", (
        failed("server_is_overloaded", "Our servers are overloaded. Try again in 5ms."), GOOD_RESPONSE,
    ), calls=2),
    Row("failed and billed", (failed("server_error", usage=PAID_RESPONSE),), EITHER, FOREVER),
    Row("failed and billed, then answered", (failed("server_error", usage=PAID_RESPONSE), GOOD_RESPONSE),
        calls=2),
    Row("failed with half a text", (failed("server_error", output=response()["output"]),), EITHER, FOREVER),
    Row("failed: invalid_prompt", (failed("invalid_prompt", "Flagged."),), BAD, words=("Flagged.",)),
    Row("failed: image_content_policy_violation", (failed("image_content_policy_violation"),), BAD),
    Row("failed: invalid_image", (failed("invalid_image", "No image."),), (BAD, NO_ANSWER), calls=None),
    Row("failed: vector_store_timeout", (failed("vector_store_timeout"),), EITHER, FOREVER),
    Row("failed: insufficient_quota", (failed("insufficient_quota", "No credit."),), QUOTA, ends=True),
    Row("failed without an error", (failed(None, error=None),), EITHER, FOREVER),
    Row("failed, the error a text", (failed(None, error="broke down"),), EITHER, FOREVER,
        words=("broke down",)),
    Row("cancelled", (bare(response(None, status="cancelled", usage=None)),), NO_ANSWER, calls=None),
    Row("cancelled with half a text", (bare(response("ye", status="cancelled"), USD),), NO_ANSWER,
        calls=None),
    Row("an error beside the text", (bare(response(error={"code": "server_error", "message": "m"}), USD),),
        EITHER, FOREVER),
    Row("output: []", (bare(response(None), USD),), NO_ANSWER, calls=None),
    Row("output: null", (bare(response(output=None), USD),), NO_ANSWER, calls=None),
    Row("output: a text", (bare(response(output="yes"), USD),), NO_ANSWER, calls=None),
    Row("output: [null]", (bare(response(output=[None]), USD),), NO_ANSWER, calls=None),
    Row("a message without content", (bare(response(output=[{"type": "message"}]), USD),), NO_ANSWER,
        calls=None),
    Row("error: {} is none", (bare(response(error={}), USD),)),
    Row("no status", (bare({**response(), "status": None}, USD),)),
    Row("incomplete by length", (
        bare(response("ye", status="incomplete", incomplete_details={"reason": "max_output_tokens"}), USD),
    ), text="ye"),
    Row("incomplete by the filter", (
        bare(response("ye", status="incomplete", incomplete_details={"reason": "content_filter"}), USD),
    ), text="ye"),
    Row("incomplete without a reason", (bare(response("ye", status="incomplete"), USD),), text="ye"),
]  # fmt: skip

CHAT = [
    Row("a choice with an error", (upstream(),), SERVER, FOREVER, words=("Upstream",)),
    Row("a choice with an error, then answered", (upstream(), GOOD), calls=2),
    Row("half a text with an error", (upstream("half a"),), SERVER, FOREVER),
    Row("half a text, billed, then answered", (upstream("half a", usage=USAGE), GOOD), calls=2),
    Row("a choice with an error and a text for code", (upstream(code="502"),), SERVER, FOREVER),
    Row("a choice with a 429", (upstream(code=429, message="Busy"),), LIMITED, FOREVER, words=("Busy",)),
    Row("a choice with a 403 of moderation", (upstream(code=403, message="Input was flagged."),), DENIED),
    Row("a choice with a 402", (upstream(code=402, message="Credits"),), (QUOTA,), ends=True),
    Row("a choice with an error without code", (upstream(code=None),), EITHER, FOREVER, words=("Upstream",)),
    Row("finish_reason error alone", (bare(chat("", finish="error", usage=None)),), EITHER, FOREVER),
    Row("finish_reason error and a text", (bare(chat("half a", finish="error"), USD),), EITHER, FOREVER),
    Row("finish_reason error, then answered", (bare(chat("ha", finish="error"), USD), GOOD), calls=2),
    Row("a top-level error beside choices",
        (bare(chat(error={"code": 500, "message": "broke"}), USD),), SERVER, FOREVER, words=("broke",)),
    Row("a top-level error beside choices, then answered",
        (bare(chat("ha", error={"code": 504, "message": "broke"}), USD), GOOD), calls=2),
    Row("a text as error beside choices", (bare(chat(error="gone wrong"), USD),), EITHER, FOREVER,
        words=("gone wrong",)),
    Row("a rate limit beside choices", (bare(chat(error={"code": 429, "message": "Busy"}), USD),), LIMITED,
        FOREVER),
    Row("error: null beside choices", (bare(chat(error=None), USD),)),
    Row("error: {} beside choices", (bare(chat(error={}), USD),)),
    Row("error: text of nothing beside choices", (bare(chat(error=""), USD),)),
    Row("choices: []", (bare(choices(), USD),), NO_ANSWER, calls=None),
    Row("choices: [], then answered", (bare(choices(), USD), GOOD), calls=2),
    Row("choices: [] without usage", (bare({**chat(usage=None), "choices": []}),), NO_ANSWER, calls=None),
    Row("choices: [] with a 429", (bare({"choices": [], "error": {"code": 429, "message": "m"}}),), LIMITED,
        FOREVER),
    Row("choices: null", (bare({**chat(), "choices": None}, USD),), NO_ANSWER, calls=None),
    Row("choices: a text", (bare({**chat(), "choices": "yes"}, USD),), NO_ANSWER, calls=None),
    Row("choices: {}", (bare({**chat(), "choices": {}}, USD),), NO_ANSWER, calls=None),
    Row("choices: [null]", (bare(choices(None), USD),), NO_ANSWER, calls=None),
    Row("choices: [text]", (bare(choices("yes"), USD),), NO_ANSWER, calls=None),
    Row("a choice without a message", (bare(choices({"finish_reason": "stop"}), USD),), NO_ANSWER,
        calls=None),
    Row("message: null", (bare(message(None), USD),), NO_ANSWER, calls=None),
    Row("message: a text", (bare(message("yes"), USD),), NO_ANSWER, calls=None),
    Row("message: a list", (bare(message(["yes"]), USD),), NO_ANSWER, calls=None),
    Row("message: {}", (bare(message({}), USD),), NO_ANSWER, calls=None),
    Row("no choices at all", (bare({"id": "x", "object": "chat.completion"}),), NO_ANSWER, calls=None),
    Row("an error of a 200, as routers send it",
        (bare({"error": {"message": "Provider returned error", "code": 502}}),), SERVER, FOREVER,
        words=("Provider returned error",)),
    Row("an error of a 200, then answered", (bare({"error": {"message": "m", "code": 503}}), GOOD), calls=2),
    Row("a key refused in a 200", (bare({"error": {"message": "No auth", "code": 401}}),), KEYS,
        evidence=True, words=("No auth",)),
    Row("credit used up in a 200", (bare({"error": {"message": "Insufficient credits", "code": 402}}),),
        QUOTA, ends=True),
    Row("an error as a text in a 200", (bare({"error": "model is loading"}),), EITHER, calls=None,
        words=("model is loading",)),
    Row("an error as FastAPI has it in a 200", (bare({"detail": "no worker is free"}),), EITHER, calls=None,
        words=("no worker is free",)),
    Row("an error as older vLLM has it in a 200",
        (bare({"object": "error", "message": "out of memory", "type": "InternalServerError", "code": 500}),),
        SERVER, FOREVER, words=("out of memory",)),
    Row("an error with success: false in a 200",
        (bare({"code": 500, "msg": "404 NOT_FOUND", "success": False}),), EITHER, calls=None,
        words=("404 NOT_FOUND",)),
    Row("a list with an error in a 200", (bare([{"error": {"code": 503, "message": "The tank is empty."}}]),),
        EITHER, FOREVER, words=("The tank is empty.",)),
]  # fmt: skip

WHOLE = json.dumps(chat()).encode()
USAGE_FIRST = json.dumps({"id": "x", "model": "gpt-4o-mini", "usage": USAGE, **chat(usage=None)}).encode()
BYTES = [
    Row("truncated JSON", (Reply(WHOLE[:90]),), NO_ANSWER, FOREVER),
    Row("truncated JSON, then answered", (Reply(WHOLE[:90]), GOOD), calls=2),
    Row("truncated JSON that states its usage", (Reply(USAGE_FIRST[:-40], usd=USD), GOOD), calls=2),
    Row("an empty body", (Reply(b""),), NO_ANSWER, calls=None),
    Row("null", (Reply(b"null"),), NO_ANSWER, calls=None),
    Row("a list", (Reply(b"[]"),), NO_ANSWER, calls=None),
    Row("a list of an answer", (Reply(b"[" + WHOLE + b"]", usd=USD),), NO_ANSWER, calls=None, usd=None,
        retried=None, or_answer=True, roads="run"),
    Row("a text", (Reply(b'"yes"'),), NO_ANSWER, calls=None),
    Row("true", (Reply(b"true"),), NO_ANSWER, calls=None),
    Row("a health check", (Reply({"status": "ok"}),), NO_ANSWER, calls=None),
    Row("plain text", (Reply(b"OK", kind="text/plain"),), NO_ANSWER, calls=None),
    Row("no content", (Reply(b"", 204),), NO_ANSWER, calls=None, roads="one run"),
    Row("two answers in one body", (Reply(WHOLE + b"\n" + WHOLE),), NO_ANSWER, calls=None, roads="run"),
    Row("a byte order mark", (Reply(b"\xef\xbb\xbf" + WHOLE, usd=USD),), roads="one run drop-in"),
    Row("blank lines before the answer", (Reply(b"\n\n   \n" + WHOLE, usd=USD),)),
    Row("another content type", (Reply(WHOLE, kind="text/plain", usd=USD),), roads="one run batch"),
    Row("no content type", (Reply(WHOLE, kind=None, usd=USD),), roads="one run batch"),
    Row("an answer that says it is HTML", (Reply(WHOLE, kind="text/html", usd=USD),), roads="one run batch"),
]  # fmt: skip


ROWS = [*(dataclasses.replace(row, api="responses") for row in RESPONSES), *CHAT, *BYTES]


@over(ROWS, "one")
async def test_one_prompt(row, tmp_path):
    """The calls, the error or the answer, the bill, and whether a second client finds it in the cache."""
    await check_one(row, tmp_path / "cache.sqlite")


@over(ROWS, "run", every=2)
async def test_a_run_goes_on_or_ends(row):
    """Beside prompts that are answered."""
    await check_run(row)


@over(ROWS, "batch")
async def test_the_same_in_a_batch(row):
    """Such a body in the output of a batch means the same, at half the price."""
    await check_batch(row)


@over(ROWS, "drop-in", first=1, every=2)
async def test_the_drop_in_client_bills_the_same(row):
    """What the SDK makes of it is the SDK's."""
    await check_drop_in(row)


@over([row for row in CHAT if row.error and row.evidence], "run")
async def test_a_run_of_nothing_else(row):
    """Three different prompts that meet the same refusal end a run in which nothing was answered."""
    await check_alone(row)
