"""Bodies of errors in every shape: the server's words stand in the message, and no body breaks anything."""

from __future__ import annotations

import openai
import pytest
from wire_rows import (
    BAD,
    FOREVER,
    KEY,
    LIMITED,
    SERVER,
    Row,
    check_batch,
    check_drop_in,
    check_one,
    check_run,
    connect,
    over,
)
from wire_server import Reply, serving

pytestmark = pytest.mark.usefixtures("no_pauses", "few_certificates")
WORDS = "the tank is empty"
SHAPES = {
    "OpenAI's": {"error": {"message": WORDS, "type": "x", "param": None, "code": None}},
    "a text as error": {"error": WORDS},
    "a list of texts as error": {"error": [WORDS]},
    "an error with a number for message": {"error": {"message": 5, "detail": WORDS}},
    "a message in a message": {"error": {"message": {"message": WORDS}}},
    "an error in an error": {"error": {"error": {"message": WORDS}}},
    "JSON as a text in the message": {"error": {"message": '{"error": {"message": "the tank is empty"}}'}},
    "a message": {"message": WORDS},
    "FastAPI's": {"detail": WORDS},
    "FastAPI's validation": {"detail": [{"loc": ["body"], "msg": WORDS, "type": "missing"}]},
    "FastAPI's with an object": {"detail": {"error": WORDS}},
    "older vLLM's": {"object": "error", "message": WORDS, "type": "x", "code": 40303},
    "Mistral's": {"object": "error", "message": {"detail": [{"msg": WORDS}]}, "type": "x"},
    "Cohere's": {"id": "1", "message": WORDS},
    "Spring's": {"timestamp": 1, "status": 400, "error": "Bad Request", "message": WORDS, "path": "/"},
    "RFC 9457's": {"type": "about:blank", "title": "Failed", "detail": WORDS},
    "xAI's": {"code": "Some code", "error": WORDS},
    "Kong's": {"message": WORDS, "request_id": "1"},
    "msg": {"code": 500, "msg": WORDS, "success": False},
    "Cloudflare's": {"success": False, "errors": [{"code": 5, "message": WORDS}], "result": None},
    "NestJS's": {"statusCode": 400, "message": WORDS, "error": "Bad Request"},
    "Google's": [{"error": {"code": 400, "message": WORDS, "status": "X", "details": []}}],
    "a list of texts": [WORDS],
    "a JSON text": WORDS,
    "plain text": f"Error: {WORDS}\n".encode(),
    "JSON cut short": f'{{"error": {{"message": "{WORDS}"'.encode(),
    "not quite UTF-8": f"{WORDS} \xe9".encode("latin-1"),
    "after a byte order mark": f'\ufeff{{"error": "{WORDS}"}}'.encode(),
}
EMPTY = {
    "no body": b"",
    "blanks": b"  \n",
    "null": b"null",
    "false": b"false",
    "a number": b"5",
    "NaN": b"NaN",
    "{}": b"{}",
    "[]": b"[]",
    "[null]": b"[null]",
    "error: null": b'{"error": null}',
    "error: a number": b'{"error": 5}',
    "error: []": b'{"error": []}',
    "an empty message": b'{"error": {"message": ""}}',
    "nulls": b'{"error": {"message": null, "type": null, "code": null, "param": null}}',
    "lists": b'{"error": {"message": ["m"], "type": ["t"], "code": ["c"], "param": ["p"]}}',
    "objects": b'{"error": {"message": {"a": 1}, "type": {"b": 2}, "code": {"c": 3}}}',
    "half a surrogate pair": b'{"error": {"message": "\\ud800"}}',
    "a NUL": b'{"error": {"message": "a\\u0000b"}}',
    "bytes": bytes(range(256)),
    "deep": b"[" * 3000 + b"]" * 3000,
    "a long text": b"x" * 300_000,
}
ERRORS = {400: (BAD, 1), 429: (LIMITED, FOREVER), 500: (SERVER, FOREVER)}


def rows(shapes, status, *words):
    error, calls = ERRORS[status]
    for name, body in shapes.items():
        kind = "text/plain" if name == "plain text" else "application/json"
        reply = Reply(body, status, kind=kind)
        yield Row(f"{status}, {name}", (reply,), error, calls, words=words, cut=status == 429)


WORDY, LIMITS, FAILURES = (list(rows(SHAPES, status, WORDS)) for status in ERRORS)
WORDLESS, WORDLESS_LIMITS, WORDLESS_FAILURES = (list(rows(EMPTY, status)) for status in ERRORS)
ROWS = [*WORDY, *WORDLESS]


@over([*WORDY, *LIMITS[::5], *FAILURES[::5]], "one")
async def test_the_servers_words_stand_in_the_message(row, tmp_path):
    """In whatever shape they come."""
    await check_one(row, tmp_path / "cache.sqlite")


@over([*WORDLESS, *WORDLESS_LIMITS[::5], *WORDLESS_FAILURES[::5]], "one")
async def test_no_body_breaks_anything(row, tmp_path):
    """The class of the error is that of the status."""
    await check_one(row, tmp_path / "cache.sqlite")


@over([*WORDY, *FAILURES], "run", every=5)
async def test_they_stand_in_the_failed_row(row):
    """And the run goes on."""
    await check_run(row)


@over([*WORDY, *WORDLESS, *LIMITS, *WORDLESS_FAILURES], "batch", every=3)
async def test_they_stand_in_the_failed_line(row):
    """A batch holds the same bodies."""
    await check_batch(row)


@over([*LIMITS, *WORDLESS_LIMITS], "drop-in", every=2)
async def test_the_limiter_reads_the_same_for_the_drop_in_client(row):
    """The error itself is the SDK's."""
    await check_drop_in(row)


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
async def test_a_key_in_a_body_stays_there(status):
    """Servers echo what they refuse; the error does not."""
    for body in (
        {"error": {"message": f"bad key {KEY}"}},
        {"detail": f"no {KEY}"},
        f"{KEY}?".encode(),
        [KEY],
    ):
        async with serving({"prompt": (Reply(body, status),)}) as server, connect(server) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.generate_response("a prompt")
            error = caught.value
            assert KEY not in f"{error} {error!r} {error.body} {error.args} {error.response.content!r}"
