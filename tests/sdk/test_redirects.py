"""Redirects: a body is posted once, no credential goes to another server; answers that are announced."""

from __future__ import annotations

import contextlib
import json

import openai
import pytest
from raw_server import ANSWER, listening, whole

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig
from openai_eval_client._sdk.redirects import _drop_secrets, _is_same_server
from openai_eval_client.errors import sdk_httpx

pytestmark = pytest.mark.usefixtures("few_certificates")
KEY = "sk-hidden-redirect-key"
CREDENTIALS = {
    "api-key": "hidden-1", "X-API-Key": "hidden-2", "x-gateway-token": "hidden-3", "Cookie": "a=hidden-4",
    "Ocp-Apim-Subscription-Key": "hidden-5", "x-upstream": "Bearer hidden-6", "x-client-secret": "hidden-7",
}  # fmt: skip
HEADERS = {**CREDENTIALS, "x-run": "7"}
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}], "extra_headers": HEADERS}
EVENTS = b'data: {"choices":[{"index":0,"delta":{"content":"yes"}}]}\n\ndata: [DONE]\n\n'


@contextlib.asynccontextmanager
async def client_of(kind: str, url: str):
    """A client of ours, on our transport, on the SDK's, and the drop-in one."""
    if kind == "drop-in":
        async with AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0) as client:
            yield client
        return
    http_client = openai.DefaultAsyncHttpxClient() if kind == "theirs" else None
    config = OpenAIConfig(api_key=KEY, base_url=url, max_retries=0)
    async with OpenAIClient(config, http_client=http_client) as client:
        yield client


async def ask(client: OpenAIClient | AsyncOpenAI, call: str) -> str:
    """Make one call, and return the text of its answer."""
    if call == "own":
        return (await client.generate_response("hi", extra_headers=HEADERS)).content
    sdk = getattr(client, "openai", client)
    if call == "chat":
        return (await sdk.chat.completions.create(**CHAT)).choices[0].message.content
    if call == "upload":
        file = await sdk.files.create(file=("a", b"yes"), purpose="batch", extra_headers=HEADERS)
        return "yes" if file.id == "x" else ""
    stream = await sdk.chat.completions.create(**CHAT, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


CALLS = [
    *[("ours", call) for call in ("own", "chat", "stream", "upload")],
    *[("theirs", call) for call in ("own", "chat", "stream")],
    *[("drop-in", call) for call in ("chat", "stream", "upload")],
]


@pytest.mark.parametrize(("kind", "call"), CALLS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_body_is_posted_once_and_credentials_stay(status: int, kind: str, call: str) -> None:
    """A 307 and a 308 keep method and body, the others become a GET; another port is another server."""
    answer = whole(EVENTS) if call == "stream" else whole()
    async with listening(answer, answer) as (target, second):
        moved = whole(b"{}", f"location: {target}/chat/completions", status=f"{status} Moved")
        async with listening(*[moved] * 3) as (url, first), client_of(kind, url) as client:
            assert await ask(client, call) == "yes"
    assert len(first) == len(second) == 1
    assert all(value.encode() in first[0] for value in CREDENTIALS.values() if "hidden-4" not in value)
    head, _, body = second[0].partition(b"\r\n\r\n")
    assert b"hidden" not in head
    assert b"x-run: 7" in head.lower()
    assert head.startswith(b"POST" if status in {307, 308} else b"GET")
    assert body == (first[0].partition(b"\r\n\r\n")[2] if status in {307, 308} else b"")


async def test_the_same_server_sees_the_credentials_again() -> None:
    """Where it redirects to another path of its own."""
    moved = whole(b"", "location: /v2/chat/completions", status="307 Temporary Redirect")
    async with listening(moved, whole()) as (url, seen), client_of("ours", url) as client:
        raw = await client.openai.chat.completions.with_raw_response.create(**CHAT)
        attempts = client.stats.attempts
    assert [head.split()[1] for head in seen] == [b"/v1/chat/completions", b"/v2/chat/completions"]
    assert all(KEY.encode() in head for head in seen)
    assert [response.status_code for response in raw.http_response.history] == [307]
    assert attempts == 1


async def test_a_redirect_may_be_taken_as_an_answer() -> None:
    """A client that follows none sends one request."""
    moved = whole(b"", "location: /v2", status="307 Temporary Redirect")
    async with listening(moved, moved) as (url, seen), client_of("ours", url) as client:
        client._http.follow_redirects = False
        with pytest.raises(openai.APIStatusError) as caught:
            await client.openai.with_options(max_retries=0).chat.completions.create(**CHAT)
    assert caught.value.status_code == 307
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["ours", "drop-in"])
async def test_redirects_in_a_circle_end(kind: str) -> None:
    """After as many as httpx follows; a transport that reads HTTP is not exchanged for it."""
    moved = whole(b"", "location: /v1/chat/completions", status="307 Temporary Redirect")
    async with listening(*[moved] * 40) as (url, seen), client_of(kind, url) as client:
        with pytest.raises(openai.APIConnectionError):
            await ask(client, "chat") if kind == "drop-in" else await ask(client, "own")
    assert len(seen) == 21


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("https://a/v1", "https://a:443/v2", True),
        ("https://a/v1", "https://A/v2", True),
        ("http://a/v1", "https://a/v1", True),
        ("https://a/v1", "http://a/v1", False),
        ("http://a:80/v1", "https://a:444/v1", False),
        ("http://a:8000/v1", "https://a/v1", False),
        ("https://a/v1", "https://a:8443/v1", False),
        ("https://a/v1", "https://a.evil/v1", False),
        ("https://a/v1", "https://a@evil/v1", False),
        ("http://a/v1", "https://b/v1", False),
    ],
)
def test_which_address_is_the_same_server(before: str, after: str, same: bool) -> None:
    """The same scheme, host and port; or the same host with TLS instead of none, at the usual ports."""
    url = sdk_httpx().URL
    assert _is_same_server(url(before), url(after)) is same


def test_what_is_no_credential_is_kept() -> None:
    """What the request is about, and the key by which a server knows it again."""
    kept = {
        "content-type": "application/json",
        "idempotency-key": "stainless-python-retry-1",
        "x-stainless-os": "a",
    }
    headers = sdk_httpx().Headers({**kept, **CREDENTIALS, "authorization": f"Bearer {KEY}"})
    _drop_secrets(headers)
    assert dict(headers) == kept


EARLY = {
    "early hints": b"HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n",
    "three": b"HTTP/1.1 102 Processing\r\n\r\n" * 3,
    "with a length": b"HTTP/1.1 103 Early Hints\r\ncontent-length: 5\r\n\r\n",
}


@pytest.mark.parametrize("early", EARLY.values(), ids=EARLY)
@pytest.mark.parametrize(("kind", "call"), [("ours", "own"), ("ours", "stream"), ("drop-in", "chat")])
async def test_what_announces_an_answer_is_none(kind: str, call: str, early: bytes) -> None:
    """Statuses of 1xx are skipped, with headers of their own and several in a row."""
    answer = whole(EVENTS if call == "stream" else ANSWER)
    async with listening(early + answer) as (url, seen), client_of(kind, url) as client:
        assert await ask(client, call) == "yes"
    assert len(seen) == 1
    assert json.loads(seen[0].partition(b"\r\n\r\n")[2])["model"]
