"""The connections of a client: the SDK's requests, errors in httpx's terms, nothing left open."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import pickle
import ssl
import sys
import zlib

import openai
import pytest
from raw_server import ANSWER, listening, whole

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client.errors import TimeoutError as OurTimeout
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

KEY = "sk-secret-transport-key"
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}


def connect(url: str, **config) -> OpenAIClient:
    return OpenAIClient(OpenAIConfig(api_key=KEY, base_url=url, max_retries=0, **config))


def headers_of(request: bytes) -> dict[str, str]:
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


@pytest.mark.parametrize("caller", ["ours", "openai"])
async def test_the_request_is_the_one_that_the_sdk_sends(caller: str) -> None:
    """The same headers and the same body, but for what HTTP libraries say of the connection."""
    async with listening(whole()) as (url, sent), openai.AsyncOpenAI(api_key=KEY, base_url=url) as raw:
        await raw.chat.completions.create(**CHAT)
    async with listening(whole()) as (url, mine), connect(url) as client:
        if caller == "ours":
            await client.generate_response("hi", model="gpt-4o-mini")
        else:
            await client.openai.chat.completions.create(**CHAT)
    theirs, ours = headers_of(sent[0]), headers_of(mine[0])
    silent = {"connection", "host", "x-stainless-read-timeout"}
    assert {k: v for k, v in ours.items() if k not in silent} == {
        k: v for k, v in theirs.items() if k not in silent
    }
    assert json.loads(mine[0].partition(b"\r\n\r\n")[2]) == json.loads(sent[0].partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize(
    "reply",
    [
        whole(gzip.compress(ANSWER), "content-encoding: gzip"),
        whole(zlib.compress(ANSWER), "content-encoding: deflate"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(ANSWER), ANSWER),
        whole(ANSWER, f"content-security-policy: {'x' * 20_000}"),
        whole(ANSWER, "set-cookie: a=b", "X-Odd: na\u00efve".encode("latin-1").decode("latin-1")),
    ],
    ids=["gzip", "deflate", "chunked", "long header", "odd headers"],
)
async def test_however_an_answer_is_packed_it_is_read(reply: bytes) -> None:
    """Compressed or in chunks, with headers that are long or not ASCII."""
    async with listening(reply, reply) as (url, _), connect(url) as client:
        assert (await client.generate_response("hi")).content == "yes"
        answer = await client.openai.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "yes"


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (b"", "ReadError"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{", "ReadError"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "RemoteProtocolError"),
        (whole(b"no gzip", "content-encoding: gzip"), "DecodingError"),
    ],
    ids=["dropped", "cut short", "no HTTP", "no gzip"],
)
async def test_a_broken_answer_is_a_connection_error(reply: bytes, cause: str) -> None:
    """It is the SDK's, caused by one of httpx's, for both kinds of call; no message shows the key."""
    async with listening(reply, reply, hang_up=True) as (url, _), connect(url) as client:
        sdk = client.openai.with_options(max_retries=0)
        for call in (client.generate_response, lambda _: sdk.chat.completions.create(**CHAT)):
            with pytest.raises(openai.APIConnectionError) as caught:
                await call("hi")
            assert not isinstance(caught.value, openai.APITimeoutError)
            causes = []
            error: BaseException | None = caught.value
            while error is not None:
                causes.append(type(error).__name__)
                assert KEY not in f"{error} {error!r} {error.args}"
                error = error.__cause__
            assert cause in causes
        assert client.stats.attempts == 2


def twice(*lines: str, body: bytes = ANSWER) -> bytes:
    """An answer in which headers contradict or repeat each other."""
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode() + body


LENGTH, IN_CHUNKS = f"content-length: {len(ANSWER)}", "transfer-encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(ANSWER), ANSWER)
LOOSE = {
    "the length twice": twice(LENGTH, LENGTH),
    "the length twice in one": twice(f"{LENGTH}, {len(ANSWER)}"),
    "length and chunks": twice(LENGTH, IN_CHUNKS, body=CHUNKS),
    "chunks and length": twice(IN_CHUNKS, LENGTH, body=CHUNKS),
    "two servers": twice(LENGTH, "server: one", "server: two"),
    "two dates and types": twice(LENGTH, *["date: now", "content-type: text/plain", "etag: a"] * 2),
    "many headers": twice(LENGTH, *(f"x-{number}: {number}" for number in range(300))),
}


@pytest.mark.usefixtures("no_pauses", "few_certificates")
@pytest.mark.parametrize("caller", ["ours", "openai", "stream"])
@pytest.mark.parametrize("reply", LOOSE.values(), ids=LOOSE)
async def test_what_the_sdk_reads_is_read(reply: bytes, caller: str, caplog) -> None:
    """Where aiohttp is stricter, one attempt fails, all later ones go through the SDK's own transport."""
    async with listening(*[reply] * 4) as (url, seen):
        async with openai.AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0) as raw:
            theirs = await raw.chat.completions.create(**CHAT)
        config = OpenAIConfig(api_key=KEY, base_url=url, max_retries=1)
        async with OpenAIClient(config) as client:
            for _ in range(2):
                if caller == "ours":
                    text = (await client.generate_response("hi")).content
                elif caller == "openai":
                    text = (await client.openai.chat.completions.create(**CHAT)).choices[0].message.content
                else:
                    create = client.openai.chat.completions.with_streaming_response.create
                    async with create(**CHAT) as answer:
                        text = json.loads(await answer.read())["choices"][0]["message"]["content"]
                assert text == theirs.choices[0].message.content == "yes"
        attempts = client.stats.attempts
    changes = [each for each in caplog.records if getattr(each, "event", "") == "transport_changed"]
    assert len(seen) == attempts + 1 == len(changes) + 3
    assert len(changes) <= 1


@pytest.mark.usefixtures("few_certificates")
async def test_an_answer_that_no_transport_reads_says_what_is_wrong() -> None:
    """With lengths that differ; the way out is named, and the key is not."""
    reply = twice(LENGTH, "content-length: 7")
    async with listening(reply, reply) as (url, _), connect(url) as client:
        with pytest.raises(openai.APIConnectionError, match=r"not valid HTTP.*http_client=") as caught:
            await client.generate_response("hi")
        assert KEY not in str(caught.value)
        with pytest.raises(openai.APIConnectionError, match="conflicting Content-Length"):
            await client.generate_response("hi")
        assert not client._http.is_closed
    assert client._http.is_closed


async def test_silence_is_a_timeout() -> None:
    """It is ours after our own deadline, and the SDK's after the SDK's."""
    async with listening(None, None) as (url, _), connect(url, timeout=0.1) as client:
        with pytest.raises(OurTimeout):
            await client.generate_response("hi")
    async with listening(None) as (url, _), connect(url, timeout=0.1) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.openai.with_options(max_retries=0).chat.completions.create(**CHAT)


async def test_a_name_that_is_not_found_in_time_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up is a part of connecting."""

    async def silence(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", silence)
    async with connect("http://nowhere.invalid/v1", timeout=0.1) as client:
        with pytest.raises(openai.APITimeoutError):
            await asyncio.wait_for(
                client.openai.with_options(max_retries=0).chat.completions.create(**CHAT), 5
            )


async def test_an_answer_says_how_long_it_took() -> None:
    """An answer of the SDK's own client does so too."""
    async with listening(whole()) as (url, _), connect(url) as client:
        answer = await client.openai.chat.completions.with_raw_response.create(**CHAT)
    assert answer.elapsed.total_seconds() > 0


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
async def test_a_response_is_read_and_pickled_as_httpxs_own(packed: bool) -> None:
    """It is read in whole, in pieces, as text; a pickle of it needs only httpx's class."""
    reply = whole(gzip.compress(ANSWER), "content-encoding: gzip") if packed else whole()
    async with listening(reply) as (url, _), connect(url) as client:
        raw = await client.openai.chat.completions.with_raw_response.create(**CHAT)
    mine = raw.http_response
    assert b"openai_eval_client" not in pickle.dumps(mine)
    again = pickle.loads(pickle.dumps(mine))  # noqa: S301
    assert type(again) is sdk_httpx().Response
    for response in (mine, again):
        assert response.is_closed
        assert response.content == response.read() == await response.aread() == ANSWER
        assert b"".join(response.iter_bytes(7)) == b"".join(response.iter_bytes()) == ANSWER
        assert response.json() == json.loads(response.text) == json.loads(ANSWER)
    with pytest.raises(sdk_httpx().StreamConsumed):
        next(mine.iter_raw())


@pytest.mark.parametrize("name", ["Host", "content-length", "Accept-Encoding"])
async def test_a_header_of_the_callers_own_is_sent_once(name: str) -> None:
    """The one that HTTP libraries would add is left out."""
    async with listening(whole()) as (url, sent), connect(url) as client:
        content = json.dumps(CHAT, separators=(",", ":"))
        value = {"Host": "elsewhere.test", "content-length": str(len(content))}.get(name, "identity")
        create = client.openai.chat.completions.with_raw_response.create
        answer = await create(**CHAT, extra_headers={name: value})
    assert answer.http_request.headers.get_list(name) == [value]
    lines = sent[0].partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    assert [line for line in lines if line.startswith(f"{name.lower()}:")] == [f"{name.lower()}: {value}"]


async def test_a_redirect_is_followed_as_httpx_does() -> None:
    """A 307 keeps method and body."""
    async with listening(whole()) as (target, seen):
        elsewhere = whole(b"", f"location: {target}/chat/completions", status="307 Temporary Redirect")
        async with listening(elsewhere, elsewhere) as (url, _), connect(url) as client:
            assert (await client.generate_response("hi")).content == "yes"
    assert json.loads(seen[0].partition(b"\r\n\r\n")[2])["messages"] == CHAT["messages"]


async def test_there_are_as_many_connections_as_requests_in_flight() -> None:
    """Connections are reused, and closed with the client."""
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=100)
    with SimulatedServer(latency=0.05) as server:
        async with OpenAIClient(
            OpenAIConfig(api_key=KEY, base_url=server.base_url), rate_limit=limits
        ) as client:
            await client.batch_generate(["x"] * 1000)
            assert 1 < server.connections <= 100
        for _ in range(200):
            if not server.connections:
                break
            await asyncio.sleep(0.02)
        assert server.connections == 0


async def test_a_stream_that_is_left_hands_its_connection_back() -> None:
    """Read to the end, it is reused; left early, it is closed."""
    with SimulatedServer() as server:
        async with connect(server.base_url) as client:
            for _ in range(3):
                stream = await client.openai.chat.completions.create(**CHAT, stream=True)
                assert "".join(
                    [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
                )
            assert server.connections == 1
            left = await client.openai.chat.completions.create(**CHAT, stream=True)
            await anext(aiter(left))
            await left.close()
            await client.openai.models.list()
            assert server.connections == 1


@pytest.mark.parametrize("trusted", [True, False])
async def test_certificates_are_checked(trusted: bool, monkeypatch, tmp_path) -> None:
    """What httpx trusts is trusted, SSL_CERT_FILE too; an unknown one ends the run: no connection."""
    if sys.version_info < (3, 11):
        pytest.skip("asyncio leaves its TLS transports to the garbage collector there, which warns")
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(tls)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with listening(whole(), tls=tls) as (url, seen), connect(url) as client:
        if trusted:
            assert (await client.generate_response("hi")).content == "yes"
            return
        with pytest.raises(openai.APIConnectionError, match="certificate"):
            await client.batch_generate(["hi"] * 50)
        assert seen == []


BROKEN = {
    "a SOCKS proxy without its package": ({"HTTPS_PROXY": "socks5://me:qx:zj@127.0.0.1:1080"}, ImportError),
    "a proxy for all": ({"ALL_PROXY": "socks5://me:qx:zj@127.0.0.1:1080"}, ImportError),
    "a port that is no number": ({"https_proxy": "http://me:qx/zj@127.0.0.1:80a"}, sdk_httpx().InvalidURL),
    "a scheme that no proxy has": ({"HTTPS_PROXY": "ftp://me:qx:zj@127.0.0.1:80"}, ValueError),
    "no such file": ({"SSL_CERT_FILE": "/nowhere/certificates.pem"}, FileNotFoundError),
    "a file without certificates": ({"SSL_CERT_FILE": __file__}, ssl.SSLError),
}


@pytest.fixture
def no_proxy(monkeypatch):
    """An environment without proxies."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(("variables", "kind"), BROKEN.values(), ids=BROKEN)
def test_a_broken_environment_is_said_by_the_constructor(variables, kind, monkeypatch) -> None:
    """The class is that of the SDK's own client; the variable is named, and no password."""
    if kind is ImportError:
        monkeypatch.setitem(sys.modules, "socksio", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind) as theirs:
        openai.AsyncOpenAI(api_key=KEY)
    for make in (lambda: AsyncOpenAI(api_key=KEY), lambda: OpenAIClient(OpenAIConfig(api_key=KEY))):
        with pytest.raises(kind) as caught:
            make()
        assert type(caught.value) is type(theirs.value)
        said = f"{caught.value} {getattr(caught.value, 'filename', '')}"
        assert next(iter(variables)) in said
        assert "qx" not in said
        assert "zj" not in said


@pytest.mark.usefixtures("no_proxy")
async def test_what_is_not_used_may_be_broken(monkeypatch) -> None:
    """Certificates at an address without TLS, and a proxy where there is none, are not looked at."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/certificates.pem")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:80a")
    async with listening(whole()) as (url, _), connect(url) as client:
        assert (await client.generate_response("hi")).content == "yes"


@pytest.mark.usefixtures("no_proxy")
def test_the_sdks_own_client_serves_loop_after_loop(few_certificates) -> None:
    """The one that was made first serves the first loop."""

    async def once(client: AsyncOpenAI) -> str:
        async with listening(whole()) as (url, _):
            answer = await client.with_options(base_url=url).chat.completions.create(**CHAT)
        return answer.choices[0].message.content

    client = AsyncOpenAI(api_key=KEY)
    assert [asyncio.run(once(client)) for _ in range(3)] == ["yes"] * 3


def test_the_transport_speaks_the_sdks_httpx() -> None:
    """Its streams are of the httpx that the installed SDK is built on."""
    from openai_eval_client._sdk.transport import _StreamedBody

    assert issubclass(_StreamedBody, sdk_httpx().AsyncByteStream)
