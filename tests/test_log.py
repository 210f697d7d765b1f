"""Log records say in fields what their sentence says, and never a prompt, an answer or a key."""

import ast
import contextlib
import inspect
import json
import logging
from pathlib import Path

import pytest

import openai_eval_client as package
from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig, _log
from openai_eval_client._wire.failures import of_error
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

KEY = "sk-log-0123456789abcdef"
PROMPT = "the secret of the third island"
OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Kept(logging.Handler):
    """Keeps all records."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def of(self, event):
        """The fields of all records of an event."""
        return [extra(record) for record in self.records if getattr(record, "event", None) == event]


def extra(record):
    """What a record has besides what every record has."""
    return {name: value for name, value in vars(record).items() if name not in OWN}


def shown(record):
    """All that a handler could write of a record."""
    formatted = logging.Formatter("%(message)s").format(record)
    return f"{formatted} {record.args!r} {extra(record)!r} {record.exc_text!r} {record.msg!r}"


@pytest.fixture
def log():
    """Everything the package logs."""
    handler, logger = Kept(), logging.getLogger("openai_eval_client")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def client_of(server):
    """A client with little patience."""
    config = OpenAIConfig(
        api_key=KEY, base_url=server.base_url, default_model="gpt-4o-mini", max_retries=2, timeout=0.5
    )
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, adaptive_throttling=False)
    return OpenAIClient(config, rate_limit=limits)


async def test_every_fault_is_logged_with_its_fields(log, no_pauses, few_certificates):
    """Of each failed attempt: its model, its number, what came, and the wait until the next."""
    script = ["500", "ok", "429", "ok", "drop", "ok", "hang", "ok", "truncate", "ok", "garbage", "ok"]
    with SimulatedServer(script=script, retry_after=True) as server:
        async with client_of(server) as client:
            for number in range(len(script) // 2):
                await client.generate_response(f"{PROMPT} {number}", max_tokens=5)
    retries = log.of("retry")
    kinds = [fields["error_type"] for fields in retries]
    assert kinds[:2] == ["InternalServerError", "RateLimitError"]
    assert kinds[3] == "TimeoutError"
    assert {fields["model"] for fields in retries} == {"gpt-4o-mini"}
    assert {fields["attempt"] for fields in retries} == {1}
    assert all(fields["wait_seconds"] >= 0 for fields in retries)
    assert [fields.get("status") for fields in retries[:3]] == [500, 429, None]
    assert retries[1]["code"] == "rate_limit_exceeded"
    assert retries[0]["request_id"].startswith("req_")
    attempts = log.of("attempt")
    assert len(attempts) == len(script)
    assert [fields.get("status") for fields in attempts[:4]] == [500, 200, 429, 200]
    assert all(fields["seconds"] > 0 for fields in attempts)
    assert attempts[1]["tokens"] > 0
    assert attempts[1]["request_id"] != attempts[3]["request_id"]


async def test_no_record_shows_a_prompt_or_the_key(log, no_pauses, few_certificates):
    """In its message, its arguments, its fields or its traceback."""

    def raises(fraction):
        raise ValueError(fraction)

    faults = {"500": 0.2, "429": 0.1, "drop": 0.1, "garbage": 0.1}
    with SimulatedServer(faults=faults, seed=4) as server:
        async with client_of(server) as client:
            prompts = [f"{PROMPT} {number}" for number in range(40)]
            await client.batch_generate(
                prompts, max_tokens=9, return_exceptions=True, progress_callback=raises
            )
            impatient = client.openai.with_options(max_retries=0)
            for _ in range(5):
                with contextlib.suppress(package.APIError):
                    await impatient.embeddings.create(model="unheard-of", input=PROMPT)
    assert len(log.records) > 60
    for record in log.records:
        assert KEY not in shown(record)
        assert PROMPT not in shown(record)
        assert "echo:" not in shown(record)


async def test_a_server_that_echoes_the_key_does_not_bring_it_into_the_log(log, no_pauses):
    """Nor the prompt: the API's errors quote parameters."""
    httpx = sdk_httpx()
    echo = {"error": {"message": f"bad {KEY}: {PROMPT}", "type": KEY, "code": KEY, "param": PROMPT}}
    transport = httpx.MockTransport(lambda _: httpx.Response(503, json=echo))
    config = OpenAIConfig(api_key=KEY, base_url="http://127.0.0.1:9/v1", max_retries=2)
    async with OpenAIClient(config, http_client=httpx.AsyncClient(transport=transport)) as client:
        with pytest.raises(package.PartialFailureError):
            await client.batch_generate([PROMPT])
        with pytest.raises(package.APIError):
            await client.openai.with_options(max_retries=0).embeddings.create(model="m", input=PROMPT)
    assert len(log.of("retry")) == 2
    assert {fields["status"] for fields in log.of("attempt")} == {503}
    assert [record for record in log.records if KEY in shown(record) or PROMPT in shown(record)] == []


GOOD = {"choices": [{"message": {"content": "yes"}}]}


async def test_a_pause_that_the_server_asks_for_is_logged(log):
    """With the limit that it names."""
    httpx, headers = sdk_httpx(), {"retry-after-ms": "20", "x-request-id": "req_7"}
    refusal = {
        "error": {"message": "Rate limit reached for gpt-4o-mini on requests per min (RPM)", "code": "c"}
    }
    answers = [httpx.Response(429, headers=headers, json=refusal), httpx.Response(200, json=GOOD)]
    transport = httpx.MockTransport(lambda _: answers.pop(0))
    config = OpenAIConfig(api_key=KEY, base_url="http://127.0.0.1:9/v1", default_model="gpt-4o-mini")
    async with OpenAIClient(config, http_client=httpx.AsyncClient(transport=transport)) as client:
        await client.generate_response(PROMPT)
    assert log.of("rate_limited") == [
        {
            "event": "rate_limited",
            "model": "gpt-4o-mini",
            "status": 429,
            "limit": "requests",
            "wait_seconds": 0.02,
            "request_id": "req_7",
        }
    ]


async def test_a_wait_of_more_than_a_second_is_logged(log, few_certificates):
    """A shorter one is not."""
    limits = RateLimitConfig(requests_per_minute=90, burst_seconds=0.5, adaptive_throttling=False)
    with SimulatedServer() as server:
        config = OpenAIConfig(api_key=KEY, base_url=server.base_url, default_model="gpt-4o-mini")
        async with OpenAIClient(config, rate_limit=limits) as client:
            await client.batch_generate([PROMPT] * 3, max_tokens=5)
    (waited,) = log.of("waited")
    assert waited["model"] == "gpt-4o-mini"
    assert waited["wait_seconds"] >= 1


def test_no_field_is_called_like_an_attribute_of_every_record():
    """Logging raises KeyError for those, in the middle of a run."""
    used = set()
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"warn", "inform", "debug"}:
                names = {keyword.arg for keyword in node.keywords if keyword.arg}
                assert "event" in names, f"{path.name}:{node.lineno}"
                used |= names
    for node in ast.walk(ast.parse(inspect.getsource(of_error))):
        if isinstance(node, ast.Dict):
            used |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    assert used
    assert used & OWN == set()


def test_a_record_names_the_line_that_logged_it(log):
    """Not that of the helper."""
    _log.warn("x %d", 1, event="try", model="m", status=None)
    (record,) = log.records
    assert (record.funcName, record.getMessage()) == ("test_a_record_names_the_line_that_logged_it", "x 1")
    assert extra(record) == {"event": "try", "model": "m"}


def test_fields_can_be_written_as_json(log):
    """As a formatter for machines does."""
    _log.inform("x", event="retry", **of_error(ValueError("never shown")), wait_seconds=0.5)
    assert json.loads(json.dumps(extra(log.records[0]))) == {
        "event": "retry",
        "error_type": "ValueError",
        "wait_seconds": 0.5,
    }


@pytest.mark.parametrize(
    ("name", "kept"), [("req_1", "req_1"), ("a\nb", None), ("x" * 300, None), (None, None)]
)
def test_a_request_id_is_a_name(name, kept):
    """A server that sends anything else under it is not quoted."""
    assert _log.request_id({"x-request-id": name}) == kept
    assert _log.request_id(None) is None
