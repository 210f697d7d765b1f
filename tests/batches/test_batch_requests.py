"""What is wrong with a batch job is found before anything is sent, with the request and the field named."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from batches import MODEL, asked, connect, patient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from openai_eval_client import BatchRequest, ValidationError
from openai_eval_client._batches.files import check_requests
from openai_eval_client._batches.objects import JOB_KEY, LINES_KEY
from openai_eval_client.testing import SimulatedServer

pytestmark = pytest.mark.usefixtures("few_certificates")

GOOD = BatchRequest(prompt="hello")


def changed(**fields: Any) -> BatchRequest:
    """A request changed after it was made, which nothing checks."""
    request = BatchRequest(prompt="hello")
    for name, value in fields.items():
        setattr(request, name, value)
    return request


class Answer(BaseModel):
    text: str


REQUESTS: dict[str, tuple[Any, str, int | None]] = {  # what is wrong, the field, the index
    "none": ([], "requests", None),
    "None": (None, "requests", None),
    "a text": ("hello", "requests", None),
    "a dict": ({"prompt": "hello"}, "requests", None),
    "one request": (GOOD, "requests", 0),  # a model is iterable: it yields its fields
    "a number": (7, "requests", None),
    "a dict in it": ([GOOD, {"prompt": "hello"}], "requests", 1),
    "a text in it": ([GOOD, GOOD, "hello"], "requests", 2),
    "empty prompt": ([GOOD, BatchRequest(prompt="")], "prompt", 1),
    "blank prompt": ([BatchRequest(prompt=" \n")], "prompt", 0),
    "half an emoji": ([GOOD, BatchRequest(prompt="\ud83d")], "prompt", 1),
    "no messages": ([GOOD, BatchRequest(messages=[])], "prompt", 1),
    "messages without a role": ([BatchRequest(messages=[{"content": "x"}])], "prompt", 0),
    "messages that are no JSON": ([BatchRequest(messages=[{"role": "user", "content": {1}}])], "prompt", 0),
    "not a number in messages": (
        [BatchRequest(messages=[{"role": "user", "content": math.nan}])],
        "prompt",
        0,
    ),
    "blank model": ([GOOD, BatchRequest(prompt="x", model=" ")], "model", 1),
    "blank model in extra_body": ([BatchRequest(prompt="x", extra_body={"model": ""})], "model", 0),
    "negative temperature": ([GOOD, BatchRequest(prompt="x", temperature=-0.1)], "temperature", 1),
    "infinite temperature": ([BatchRequest(prompt="x", temperature=math.inf)], "temperature", 0),
    "temperature nan": ([BatchRequest(prompt="x", temperature=math.nan)], "temperature", 0),
    "max_tokens 0": ([GOOD, BatchRequest(prompt="x", max_tokens=0)], "max_tokens", 1),
    "n 0": ([BatchRequest(prompt="x", n=0)], "n", 0),
    "unknown parameter": ([GOOD, BatchRequest(prompt="x", temprature=1)], "temprature", 1),
    "stream": ([GOOD, BatchRequest(prompt="x", stream=True)], "stream", 1),
    "stream=False": ([BatchRequest(prompt="x", stream=False)], "stream", 0),
    "stream in extra_body": ([BatchRequest(prompt="x", extra_body={"stream": True})], "stream", 0),
    "headers": ([GOOD, BatchRequest(prompt="x", extra_headers={"a": "b"})], "extra_headers", 1),
    "query": ([BatchRequest(prompt="x", extra_query={"a": "b"})], "extra_query", 0),
    "timeout": ([BatchRequest(prompt="x", timeout=5)], "timeout", 0),
    "flex": ([BatchRequest(prompt="x", service_tier="flex")], "service_tier", 0),
    "extra_body no dict": ([BatchRequest(prompt="x", extra_body=[1])], "extra_body", 0),
    "blank system": ([BatchRequest(prompt="x", system=" ")], "system", 0),
    "no JSON in a parameter": ([GOOD, BatchRequest(prompt="x", stop={1})], "stop", 1),
    "blank custom_id": ([GOOD, BatchRequest(prompt="x", custom_id="")], "custom_id", 1),
    "half an emoji as custom_id": ([BatchRequest(prompt="x", custom_id="\ud83d")], "custom_id", 0),
    "same custom_id": (
        [BatchRequest(prompt="x", custom_id="a"), GOOD, BatchRequest(prompt="y", custom_id="a")],
        "custom_id",
        2,
    ),
    "the custom_id of another": ([BatchRequest(prompt="x", custom_id="request-1"), GOOD], "custom_id", 1),
    "same custom_id, two models": (
        [BatchRequest(prompt="x", custom_id="a"), BatchRequest(prompt="y", custom_id="a", model="m")],
        "custom_id",
        1,
    ),
    "changed: no prompt": ([GOOD, changed(prompt=None)], "prompt", 1),
    "changed: both": ([changed(messages=[{"role": "user", "content": "x"}])], "messages", 0),
    "changed: prompt a number": ([changed(prompt=7)], "prompt", 0),
    "changed: model a list": ([GOOD, changed(model=["m"])], "model", 1),
    "changed: temperature a text": ([changed(temperature="hot")], "temperature", 0),
    "changed: temperature a list": ([changed(temperature=[1])], "temperature", 0),
    "changed: max_tokens a text": ([changed(max_tokens="9")], "max_tokens", 0),
    "changed: custom_id a number": ([GOOD, changed(custom_id=7)], "custom_id", 1),
}


@pytest.fixture(scope="module")
def server():
    with SimulatedServer() as running:
        yield running


def shows(message: str, field: str, index: int | None) -> bool:
    return field in message and (index is None or f"requests[{index}]" in message)


@pytest.mark.parametrize("case", REQUESTS)
async def test_wrong_requests_are_refused_before_anything_is_sent(case: str, server) -> None:
    """ValidationError with index and field, in the message too; it pickles; the server saw nothing."""
    requests, field, index = REQUESTS[case]
    async with connect(server) as client:
        with pytest.raises(ValidationError) as caught:
            await client.submit_batch_job(requests)
    assert (caught.value.field, caught.value.index) == (field, index)
    assert shows(str(caught.value), field, index)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(again), again.field, again.index) == (str(caught.value), field, index)
    assert server.calls == []


LONG = {f"key{n}": "value" for n in range(15)}
METADATA = {
    "a list": [("a", "b")],
    "15 pairs": LONG,
    "a key of 65 characters": {"k" * 65: "v"},
    "a value of 513 characters": {"k": "v" * 513},
    "an empty key": {"": "v"},
    "a number as key": {1: "v"},
    "a number as value": {"k": 1},
    "None as value": {"k": None},
    "half an emoji as key": {"\ud83d": "v"},
    "half an emoji as value": {"k": "\ud83d"},
    "our first key": {JOB_KEY: "x"},
    "our second key": {LINES_KEY: "x"},
}


@pytest.mark.parametrize("case", METADATA)
async def test_wrong_metadata_are_refused_before_anything_is_sent(case: str, server) -> None:
    async with connect(server) as client:
        with pytest.raises(ValidationError, match="metadata") as caught:
            await client.submit_batch_job([GOOD], metadata=METADATA[case])
    assert caught.value.field == "metadata"
    assert server.calls == []


@pytest.mark.parametrize(
    "window", ["", "24", "h", "0h", "24 h", "24h ", "1w", "-1d", "٢h", "24h\n", 24, "9" * 9 + "h"]
)
async def test_a_wrong_window_is_refused_before_anything_is_sent(window: Any, server) -> None:
    async with connect(server) as client:
        with pytest.raises(ValidationError) as caught:
            await client.submit_batch_job([GOOD], completion_window=window)
    assert caught.value.field == "completion_window"
    assert server.calls == []


@pytest.mark.parametrize("api", ["", "embeddings", "Chat", None, 1, ["chat"], {}])
async def test_a_wrong_api_is_refused_before_anything_is_sent(api: Any, server) -> None:
    async with connect(server) as client:
        with pytest.raises(ValidationError) as caught:
            await client.submit_batch_job([GOOD], api=api)
    assert (caught.value.field, caught.value.index) == ("api", None)
    assert server.calls == []


@pytest.mark.parametrize(
    "job_id", ["", "+", "a+", "+a", "a++b", None, 7, ["a"], "bätch", "batch_\n1", b"batch_1"]
)
@pytest.mark.parametrize("method", ["get_batch_status", "retrieve_batch_results", "cancel_batch_job"])
async def test_a_wrong_job_id_is_refused_before_anything_is_sent(job_id: Any, method: str, server) -> None:
    async with connect(server) as client:
        with pytest.raises(ValidationError) as caught:
            await getattr(client, method)(job_id)
    assert caught.value.field == "job_id"
    assert server.calls == []


ONLINE_ONLY = {
    "extra_headers": {"a": "b"},
    "extra_query": {"a": "b"},
    "service_tier": "priority",
}


@pytest.mark.parametrize("name", ONLINE_ONLY)
async def test_batch_generate_refuses_what_no_line_can_carry(name: str, server) -> None:
    """Only where the prompts go through the Batch API."""
    async with connect(server, batch={"auto_batch_threshold": 2}) as client:
        with pytest.raises(ValidationError, match=name) as caught:
            await client.batch_generate(["a", "b"], use_batch_api=True, **{name: ONLINE_ONLY[name]})
        assert caught.value.field == name
        assert server.calls == []
        await client.batch_generate(["a"], use_batch_api=True, **{name: ONLINE_ONLY[name]})
    assert [call.path for call in server.calls] == ["/v1/chat/completions"]
    server.reset()


async def test_a_closed_client_says_so(server) -> None:
    """As the other methods do."""
    client = connect(server)
    await client.close()
    for call in (
        client.submit_batch_job([GOOD]),
        client.get_batch_status("batch_1"),
        client.retrieve_batch_results("batch_1"),
        client.cancel_batch_job("batch_1"),
        anext(client.list_batch_jobs()),
    ):
        with pytest.raises(RuntimeError, match="this client was closed"):
            await call
    assert server.calls == []


# --- the lines ---------------------------------------------------------------------------------------------


def bodies(requests: list[BatchRequest], api: str = "chat") -> list[dict[str, Any]]:
    items = check_requests(requests, api=api, default_model=MODEL)
    return [item.parameters.with_prompt(item.prompt) for item in items]


def test_a_request_is_a_body() -> None:
    """All parameters as online; what is not given is not sent."""
    message = {"role": "user", "content": "hello"}
    requests = [
        GOOD,
        BatchRequest(prompt="hello", temperature=0, max_tokens=5, system="Be brief.", seed=1, stop=None),
        BatchRequest(messages=[message], model="m", extra_body={"top_k": 3}),
        BatchRequest(prompt=[message], extra_body={"model": "n"}),
        BatchRequest(prompt="hello", response_format=Answer),
    ]
    first, second, third, fourth, fifth = bodies(requests)
    assert first == {"model": MODEL, "messages": [message]}
    assert second == {
        "model": MODEL,
        "temperature": 0,
        "max_tokens": 5,
        "seed": 1,
        "messages": [{"role": "system", "content": "Be brief."}, message],
    }
    assert third == {"model": "m", "top_k": 3, "messages": [message]}
    assert fourth == {"model": "n", "messages": [message]}
    assert fifth["response_format"]["json_schema"]["name"] == "Answer"


def test_a_request_to_the_responses_api_is_a_body() -> None:
    (body,) = bodies(
        [BatchRequest(prompt="hello", temperature=0, max_tokens=5, system="Be brief.")], "responses"
    )
    assert body == {
        "model": MODEL,
        "temperature": 0,
        "max_output_tokens": 5,
        "instructions": "Be brief.",
        "input": "hello",
    }


parameters = st.sampled_from(
    [
        {},
        {"temperature": 0},
        {"temperature": 1},
        {"seed": 1},
        {"seed": True},
        {"seed": 1.0},
        {"n": 1},
        {"stop": ["a"]},
        {"stop": "a"},
        {"stop": ("a",)},
        {"logit_bias": {"1": 2}},
        {"logit_bias": {"1": 2.0}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": []}}}]},
        {"max_tokens": 1},
        {"model": "m"},
        {"extra_body": {"model": "m"}},
        {"extra_body": {"x": None}},
        {"system": "s"},
        {"response_format": Answer},
    ]
)


@patient
@given(st.lists(parameters, min_size=1, max_size=12))
def test_requests_that_share_parameters_do_not_mix_them_up(given_parameters: list[dict[str, Any]]) -> None:
    """Checked together or one by one, each has the same body, types included."""
    requests = [BatchRequest(prompt=f"p{n}", **params) for n, params in enumerate(given_parameters)]
    together = bodies(requests)
    alone = [body for request in requests for body in bodies([request])]
    assert list(map(repr, together)) == list(map(repr, alone))


@patient
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "b#1", "request-1", "x-2"]), st.sampled_from("mn")), min_size=1
    )
)
def test_names_on_the_wire_tell_all_requests_apart(pairs: list[tuple[str, str]]) -> None:
    """Two requests of a job never have one name, whichever batch they are in; or the clash is refused."""
    requests = [BatchRequest(prompt="x", custom_id=own or None, model=model) for own, model in pairs]
    try:
        lines = list(check_requests(requests, api="chat", default_model=MODEL))
    except ValidationError as error:
        assert error.field == "custom_id"
        return
    names = [line.custom_id for line in lines]
    assert len(set(names)) == len(names)
    if lines[0].numbered:
        assert [int(name.rpartition("#" if "#" in name else "-")[2]) for name in names] == list(
            range(len(names))
        )


def test_requests_may_come_from_a_generator() -> None:
    """Any iterable does; the lines are valid JSON of one line each."""
    items = list(check_requests(asked(3, temperature=0.5), api="chat", default_model=MODEL))
    assert [item.to_bytes().count(b"\n") for item in items] == [1, 1, 1]
