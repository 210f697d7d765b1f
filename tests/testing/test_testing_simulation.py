"""What the simulated API does with a request: keys, paths, models, charges, and when faults are drawn."""

import asyncio

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_calls import CHAT, client, error_of, send

from openai_eval_client.testing import SimulatedServer


@pytest.fixture
def server():
    with SimulatedServer() as running:
        yield running


async def test_models_are_listed_and_looked_up():
    """Models are listed in order, and one that does not exist is a 404."""
    with SimulatedServer(models={"b", "a/x"}) as server:
        async with client(server) as sdk:
            assert [model.id async for model in sdk.models.list()] == ["a/x", "b"]
            assert (await sdk.models.retrieve("b")).id == "b"
            with pytest.raises(openai.NotFoundError) as caught:
                await sdk.chat.completions.create(**CHAT)
    assert caught.value.code == "model_not_found"
    assert "`m` does not exist" in caught.value.message


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"{", None, None),
        (b"[]", None, None),
        ({"messages": []}, "model", "missing_required_parameter"),
        ({"model": 3, "messages": []}, "model", "invalid_type"),
        ({"model": "m"}, "messages", "missing_required_parameter"),
        ({"model": "m", "messages": "x"}, "messages", "invalid_type"),
        ({**CHAT, "max_tokens": "x"}, "max_tokens", "invalid_type"),
    ],
)
def test_a_body_that_cannot_be_understood_is_a_400(server, body, param, code):
    """The error names the parameter and what is wrong with it."""
    status, _, raw = send(server, body)
    assert (status, error_of(raw)["param"], error_of(raw)["code"]) == (400, param, code)
    assert error_of(raw)["type"] == "invalid_request_error"


@settings(max_examples=20)
@given(st.binary(max_size=200))
def test_any_bytes_get_an_api_error(fuzzed_server, raw):
    """No body makes the server fail otherwise than with an error of the API."""
    status, _, answer = send(fuzzed_server, raw)
    assert status == 400
    assert error_of(answer)["message"]


@pytest.fixture(scope="module")
def fuzzed_server():
    with SimulatedServer() as running:
        yield running


def test_unknown_paths_and_methods(server):
    """An unknown path is a 404, an unknown method of a known path a 405."""
    status, _, raw = send(server, path="/nowhere")
    assert status == 404
    assert error_of(raw)["message"] == "Invalid URL (POST /v1/nowhere)"
    assert send(server, path="/assistants", method="GET", body=None)[0] == 404
    assert send(server, method="GET", body=None)[0] == 405


def test_keys_are_checked():
    """A missing or wrong key is a 401; without `api_key` every key is accepted."""
    with SimulatedServer(api_key="sk-the-right-one") as server:
        assert send(server, key="sk-the-right-one")[0] == 200
        status, _, raw = send(server, key="sk-a-wrong-key-6789")
        assert (status, error_of(raw)["code"]) == (401, "invalid_api_key")
        assert "Incorrect API key provided: sk-a-wro*******6789." in error_of(raw)["message"]
        assert send(server, headers={"authorization": "Basic x"})[0] == 401
        assert error_of(send(server, key="")[2])["message"].startswith("You didn't provide an API key.")
    with SimulatedServer() as server:
        assert send(server, key="")[0] == 401
        assert send(server, key="anything")[0] == 200


@pytest.mark.parametrize(("charge", "charged"), [("upfront", 8 + 100), ("actual", 8 + 3)])
def test_the_charge_is_what_was_asked_or_what_was_used(charge, charged):
    """ "upfront" charges the maximum, "actual" the tokens of the answer."""
    with SimulatedServer(tpm=1, window=60 * 1000, charge=charge) as server:
        _, headers, _ = send(server, {**CHAT, "max_tokens": 100})
        assert server.calls[0].charged_tokens == charged
        assert int(headers["x-ratelimit-remaining-tokens"]) == 1000 - charged


def test_without_a_maximum_the_default_output_is_charged():
    """Each of `n` answers is charged the default; embeddings have no output."""
    with SimulatedServer(default_output=40) as server:
        send(server, {**CHAT, "n": 2})
        send(server, {"model": "m", "input": "hello there"}, "/embeddings")
        assert [call.charged_tokens for call in server.calls] == [8 + 2 * 40, 2]


def test_quota_runs_out():
    """After so many generations every request is refused for lack of quota."""
    with SimulatedServer(quota_exhausted_after=1, script=["500"]) as server:
        assert [send(server)[0] for _ in range(3)] == [500, 200, 429]
        error = error_of(send(server)[2])
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")


def test_headers_come_with_errors_of_a_known_model():
    """Errors of an admitted request carry the limits, an unknown path does not."""
    with SimulatedServer(rpm=60, script=["500"]) as server:
        assert "x-ratelimit-remaining-requests" in send(server)[1]
        assert "x-ratelimit-remaining-tokens" not in send(server)[1]
        assert "x-ratelimit-limit-requests" not in send(server, path="/nowhere")[1]


def test_headers_can_be_switched_off():
    """Without `headers` and `retry_after` only the request id is left."""
    with SimulatedServer(rpm=1, headers=False, retry_after=False) as server:
        for status in (200, 429):
            got, headers, _ = send(server)
            assert got == status
            assert not [name for name in headers if "ratelimit" in name or "retry" in name]
            assert "x-request-id" in headers


@pytest.mark.parametrize(("stamp", "seen"), [("admission", {"1", "0"}), ("answer", {"0"})])
async def test_headers_are_stamped_at_admission_or_answer(stamp, seen):
    """Two requests in flight together: at the answer both budgets are gone, at admission one is left."""
    with SimulatedServer(rpm=2, stamp=stamp, latency=0.5, latency_sigma=0) as server:
        answers = await asyncio.gather(*(asyncio.to_thread(send, server) for _ in range(2)))
    assert {headers["x-ratelimit-remaining-requests"] for _, headers, _ in answers} == seen


def test_faults_are_drawn_only_for_admitted_generations():
    """A listing and a refused request have no fault."""
    with SimulatedServer(faults={"500": 1.0}, rpm=1) as server:
        assert send(server, None, "/models", method="GET")[0] == 200
        assert [send(server)[0] for _ in range(2)] == [500, 429]
        assert [call.fault for call in server.calls] == [None, "500", None]
