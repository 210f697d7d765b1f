"""Streams and pages in place of an answer: read where that needs no guess, else not bought again."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest
from wire_rows import (
    NO_ANSWER,
    SERVER,
    Row,
    check_alone,
    check_batch,
    check_drop_in,
    check_one,
    check_run,
    over,
)
from wire_server import USD, Reply, chat, response

pytestmark = pytest.mark.usefixtures("no_pauses", "few_certificates")
WHOLE = json.dumps(chat()).encode()
DONE = b"data: [DONE]\n\n"
EVENTS = "text/event-stream"


def event(body, name=None):
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(body).encode() + b"\n\n"


def chunk(delta, finish=None, **more):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"id": "c", "object": "chat.completion.chunk", "choices": [choice], **more})


def streamed(*, finish="stop", done=DONE):
    """An answer in chunks, its usage in the last."""
    usage = event({"id": "c", "object": "chat.completion.chunk", "choices": [], "usage": chat()["usage"]})
    model = {"model": "gpt-4o-mini"}
    begun = chunk({"role": "assistant", "content": ""}, **model) + chunk({"content": "ye"}, **model)
    return begun + chunk({"content": "s"}) + chunk({}, finish) + usage + done


def response_events(last, body):
    delta = event({"type": "response.output_text.delta", "delta": "yes"}, "response.output_text.delta")
    return delta + event({"type": last, "response": body}, last)


def page(content, kind="text/html; charset=utf-8", **more):
    return Reply(content.encode(), kind=kind, **more)


LOGIN = "<!DOCTYPE html><html><head><title>Sign in</title></head><body>Welcome</body></html>"
NGINX = "<html>\r\n<head><title>Welcome to nginx!</title></head>\r\n<body></body></html>"
WORDS = ("base_url",)
ONLINE = "one run drop-in"
STREAMS = [
    Row("an answer, then [DONE]", (Reply(WHOLE + b"\n\n" + DONE, usd=USD),), roads=ONLINE),
    Row("an answer, then [DONE] at once", (Reply(WHOLE + b"data: [DONE]", usd=USD),), roads=ONLINE),
    Row("an answer, then [DONE], as a stream", (Reply(WHOLE + b"\n" + DONE, kind=EVENTS, usd=USD),),
        roads=ONLINE),
    Row("one event with the whole answer", (Reply(event(chat()) + DONE, kind=EVENTS, usd=USD),),
        roads=ONLINE),
    Row("one event with the whole answer, said to be JSON", (Reply(event(chat()) + DONE, usd=USD),),
        roads=ONLINE),
    Row("a stream of chunks", (Reply(streamed(), kind=EVENTS, usd=USD),), NO_ANSWER, or_answer=True,
        retried=None, roads=ONLINE),
    Row("a stream of chunks, said to be JSON", (Reply(streamed(), usd=USD),), NO_ANSWER, or_answer=True,
        roads=ONLINE),
    Row("a stream without its end", (Reply(chunk({"content": "ye"}), kind=EVENTS),), NO_ANSWER, roads=ONLINE),
    Row("a stream of nothing", (Reply(DONE, kind=EVENTS),), NO_ANSWER, roads=ONLINE),
    Row("comments, then an answer", (Reply(b": PROCESSING\n\n: PROCESSING\n\n" + WHOLE, usd=USD),), NO_ANSWER,
        or_answer=True, roads=ONLINE),
    Row("an answer, then something else", (Reply(WHOLE + b" and more", usd=USD),), NO_ANSWER, or_answer=True,
        roads=ONLINE),
    Row("the events of a response",
        (Reply(response_events("response.completed", response()), kind=EVENTS, usd=USD),), api="responses",
        roads=ONLINE),
    Row("the events of a response that failed",
        (Reply(response_events("response.failed", response(
            None, status="failed", error={"code": "server_error", "message": "broke"}, usage=None,
        )), kind=EVENTS),), (SERVER, NO_ANSWER), calls=None, api="responses", roads=ONLINE),
    Row("a response, then [DONE]",
        (Reply(json.dumps(response()).encode() + b"\n\n" + DONE, usd=USD),), api="responses", roads=ONLINE),
]  # fmt: skip
PAGES = [
    Row("a login page", (page(LOGIN),), NO_ANSWER, evidence=True, words=WORDS),
    Row("a welcome page", (page(NGINX),), NO_ANSWER, evidence=True, words=WORDS),
    Row("a page that says it is JSON", (page(LOGIN, "application/json"),), NO_ANSWER, evidence=True,
        words=WORDS),
    Row("a page without a content type", (page(LOGIN, None),), NO_ANSWER, evidence=True, words=WORDS),
    Row("a page in capitals", (page("<!doctype HTML>\n<HTML></HTML>"),), NO_ANSWER, evidence=True,
        words=WORDS),
    Row("a page after a blank line", (page(f"\n  {LOGIN}"),), NO_ANSWER, evidence=True, words=WORDS),
    Row("a page of a web app", (page("<!--[if IE]><![endif]--><html><body></body></html>"),), NO_ANSWER,
        evidence=True, words=WORDS),
    Row("a page for the other API", (page(LOGIN),), NO_ANSWER, evidence=True, words=WORDS, api="responses"),
]  # fmt: skip


def with_head(*fields, body=WHOLE):
    """An answer with these header lines and no others."""
    lines = ["HTTP/1.1 200 OK", "content-type: application/json", *fields, "", ""]
    return Reply(raw="\r\n".join(lines).encode() + body, usd=USD, hang_up=True)


LENGTH = f"content-length: {len(WHOLE)}"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(WHOLE), WHOLE)
ZIPPED = gzip.compress(WHOLE)
FRAMES = [
    Row("Content-Length", (with_head(LENGTH),)),
    Row("no length: until the end", (with_head("connection: close"),)),
    Row("chunked", (with_head("transfer-encoding: chunked", body=CHUNKED),)),
    Row("Content-Length twice", (with_head(LENGTH, LENGTH),), calls=None, usd=USD, retried=0),
    Row("Content-Length beside chunked", (
        with_head(LENGTH, "transfer-encoding: chunked", body=CHUNKED),
    ), calls=None, usd=USD, retried=0),
    Row("two Server headers", (with_head("server: uvicorn", LENGTH, "server: nginx"),)),
    Row("two Date headers", (with_head("date: Sun, 06 Nov 1994 08:49:37 GMT", LENGTH, "date: x"),)),
    Row("two content types", (with_head("content-type: application/json", LENGTH),)),
    Row("gzip", (with_head("content-encoding: gzip", f"content-length: {len(ZIPPED)}", body=ZIPPED),)),
    Row("a header that is no ASCII", (with_head(LENGTH, "x-model: modèle"),)),
    Row("cut off in the middle", (
        Reply(raw=b"HTTP/1.1 200 OK\r\n" + LENGTH.encode() + b"\r\n\r\n" + WHOLE[:50], hang_up=True),
    ), "APIConnectionError", 3),
    Row("cut off, then answered", (
        Reply(raw=b"HTTP/1.1 200 OK\r\n" + LENGTH.encode() + b"\r\n\r\n" + WHOLE[:50], hang_up=True),
        Reply(usd=USD),
    ), calls=2),
    Row("hung up without an answer", (Reply(raw=b"", hang_up=True),), "APIConnectionError", 3),
    Row("what is no HTTP", (Reply(raw=b"SSH-2.0-OpenSSH_9.6\r\n", hang_up=True),), "APIConnectionError", 3),
]  # fmt: skip
ROWS = [*STREAMS, *PAGES, *FRAMES]


@over(ROWS, "one")
async def test_one_prompt(row, tmp_path):
    """The calls, the error or the answer, the bill, and whether a second client finds it in the cache."""
    await check_one(row, tmp_path / "cache.sqlite")


@over([*STREAMS, *PAGES], "run", every=2)
async def test_a_run_goes_on(row):
    """Beside prompts that are answered, one stream or page ends nothing."""
    await check_run(row)


@over(PAGES, "run")
async def test_pages_alone_end_a_run(row):
    """Three of them, before any answer, say that there is no API."""
    await check_alone(row)


@over(PAGES, "batch")
async def test_a_page_in_a_batch(row):
    """It is no answer there either, but no sign of a wrong address."""
    await check_batch(dataclasses.replace(row, words=()))


@over(ROWS, "drop-in", first=1, every=2)
async def test_the_drop_in_client_bills_the_same(row):
    """What the SDK makes of it is the SDK's."""
    await check_drop_in(row)
