"""A key is in nothing that is kept or shown, whatever a server echoes and however a connection fails."""

import base64
import html
import json
import logging
import pickle
import traceback
from urllib.parse import quote

import openai
import pytest
from raw_server import ANSWER, listening, whole
from wire_server import Reply, chat, serving

from openai_eval_client import AsyncOpenAI, BatchRequest, OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client._report.rows import row_of
from openai_eval_client._wire.masking import forget_key, is_credential, masked, without_echo, without_key
from openai_eval_client.errors import sdk_httpx

KEY = "sk-never/to+be=seen<0123456789>abcdef"
OTHER = "another-key-that-one-call-has-0123456789"
BASE64 = base64.b64encode(f"user:{KEY}".encode()).decode()
REFUSED = "http://127.0.0.1:9/v1"


def client_of(url, **options):
    """A client that tries once, and not for long."""
    config = OpenAIConfig(
        **{"api_key": KEY, "base_url": url, "max_retries": 0, "default_model": "m", **options}
    )
    return OpenAIClient(config, rate_limit=RateLimitConfig(requests_per_minute=None))


def error_body(**fields):
    """The body of an error of OpenAI's shape."""
    return json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": "c", **fields}}).encode()


def forms(key):
    """How a key may look: parts of it will do."""
    coded = base64.b64encode(f"user:{key}".encode()).decode()[12:-6]
    return (
        key,
        quote(key, safe=""),
        html.escape(key),
        json.dumps(key)[1:-1].replace("/", r"\/"),
        coded,
        key[:20],
    )


def chain(error):
    """The error, its causes, and the errors that it holds."""
    found, left = [], [error]
    while left:
        each = left.pop()
        if isinstance(each, BaseException) and not any(each is other for other in found):
            found.append(each)
            left += [each.__cause__, each.__context__, *vars(each).values(), *getattr(each, "exceptions", ())]
            left += getattr(each, "failures", {}).values()
    return found


def texts_of(error):
    """All that an error report could show: texts, fields, replies, requests, local variables, pickles."""
    for each in chain(error):
        yield f"{each} {each!r} {each.args!r} {row_of(each)!r}"
        yield "".join(traceback.format_exception(each))
        for name, value in vars(each).items():
            yield f"{name}: {value!r}"
            if hasattr(value, "headers"):
                yield repr([*value.headers.items(), getattr(value, "url", "")])
            if name == "response":
                yield f"{value.text} {[*value.request.headers.items()]} {value.history}"
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if frame.f_code.co_filename != __file__:
                for name, value in frame.f_locals.items():
                    yield f"{frame.f_code.co_name}.{name}: {value!r}"
                    if hasattr(value, "headers") and hasattr(value, "url"):
                        yield f"{frame.f_code.co_name}.{name}: {[*value.headers.items()]}"
    yield pickle.dumps(error).decode("latin-1")


def leaks(error, *keys):
    """The texts that show a key."""
    return [text[:300] for text in texts_of(error) for key in keys for form in forms(key) if form in text]


ECHOES = {
    "message": whole(error_body(message=f"bad key {KEY}"), status="401 No"),
    "cut": whole(error_body(message="x" * 4075 + KEY), status="400 No"),
    "code": whole(error_body(code=KEY), status="401 No"),
    "param": whole(error_body(param=KEY), status="400 No"),
    "type": whole(error_body(type=KEY), status="400 No"),
    "nested": whole(error_body(metadata={"a": [{KEY: KEY}]}), status="400 No"),
    "beside": whole(json.dumps({"error": {"message": "m"}, "headers": [KEY]}).encode(), status="400 No"),
    "escaped": whole(error_body(message=KEY).replace(b"s", b"\\u0073"), status="400 No"),
    "base64": whole(error_body(message=f"Basic {BASE64}"), status="400 No"),
    "quoted": whole(error_body(message=quote(KEY, safe="")), status="400 No"),
    "html": whole(f"<html>{html.escape(KEY)} {KEY}</html>".encode(), status="502 No"),
    "quota": whole(error_body(message=KEY, code="insufficient_quota"), status="429 No"),
    "id": whole(error_body(), f"x-request-id: {KEY}", status="400 No"),
    "cookie": whole(error_body(), f"set-cookie: key={KEY}", status="400 No"),
    "challenge": whole(error_body(), f'www-authenticate: Bearer realm="{KEY}"', status="401 No"),
    "page of 200": whole(f"<html>{'x' * 50}{KEY}</html>".encode()),
    "error of 200": whole(error_body(message="x" * 250 + KEY)),
    "named error of 200": whole(error_body(message=KEY, code=500), f"x-request-id: {KEY}"),
    "no HTTP": f"{KEY}\r\n\r\n".encode(),
    "no header": f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n".encode(),
}


@pytest.mark.parametrize("reply", ECHOES.values(), ids=ECHOES)
async def test_what_a_server_echoes_is_masked(reply):
    """In every field, header and body, in causes, rows and pickles; the rest of the error stays."""
    async with listening(reply, hang_up=True) as (url, _), client_of(url) as client:
        with pytest.raises(openai.APIError) as caught:
            await client.generate_response("hi")
    assert leaks(caught.value, KEY) == []
    assert "[key]" in "".join(texts_of(caught.value))


async def test_a_key_of_one_call_is_masked():
    """Headers and query of a call are its own; its server and the traceback repeat neither."""
    reply = whole(error_body(message=f"{OTHER} {OTHER[::-1]}"), status="401 No")
    async with listening(reply) as (url, _), client_of(url) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.generate_response(
                "hi", extra_headers={"api-key": OTHER}, extra_query={"subscription-key": OTHER[::-1]}
            )
    assert leaks(caught.value, KEY, OTHER, OTHER[::-1]) == []
    assert "[key] [key]" in caught.value.message


FAULTS = {
    "refused": (REFUSED, None),
    "reset": (None, b""),
    "cut short": (None, b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"a":'),
    "silence": (None, None),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("many", [False, True])
async def test_no_frame_of_a_failed_connection_has_the_headers(fault, many):
    """The causes stay, with their text and the lines of code; their frames hold no variable."""
    elsewhere, reply = FAULTS[fault]
    async with listening(reply, hang_up=True) as (url, _), client_of(elsewhere or url, timeout=0.3) as client:
        with pytest.raises(openai.OpenAIError) as caught:
            await (client.batch_generate(["hi"]) if many else client.generate_response("hi"))
    assert leaks(caught.value, KEY) == []
    error = next(each for each in chain(caught.value) if isinstance(each, openai.APIConnectionError))
    assert error.__cause__ is not None
    assert "aiohttp" in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("fault", ["refused", "reset", "silence"])
async def test_no_cause_of_the_drop_in_has_the_headers(fault):
    """The error is the SDK's; what our transport adds to it shows no key."""
    elsewhere, reply = FAULTS[fault]
    async with listening(reply, hang_up=True) as (url, _), client_of(elsewhere or url) as client:
        sdk = client.openai.with_options(max_retries=0, timeout=0.3)
        with pytest.raises(openai.APIConnectionError) as caught:
            await sdk.models.list()
    causes = [each for each in chain(caught.value) if type(each).__module__.startswith("aiohttp")]
    assert causes
    for cause in causes:
        assert [f for f, _ in traceback.walk_tb(cause.__traceback__) if KEY in repr(f.f_locals)] == []


async def test_an_error_of_the_callers_keeps_its_variables():
    """What is being handled when a call fails is no cause of ours."""
    async with client_of(REFUSED) as client:
        try:
            json.loads(KEY)
        except ValueError as ours:
            with pytest.raises(openai.APIConnectionError):
                await client.generate_response("hi")
            frames = [frame for frame, _ in traceback.walk_tb(ours.__traceback__)]
    assert frames[-1].f_locals["s"] == KEY


async def test_the_users_own_transport_keeps_its_variables():
    """Whoever writes one debugs it."""
    httpx = sdk_httpx()

    def send(request):
        mine = "seen"
        raise httpx.ReadError(mine)

    transport = httpx.MockTransport(send)
    config = OpenAIConfig(api_key=KEY, base_url=REFUSED, max_retries=0)
    async with OpenAIClient(config, http_client=httpx.AsyncClient(transport=transport)) as client:
        with pytest.raises(openai.APIConnectionError) as caught:
            await client.generate_response("hi")
    cause = next(each for each in chain(caught.value) if type(each) is httpx.ReadError)
    *_, (frame, _) = traceback.walk_tb(cause.__traceback__)
    assert frame.f_locals["mine"] == "seen"


async def test_an_answer_that_repeats_the_key_is_kept_without_it(tmp_path, caplog):
    """In its text, its raw body, its id, the cache and the log; a long key stands there by no chance."""
    caplog.set_level(logging.DEBUG, "openai_eval_client")
    answer = chat(f"you sent {KEY}", debug={"authorization": f"Bearer {KEY}"})
    async with serving({"hi": [Reply(answer, headers=(f"x-request-id: {KEY}",))]}) as server:
        client = OpenAIClient(OpenAIConfig(api_key=KEY, base_url=server.url), cache=tmp_path / "cache.db")
        async with client:
            response = await client.generate_response("hi")
    assert response.content == "you sent [key]"
    assert response.request_id == "[key]"
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    seen = "".join(repr(vars(record)) for record in caplog.records)
    assert [form for form in forms(KEY) if form in f"{response!r}{response.raw}{kept!r}{seen}"] == []
    assert "x-request-id" not in seen


async def test_a_short_key_is_left_in_answers():
    """Such as "ollama", which an answer may be about."""
    answer = whole(ANSWER.replace(b"yes", b"ollama runs"))
    async with listening(answer) as (url, _), client_of(url, api_key="ollama") as client:
        assert (await client.generate_response("hi")).content == "ollama runs"


async def test_a_batch_that_repeats_the_key_is_read_without_it():
    """Its errors, its metadata, the lines of its files."""
    line = {"custom_id": "CUSTOM_ID", "response": None, "error": {"message": KEY, "code": KEY, "param": KEY}}
    lines = [json.dumps(line).encode()]
    async with serving({}, lines) as server, client_of(server.url) as client:
        job = await client.submit_batch_job([BatchRequest(prompt="hi")])
        with pytest.raises(openai.OpenAIError) as caught:
            await client.retrieve_batch_results(job.job_id)
        assert leaks(caught.value, KEY) == []
        batch = server.batches[job.job_id]
        batch.update(status="failed", errors={"data": [{"message": KEY, "code": KEY, "param": KEY}]})
        batch["output_file_id"] = None
        status = await client.get_batch_status(job.job_id)
    assert status.errors[0].to_dict() == {"message": "[key]", "code": "[key]", "line": None, "param": "[key]"}


async def test_a_key_from_a_function_is_masked_in_what_the_transport_says():
    """It is read from the request that carries it."""

    async def key():
        return KEY

    async with listening(f"{KEY}\r\n\r\n".encode(), hang_up=True) as (url, _), client_of(url) as client:
        sdk = AsyncOpenAI(api_key=key, base_url=url, max_retries=0, http_client=client._http)
        with pytest.raises(openai.APIConnectionError) as caught:
            await sdk.models.list()
    assert "[key]" in str(caught.value.__cause__)
    assert KEY not in repr(chain(caught.value))


# --- the functions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["Authorization", "proxy-authorization", "api-key", "X-API-Key", "x-goog-api-key", "Cookie", "set-cookie",
     "Ocp-Apim-Subscription-Key", "CF-Access-Client-Secret", "Helicone-Auth", "PRIVATE-TOKEN", "apikey"],
)  # fmt: skip
def test_headers_that_hold_a_key(name):
    assert is_credential(name)


@pytest.mark.parametrize(
    "name", ["content-type", "Idempotency-Key", "x-request-id", "max-tokens-per", "retry-after"]
)
def test_headers_that_hold_none(name):
    assert not is_credential(name)


def test_masking_keeps_the_rest():
    """Nested values keep their shape; whatever surrounds a key stays; JSON stays JSON."""
    value = {"a": [f"say: {KEY}; yes", 1, None, {KEY: (True, KEY)}]}
    assert masked(value, KEY) == {"a": ["say: [key]; yes", 1, None, {"[key]": (True, "[key]")}]}
    assert masked(f'"{KEY[:18]}..."', KEY) == '"[key]"'
    assert masked("nothing", KEY, "", "short") == "nothing"
    assert masked("short", "short") == "short"
    assert without_key(f"ä {KEY} ß".encode(), KEY) == "ä [key] ß".encode()


def test_a_body_too_deep_to_look_into_is_left_out():
    """It neither shows the key nor ends in a RecursionError."""
    deep = current = {}
    for _ in range(5000):
        current["a"] = current = {}
    current["a"] = KEY
    request = sdk_httpx().Request("POST", "https://x.invalid/", headers={"authorization": f"Bearer {KEY}"})
    error = openai.APIError(f"m {KEY}", request, body=deep)
    forget_key(error)
    assert error.message == "m [key]"
    assert KEY not in repr(error.body)
    assert "authorization" not in request.headers


def test_a_reply_without_an_echo_is_handed_on():
    """Each answer passes here: none is copied without need."""
    reply = sdk_httpx().Response(200, content=ANSWER)
    assert without_echo(reply, KEY, {}) is reply
    assert without_echo(reply, KEY, {"api-key": OTHER}) is reply


def test_a_circle_of_causes_ends():
    """Each error is looked at once."""
    request = sdk_httpx().Request("POST", "https://x.invalid/")
    first, second = openai.APIError(KEY, request, body=None), ValueError(KEY)
    first.__cause__, second.__context__ = second, first
    forget_key(first, KEY)
    assert (str(first), str(second)) == ("[key]", "[key]")
