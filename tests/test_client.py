"""The evaluation client from end to end, on the simulated server over real sockets."""

from __future__ import annotations

import asyncio
import builtins
import gc
import json
import logging
import pickle
import threading

import openai
import pytest
from clients import KEY, WIDE, connect, dead_address, no_slot_is_taken
from pydantic import BaseModel

from openai_eval_client import (
    BatchConfig,
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    PartialFailureError,
    QuotaError,
    RateLimitConfig,
    RateLimitError,
    TimeoutError,
    ValidationError,
)
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

# --- one prompt ------------------------------------------------------------------------------------------


async def test_a_response_has_all_documented_fields() -> None:
    """They are content, usage with cost, request id, latency, temperature and finish reason."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            response = await client.generate_response("hello", temperature=0.7, max_tokens=50)
        (call,) = server.calls
    assert response.content == "echo: hello"
    assert response.choices == ["echo: hello"]
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (
        call.prompt_tokens,
        call.completion_tokens,
    )
    assert response.usage.estimated_cost == pytest.approx(
        (0.15 * call.prompt_tokens + 0.6 * call.completion_tokens) / 1e6
    )
    assert response.request_id.startswith("req_")
    assert response.latency_ms > 0
    assert (response.temperature, response.finish_reason, response.cached) == (0.7, "stop", False)
    assert response.raw.choices[0].message.content == "echo: hello"
    assert ModelResponse.model_validate_json(response.model_dump_json()) == response
    assert call.body == {
        "model": "gpt-4o-mini",
        "temperature": 0.7,
        "max_tokens": 50,
        "messages": [{"role": "user", "content": "hello"}],
    }


async def test_what_is_not_given_is_not_sent() -> None:
    """Neither None nor defaults are sent; the temperature reported is then the API's default."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            response = await client.generate_response("hello", seed=None)
        assert set(server.calls[0].body) == {"model", "messages"}
    assert response.temperature == 1.0


async def test_other_parameters_go_to_the_api() -> None:
    """System prompt, chat parameters, extra_body and extra_headers arrive; n choices come back."""
    with SimulatedServer(lenient=True) as server:
        async with connect(server) as client:
            response = await client.generate_response(
                "hello",
                system="Be brief.",
                n=2,
                seed=7,
                extra_body={"top_k": 5},
                extra_headers={"x-trace": "abc"},
            )
        (call,) = server.calls
    assert call.body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (call.body["n"], call.body["seed"], call.body["top_k"]) == (2, 7, 5)
    assert call.headers["x-trace"] == "abc"
    assert len(response.choices) == 2


async def test_a_prompt_may_be_a_list_of_messages() -> None:
    """The list may contain the SDK's own message objects."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            first = await client.generate_response("hello")
            answer = first.raw.choices[0].message
            history = [{"role": "user", "content": "hello"}, answer, {"role": "user", "content": "again"}]
            assert (await client.generate_response(history)).content == "echo: again"
        assert server.calls[1].body["messages"][1]["content"] == "echo: hello"


class Verdict(BaseModel):
    """The schema of a grader's answer."""

    label: str


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_a_pydantic_class_comes_back_as_its_instance(api: str) -> None:
    """`response_format=Class` sends its strict schema and parses the answer."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            response = await client.generate_response("grade", api=api, response_format=Verdict)
        body = server.calls[0].body
    assert isinstance(response.parsed, Verdict)
    schema = body["response_format"]["json_schema"] if api == "chat" else body["text"]["format"]
    assert (schema["name"], schema["strict"]) == ("Verdict", True)
    assert schema["schema"]["additionalProperties"] is False


async def test_the_responses_api_answers_the_same_call() -> None:
    """`api="responses"` sends the parameters under that API's names and returns the same response."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            response = await client.generate_response(
                "hello", api="responses", max_tokens=30, system="Be brief."
            )
        (call,) = server.calls
    assert call.path.endswith("/responses")
    assert (call.body["max_output_tokens"], call.body["instructions"]) == (30, "Be brief.")
    assert (response.content, response.finish_reason) == ("echo: hello", "stop")
    assert response.usage.completion_tokens == call.completion_tokens
    assert type(response.raw).__name__ == "Response"


@pytest.mark.parametrize("fault", ["null_usage", "no_usage"])
async def test_missing_usage_is_estimated_and_marked(fault: str) -> None:
    """If the server sends no usage, tokens are our own count, and the price follows from it."""
    with SimulatedServer(script=[fault]) as server:
        async with connect(server) as client:
            usage = (await client.generate_response("hello there")).usage
    assert usage.estimated
    assert usage.prompt_tokens == 9  # 3 for the message, 1 for its role, 2 for its text, 3 for the reply
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 9
    assert usage.estimated_cost


async def test_an_unknown_model_has_no_price() -> None:
    """Its cost is None, not 0, and the statistics count such calls."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            response = await client.generate_response("hello", model="nobody/knows-this")
            assert response.usage.estimated_cost is None
            assert (client.stats.unpriced, client.stats.cost) == (1, 0.0)


# --- retries ---------------------------------------------------------------------------------------------

TRANSIENT = ["500", "503", "408", "409", "429", "drop", "truncate", "garbage", "cut_json"]


@pytest.mark.parametrize("fault", TRANSIENT)
async def test_a_transient_failure_is_tried_again(fault: str) -> None:
    """A failure and then an answer are two attempts and one retry, and no slot stays taken."""
    with SimulatedServer(script=["ok", fault]) as server:
        async with connect(server) as client:
            await client.generate_response("first")
            assert (await client.generate_response("hello")).content == "echo: hello"
            assert (client.stats.retries, client.stats.attempts) == (1, 3)
            assert no_slot_is_taken(client)
        assert len(server.calls) == 3


async def test_pages_in_place_of_answers_end_the_run() -> None:
    """Where nothing was answered before, it is no API: each page is asked for once, and a few are enough."""
    with SimulatedServer(faults={"garbage": 1.0}) as server:
        async with connect(server) as client:
            with pytest.raises(openai.APIResponseValidationError, match="check base_url"):
                await client.batch_generate([f"{n}" for n in range(300)], max_concurrent=2)
        assert len(server.calls) <= 6


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("500", openai.InternalServerError),
        ("429", RateLimitError),
        ("drop", openai.APIConnectionError),
        ("cut_json", openai.APIResponseValidationError),
    ],
)
async def test_without_retries_there_is_one_attempt(fault: str, error: type[Exception]) -> None:
    """With `max_retries=0` the first attempt's SDK error is raised; it can be pickled and has no key."""
    with SimulatedServer(script=[fault] * 9) as server:
        async with connect(server, max_retries=0) as client:
            with pytest.raises(error) as raised:
                await client.generate_response("hello")
            assert (client.stats.requests, client.stats.failures) == (1, 1)
        assert len(server.calls) == 1
    error_seen = raised.value
    assert not isinstance(error_seen, builtins.TimeoutError)
    restored = pickle.loads(pickle.dumps(error_seen))  # noqa: S301  # our own
    assert str(restored) == str(error_seen)
    shown = f"{error_seen!r} {error_seen} {vars(error_seen)} {dict(error_seen.request.headers)}"
    assert KEY not in shown


async def test_a_hanging_server_is_a_timeout_after_its_retries() -> None:
    """The deadline is for one attempt; after the last, our TimeoutError is raised, which is Python's too."""
    with SimulatedServer(script=["hang"] * 2) as server:
        async with connect(server, max_retries=1) as client:
            with pytest.raises(TimeoutError, match=r"no answer within 0.2 s") as raised:
                await client.generate_response("hello", timeout=0.2)
            assert no_slot_is_taken(client)
        assert len(server.calls) == 2
    assert isinstance(raised.value, openai.APITimeoutError)
    assert isinstance(raised.value, builtins.TimeoutError)


async def test_a_slow_drip_is_a_timeout_too() -> None:
    """Bytes that keep coming do not extend the deadline."""
    with SimulatedServer(script=["slow_drip"]) as server:
        async with connect(server, max_retries=0) as client:
            with pytest.raises(TimeoutError):
                await client.generate_response("hello", timeout=0.3)


async def test_a_refused_connection_is_not_a_timeout() -> None:
    """Nobody listens: APIConnectionError, retried like one, never called a timeout."""
    with dead_address() as url:
        async with OpenAIClient(OpenAIConfig(api_key=KEY, base_url=url, max_retries=0)) as client:
            with pytest.raises(openai.APIConnectionError, match="connection failed") as raised:
                await client.generate_response("hello")
    assert not isinstance(raised.value, openai.APITimeoutError)


async def test_waiting_for_the_limit_is_not_counted_as_latency_or_timeout() -> None:
    """A prompt that queues longer than its timeout is answered all the same."""
    with SimulatedServer() as server:
        limits = RateLimitConfig(requests_per_minute=120, burst_seconds=0.5)
        async with connect(server, limits) as client:
            responses = await client.batch_generate(["a", "b", "c"], timeout=0.4)
    assert all(response.latency_ms < 400 for response in responses)
    assert client.stats.wait_seconds > 0.9


def refusing(name: str, body_type: str = "unsupported_parameter"):
    """Return a client that answers 400 for one parameter, and the list of the bodies that it sees."""
    module, seen = sdk_httpx(), []

    def handle(request):
        body = json.loads(request.content)
        seen.append(body)
        if name in body:
            error = {"message": f"Unsupported: '{name}'", "code": body_type, "param": name, "type": "x"}
            return module.Response(400, json={"error": error})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
        return module.Response(200, json={"id": "x", "model": "m", "choices": [choice]})

    return module.AsyncClient(transport=module.MockTransport(handle)), seen


async def test_a_model_that_refuses_max_tokens_gets_max_completion_tokens() -> None:
    """The client learns it from the 400, sends the request again, and remembers it for that model."""
    http, seen = refusing("max_tokens")
    async with OpenAIClient(OpenAIConfig(api_key=KEY), http_client=http, rate_limit=WIDE) as client:
        for _ in range(2):
            await client.generate_response("hello", max_tokens=9)
        assert client.stats.retries == 0
    assert [("max_tokens" in body, body.get("max_completion_tokens")) for body in seen] == [
        (True, None),
        (False, 9),
        (False, 9),
    ]


async def test_a_model_that_refuses_temperature_is_asked_without_it() -> None:
    """The response then has the API's default temperature."""
    http, seen = refusing("temperature", "unsupported_value")
    async with OpenAIClient(OpenAIConfig(api_key=KEY), http_client=http, rate_limit=WIDE) as client:
        response = await client.generate_response("hello", temperature=0)
        stats = client.stats
    assert response.temperature == 1.0
    assert response.unsent_parameters == ("temperature",)
    assert (stats.unsent_parameters, stats.finish_reasons) == ({"temperature": 1}, {"stop": 1})
    assert ["temperature" in body for body in seen] == [True, False]


async def test_any_other_400_is_raised() -> None:
    """A parameter without a substitute is not sent a second time."""
    http, seen = refusing("seed")
    async with OpenAIClient(OpenAIConfig(api_key=KEY), http_client=http, rate_limit=WIDE) as client:
        with pytest.raises(openai.BadRequestError):
            await client.generate_response("hello", seed=1)
    assert len(seen) == 1


# --- many prompts ----------------------------------------------------------------------------------------


async def test_order_is_kept_whatever_finishes_first() -> None:
    """With varying latencies responses keep their places, and concurrency stays within its bound."""
    prompts = [f"number {n}" for n in range(200)]
    with SimulatedServer(latency=0.02, latency_sigma=1.0) as server:
        async with connect(server) as client:
            responses = await client.batch_generate(prompts, max_concurrent=20)
        assert server.max_in_flight <= 20
        assert [call.body["messages"][0]["content"] for call in server.calls] != sorted(prompts)
    assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in prompts]


async def test_progress_is_monotone_and_ends_with_one() -> None:
    """An async callback is called once for each finished prompt, failed ones included."""
    seen: list[float] = []

    async def slowly(fraction: float) -> None:
        await asyncio.sleep(0)
        seen.append(fraction)

    with SimulatedServer(script=["ok", "ok", "500"]) as server:
        async with connect(server, max_retries=0) as client:
            await client.batch_generate(["x"] * 10, progress_callback=slowly, return_exceptions=True)
    assert seen == [n / 10 for n in range(1, 11)]


async def test_a_callback_that_raises_does_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """The exception is logged, and every prompt is answered."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            responses = await client.batch_generate(["x"] * 3, progress_callback=lambda _: 1 / 0)
    assert len(responses) == 3
    assert "progress_callback raised" in caplog.text


async def test_no_prompts_give_no_responses() -> None:
    """Progress is reported once, as 1.0."""
    seen: list[float] = []
    with SimulatedServer() as server:
        async with connect(server) as client:
            assert await client.batch_generate([], progress_callback=seen.append) == []
        assert server.calls == []
    assert seen == [1.0]


async def test_some_failures_keep_what_was_answered() -> None:
    """PartialFailureError has the responses in order, with None for each failed prompt."""
    with SimulatedServer(script=["ok", "500", "ok", "500", "ok"], latency=0) as server:
        async with connect(server, max_retries=0) as client:
            with pytest.raises(PartialFailureError, match="2 of 5 prompts failed") as raised:
                await client.batch_generate(list("abcde"), max_concurrent=1)
            answered = [response and response.content for response in raised.value.responses]
    assert sorted(raised.value.failures) == [index for index, text in enumerate(answered) if text is None]
    assert len(raised.value.failures) == 2
    assert all(isinstance(error, openai.InternalServerError) for error in raised.value.failures.values())
    assert answered.count(None) == 2


async def test_return_exceptions_puts_them_in_the_list() -> None:
    """Each prompt has one entry, a response or an exception."""
    with SimulatedServer(faults={"500": 1.0}) as server:
        async with connect(server, max_retries=0) as client:
            results = await client.batch_generate(["a", "b"], return_exceptions=True)
    assert [type(result) for result in results] == [openai.InternalServerError] * 2


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"api_key": "sk-another"}, openai.AuthenticationError),
        ({"models": {"only-this"}}, openai.NotFoundError),
        ({"quota_exhausted_after": 5}, QuotaError),
    ],
)
async def test_an_error_that_meets_every_prompt_stops_the_run(options, error, return_exceptions) -> None:
    """A wrong key, an unknown model or used-up credit is raised at once, with the answers so far."""
    with SimulatedServer(latency=0.01, **options) as server:
        async with connect(server) as client:
            with pytest.raises(error) as raised:
                await client.batch_generate(
                    ["x"] * 300, max_concurrent=3, return_exceptions=return_exceptions
                )
            assert no_slot_is_taken(client)
        assert len(server.calls) < 30
    answered = [response for response in raised.value.responses if response is not None]
    assert len(raised.value.responses) == 300
    assert len(answered) == server.counts["200"]  # requests in flight are paid for, so they were finished
    assert (len(answered) >= 5) == (error is QuotaError)
    assert KEY not in f"{raised.value!r} {raised.value} {vars(raised.value)}"


async def test_a_very_long_pause_stops_the_run() -> None:
    """A pause beyond max_wait raises RateLimitError at once, with the answers so far."""
    module = sdk_httpx()

    def handle(request):
        return module.Response(429, headers={"retry-after": "7200"}, json={"error": {"message": "per day"}})

    http = module.AsyncClient(transport=module.MockTransport(handle))
    async with OpenAIClient(OpenAIConfig(api_key=KEY), http_client=http, rate_limit=WIDE) as client:
        with pytest.raises(RateLimitError) as raised:
            await client.batch_generate(["x"] * 100)
        assert client.stats.retries == 0
    assert raised.value.responses == [None] * 100


async def test_cancelling_leaves_nothing_behind() -> None:
    """A cancelled run ends at once, without a task or slot left, and the client can be used again."""
    with SimulatedServer(latency=0.05) as server:
        async with connect(server) as client:
            before = asyncio.all_tasks()
            run = asyncio.create_task(client.batch_generate(["x"] * 500))
            while len(server.calls) < 20:
                await asyncio.sleep(0.01)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert asyncio.all_tasks() == before
            assert no_slot_is_taken(client)
            assert (await client.generate_response("still here")).content == "echo: still here"


async def test_a_million_prompts_are_not_a_million_tasks() -> None:
    """A bounded number of workers takes the prompts."""
    most = 0

    def watch(_: float) -> None:
        nonlocal most
        most = max(most, len(asyncio.all_tasks()))

    with SimulatedServer() as server:
        async with connect(server) as client:
            await client.batch_generate(
                (f"p{n}" for n in range(1000)), max_concurrent=10, progress_callback=watch
            )
    assert most <= 2 * 10 + 15  # the workers, and aiohttp's tasks for connections


async def test_use_batch_api_sends_many_prompts_as_a_batch() -> None:
    """Fewer prompts than the threshold are sent online; the answers are the same at twice the price."""
    batch = BatchConfig(auto_batch_threshold=4, polling_interval=0.02)
    with SimulatedServer(batch_seconds=0.1) as server:
        async with connect(server, batch=batch) as client:
            few = await client.batch_generate(["a", "b", "c"], use_batch_api=True, max_tokens=5)
            assert server.batches == []
            many = await client.batch_generate(["a", "b", "c", "d"], use_batch_api=True, max_tokens=5)
            assert [batch["request_counts"]["total"] for batch in server.batches] == [4]
            await client.batch_generate(["a"] * 5, use_batch_api=False)
        assert len(server.batches) == 1
    assert [response.content for response in many[:3]] == [response.content for response in few]
    assert sum(response.usage.estimated_cost for response in many[:3]) == pytest.approx(
        sum(response.usage.estimated_cost for response in few) / 2
    )


# --- the limits ------------------------------------------------------------------------------------------


async def test_within_its_limits_the_server_refuses_nothing() -> None:
    """With the server's limits configured and real tokens counted there is not one 429."""
    prompts = [f"Say the number {n} in words, please." for n in range(150)]
    with SimulatedServer(rpm=1200, tpm=60_000, window=2, latency=0.02) as server:
        limits = RateLimitConfig(
            requests_per_minute=1200, tokens_per_minute=60_000, burst_seconds=2, max_concurrent=64
        )
        async with connect(server, limits) as client:
            responses = await client.batch_generate(prompts, max_tokens=8)
        assert server.counts["429"] == 0
    assert len(responses) == 150


async def test_limits_set_too_high_still_end_with_every_prompt_answered() -> None:
    """429s pause the model, and refused prompts keep their place."""
    with SimulatedServer(rpm=600, window=1, latency=0.02, headers=False) as server:
        async with connect(server, max_retries=8) as client:
            responses = await client.batch_generate([f"{n}" for n in range(30)])
        assert server.counts["429"] > 0
        assert server.counts["200"] == 30
    assert [response.content for response in responses] == [f"echo: {n}" for n in range(30)]


async def test_the_sdk_client_has_the_same_limits() -> None:
    """`client.openai` and `generate_response` share limits, connections and statistics."""
    with SimulatedServer() as server:
        async with connect(server, RateLimitConfig(requests_per_minute=2)) as client:
            await client.generate_response("one")
            completion = await client.openai.chat.completions.create(
                model="gpt-4o-mini", messages=[{"role": "user", "content": "two"}]
            )
            assert completion.choices[0].message.content == "echo: two"
            assert client.openai.max_retries == 3
            assert client.stats.attempts == 2
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.generate_response("three"), 0.2)
            assert server.connections == 1


# --- loops, threads, secrets -----------------------------------------------------------------------------


def test_one_client_works_in_several_runs_of_the_loop() -> None:
    """One client can be used in three `asyncio.run`, one after the other."""
    with SimulatedServer() as server:
        client = connect(server)
        for _ in range(3):
            responses = asyncio.run(client.batch_generate(["a", "b"]))
            assert [response.content for response in responses] == ["echo: a", "echo: b"]


def test_threads_share_a_client() -> None:
    """Four threads with event loops of their own share one bound, and every prompt is answered."""
    with SimulatedServer(latency=0.01) as server:
        client = connect(
            server, RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=4)
        )
        failures: list[BaseException] = []

        def work() -> None:
            try:
                assert len(asyncio.run(client.batch_generate(["x"] * 50))) == 50
            except BaseException as error:  # noqa: BLE001  # shown by the assertion below
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert server.max_in_flight <= 4
        assert client.stats.requests == 200


async def test_the_key_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """It is not in a repr, not in the log at DEBUG, and not in an error whose message echoes it."""
    caplog.set_level(logging.DEBUG, "openai_eval_client")
    module = sdk_httpx()

    def echo(request):
        sent = request.headers["authorization"]
        return module.Response(401, json={"error": {"message": f"bad key {sent}", "code": "invalid_api_key"}})

    http = module.AsyncClient(transport=module.MockTransport(echo))
    async with OpenAIClient(OpenAIConfig(api_key=KEY), http_client=http) as client:
        with pytest.raises(openai.AuthenticationError, match=r"bad key Bearer \[key\]") as raised:
            await client.generate_response("hello")
        error = raised.value
        assert KEY not in f"{client!r} {error!r} {error.body} {error.response.text} {vars(error)}"
        assert KEY.encode() not in pickle.dumps(error)
    assert KEY not in caplog.text


async def test_neither_prompts_nor_answers_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The log shows what happened, not what was asked."""
    caplog.set_level(logging.DEBUG, "openai_eval_client")
    with SimulatedServer(script=["500", "429", "cut_json"]) as server:
        async with connect(server) as client:
            await client.generate_response("a very private question", max_tokens=100)
    assert "failed (500)" in caplog.text
    assert "private" not in caplog.text


async def test_proxies_of_the_environment_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With HTTP_PROXY set the client uses the SDK's default transport, which goes through the proxy."""
    with SimulatedServer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.base_url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        config = OpenAIConfig(api_key=KEY, base_url="http://api.invalid/v1", max_retries=0)
        async with OpenAIClient(config) as client:
            try:
                await client.generate_response("hello")
            except openai.APIStatusError as error:
                assert error.status_code in {400, 404}
        assert proxy.calls or proxy.counts


# --- runs that end early ---------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_ends_the_run() -> None:
    """The first prompt that never got through ends it: one connection error, not a failure for each."""
    with dead_address() as url:
        async with OpenAIClient(OpenAIConfig(api_key=KEY, base_url=url, max_retries=1)) as client:
            with pytest.raises(openai.APIConnectionError, match="connection failed") as raised:
                await client.batch_generate(["x"] * 1000)
            assert client.stats.utilisation["gpt-3.5-turbo"]["requests"] < 0.01
            assert no_slot_is_taken(client)
    assert raised.value.responses == [None] * 1000


async def test_a_cancelled_run_keeps_the_answers_so_far() -> None:
    """They are paid for, so the CancelledError has them as `.responses`."""
    kept: list[ModelResponse | None] = []

    async def keep(client: OpenAIClient) -> None:
        try:
            await client.batch_generate([f"{n}" for n in range(500)])
        except asyncio.CancelledError as cancelled:
            kept.extend(cancelled.responses)
            raise

    with SimulatedServer(latency=0.05) as server:
        async with connect(server) as client:
            run = asyncio.create_task(keep(client))
            while server.counts["200"] < 50:
                await asyncio.sleep(0.01)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
    answered = [response for response in kept if response is not None]
    assert len(kept) == 500
    assert 0 < len(answered) < 500
    assert all(response.content.startswith("echo: ") for response in answered)


async def test_a_closed_client_raises_one_error() -> None:
    """It says that the client is closed; there is no failure for each prompt."""
    with SimulatedServer() as server:
        client = connect(server)
        await client.generate_response("hello")
        await client.close()
        for call in (client.generate_response("x"), client.batch_generate(["x", "y"])):
            with pytest.raises(RuntimeError, match="closed"):
                await call


async def test_a_callback_of_the_wrong_shape_is_refused() -> None:
    """The error comes before anything is sent, in place of a traceback for each prompt."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            with pytest.raises(ValidationError, match=r"progress_callback=.*one number"):
                await client.batch_generate(["x"], progress_callback=lambda done, total: done / total)
        assert server.calls == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("max_concurent", "max_concurrent"),
        ("progres", "progress"),
    ],
)
async def test_the_error_of_a_misspelt_parameter_has_the_right_name(wrong: str, right: str) -> None:
    """It is suggested in place of `extra_body`."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            with pytest.raises(ValidationError, match=f"{wrong}=5: not a parameter; did you mean {right}?"):
                await client.generate_response("x", **{wrong: 5})


class Picky(BaseModel):
    """A class whose validator raises what pydantic does not expect."""

    label: str

    def model_post_init(self, context: object) -> None:  # noqa: ARG002  # pydantic's
        raise KeyError(self.label)


async def test_a_validator_that_raises_does_not_lose_the_answer() -> None:
    """`parsed` is None, and the content is kept."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            response = await client.generate_response("grade", response_format=Picky)
    assert response.parsed is None
    assert response.content


def test_a_forgotten_client_closes_quietly(recwarn) -> None:
    """Dropped without close() while the loop runs, it closes its connections and prints nothing."""
    with SimulatedServer() as server:

        async def forget() -> None:
            client = connect(server)
            await client.generate_response("hello")
            del client
            for _ in range(5):
                gc.collect()
                await asyncio.sleep(0.01)
            assert server.connections == 0

        asyncio.run(forget())
    assert [str(warning.message) for warning in recwarn] == []


async def test_an_organisation_of_none_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config overrides the environment variable that the SDK would read."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-environment")
    with SimulatedServer() as server:
        async with connect(server, organization_id=None) as client:
            await client.generate_response("hello")
            await client.openai.models.list()
        assert [call.headers.get("openai-organization") for call in server.calls] == [None, None]


async def test_more_than_a_thousand_requests_can_be_in_flight() -> None:
    """The connection pool sets no bound besides max_concurrent."""
    with SimulatedServer(latency=6, latency_sigma=0) as server:
        async with connect(server) as client:
            await client.batch_generate(["x"] * 1200, max_concurrent=1200, timeout=50)
        assert server.max_in_flight > 1000
        assert server.counts == {"200": 1200}
