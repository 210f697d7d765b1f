"""Whole answers of a bounded size, packed or not, on either transport."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import resource
import zlib

import pytest
from raw_server import ANSWER, listening, whole

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, ResponseTooLargeError
from openai_eval_client._sdk.reading import _decode
from openai_eval_client._sdk.transport import default_client
from openai_eval_client.errors import sdk_httpx

pytestmark = pytest.mark.usefixtures("few_certificates", "no_pauses")
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
MIB = 2**20
LIMIT = MIB


def packed(megabytes: int) -> bytes:
    """Spaces, gzipped a thousandfold."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(b" " * MIB) for _ in range(megabytes)) + packer.flush()


BOMBS = {
    "plain": whole(b" " * (LIMIT + 1)),
    "in chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    % (LIMIT + 1, b" " * (LIMIT + 1)),
    "gzip": whole(packed(200), "content-encoding: gzip"),
    "deflate": whole(zlib.compress(b" " * (20 * MIB)), "content-encoding: deflate"),
    "gzip twice": whole(gzip.compress(packed(500)), "content-encoding: gzip, gzip"),
    "an error": whole(packed(20), "content-encoding: gzip", status="500 Internal Server Error"),
}


def client_of(kind: str, url: str):
    """Our own client, and the SDK's default transport below the drop-in one."""
    if kind == "ours":
        return OpenAIClient(OpenAIConfig(api_key="sk-a", base_url=url, max_response_bytes=LIMIT))
    return AsyncOpenAI(api_key="sk-a", base_url=url, http_client=default_client(LIMIT))


@pytest.mark.parametrize("kind", ["ours", "client.openai", "drop-in"])
@pytest.mark.parametrize("reply", BOMBS.values(), ids=BOMBS)
async def test_an_answer_that_is_too_large_is_asked_for_once(reply: bytes, kind: str) -> None:
    """The error names the limit, nothing is sent again, and the attempt may have been billed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with listening(*[reply] * 4) as (url, seen):
        async with client_of("drop-in" if kind == "drop-in" else "ours", url) as client:
            sdk = getattr(client, "openai", client)
            calls = {"ours": lambda: client.generate_response("hi")}
            call = calls.get(kind, lambda: sdk.chat.completions.create(**CHAT))
            with pytest.raises(ResponseTooLargeError, match=f"max_response_bytes={LIMIT}") as caught:
                await call()
        cost = client.stats.cost
    assert caught.value.limit == LIMIT
    assert len(seen) == 1
    assert (cost.unaccounted, cost.total) == (1, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB, of 500 MB


async def test_the_error_of_a_stream_is_bounded_too() -> None:
    """It is read whole, as the SDK does."""
    reply = whole(packed(20), "content-encoding: gzip", status="400 Bad Request")
    async with listening(reply) as (url, _), client_of("ours", url) as client:
        with pytest.raises(ResponseTooLargeError):
            await client.openai.chat.completions.create(**CHAT, stream=True)


@pytest.mark.parametrize("kind", ["ours", "drop-in"])
async def test_a_file_may_have_any_size(kind: str) -> None:
    """The results of a batch are longer than any answer."""
    async with listening(whole(b"x" * (3 * MIB))) as (url, _), client_of(kind, url) as client:
        file = await getattr(client, "openai", client).files.content("file-1")
    assert len(file.content) == 3 * MIB


@pytest.mark.parametrize("kind", ["ours", "drop-in"])
@pytest.mark.parametrize(
    "reply",
    [
        whole(gzip.compress(ANSWER + b" " * 100_000), "content-encoding: gzip"),
        whole(gzip.compress(zlib.compress(ANSWER)), "content-encoding: deflate, GZIP"),
        whole(ANSWER, "content-encoding: identity"),
        whole(ANSWER, "content-encoding: unheard-of"),
        whole(gzip.compress(ANSWER + b" " * (LIMIT - len(ANSWER))), "content-encoding: gzip"),
    ],
    ids=["gzip", "twice", "identity", "unknown", "as large as allowed"],
)
async def test_what_is_not_too_large_is_read(reply: bytes, kind: str) -> None:
    """However it is packed; what stands in the headers stays there."""
    async with listening(reply) as (url, _), client_of(kind, url) as client:
        raw = await getattr(client, "openai", client).chat.completions.with_raw_response.create(**CHAT)
    assert raw.parse().choices[0].message.content == "yes"
    assert "content-encoding" in raw.http_response.headers


def test_too_many_codings_are_refused() -> None:
    """Each multiplies what a decoder may have to do."""
    with pytest.raises(sdk_httpx().DecodingError):
        _decode(b"", ["gzip"] * 6, sdk_httpx().Request("GET", "http://a"), LIMIT)


@pytest.mark.parametrize(("coding", "library"), [("br", "brotli"), ("zstd", "zstandard")])
def test_other_codings_are_bounded_where_they_are_installed(coding: str, library: str) -> None:
    """A few bytes of brotli are many megabytes."""
    module = pytest.importorskip(library)
    if importlib.util.find_spec("httpx2") and coding == "zstd":
        pytest.skip("httpx2 has another library for it")
    bomb = module.compress(b" " * (100 * MIB))
    with pytest.raises(ResponseTooLargeError):
        _decode(bomb, [coding], sdk_httpx().Request("GET", "http://a"), LIMIT)


async def test_a_long_answer_is_decoded_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one is decoded on it, which is faster."""
    threads = []

    async def to_thread(function, *arguments):
        threads.append(function)
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    short, long = (gzip.compress(ANSWER + b" " * size, compresslevel=0) for size in (0, 100_000))
    for body, expected in ((short, 0), (long, 1)):
        threads.clear()
        reply = whole(body, "content-encoding: gzip")
        async with listening(reply) as (url, _), default_client(LIMIT) as client:
            await client.post(f"{url}/a", content=b"{}")
        assert threads.count(_decode) == expected
