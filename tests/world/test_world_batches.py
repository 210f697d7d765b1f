"""Lines of a batch's output as other servers write them: read as the same bodies are online."""

from __future__ import annotations

import json
from decimal import Decimal

import openai
import pytest
from wire_rows import KEY, connect
from wire_server import USD, chat, response, serving

from openai_eval_client import BatchRequest

pytestmark = pytest.mark.usefixtures("no_pauses", "few_certificates")
BODY = chat()
TEXT = json.dumps(BODY)
WORDS = "the tank is empty"
REFUSED = {"error": {"message": WORDS, "code": None, "type": "x", "param": None}}
HALF = str(Decimal(USD) / 2)


def line(body, status=200, error=None, **more):
    answer = {"status_code": status, "request_id": "req_1", "body": body, **more}
    return json.dumps({"id": "x", "custom_id": "CUSTOM_ID", "response": answer, "error": error}).encode()


def bare(**fields):
    return json.dumps({"id": "x", "custom_id": "CUSTOM_ID", **fields}).encode()


ANSWERS = {
    "as OpenAI writes it": line(BODY),
    "status_code as text": line(BODY, "200"),
    "status_code as a float": line(BODY, 200.0),
    "no status_code": line(BODY, None),
    "body as a JSON text": line(TEXT),
    "body as a JSON text, status_code as text": line(TEXT, "200"),
    "body as a JSON text, then [DONE]": line(f"{TEXT}\n\ndata: [DONE]\n\n"),
    "body as a stream of one event": line(f"data: {TEXT}\n\ndata: [DONE]\n\n"),
    "error: {}": line(BODY, error={}),
    "error: a text of nothing": line(BODY, error=""),
    "NaN and -Infinity": line({**BODY, "more": [float("nan"), float("-inf")]}),
    "no error, no id": json.dumps(
        {"custom_id": "CUSTOM_ID", "response": {"status_code": 200, "body": BODY}}
    ).encode(),
}
# What is no answer: the words that its error holds, and what it costs.
FAILURES = {
    "status_code as text, refused": (line(REFUSED, "400"), "the tank is empty", "0"),
    "status_code as text, rate limited": (line(REFUSED, "429"), "the tank is empty", "0"),
    "body as a JSON text, refused": (line(json.dumps(REFUSED), 400), "the tank is empty", "0"),
    "body as plain text, refused": (line("the tank is empty", 500), "the tank is empty", "0"),
    "body as half a JSON text, refused": (line('{"error": {"message": "the tank is empty"', 400), WORDS, "0"),
    "body as a list, refused": (line([REFUSED], 429), "the tank is empty", "0"),
    "body as a text, refused": (line({"error": "the tank is empty"}, 400), "the tank is empty", "0"),
    "refused in a 200": (line(REFUSED), "the tank is empty", "0"),
    "refused in a 200, as a JSON text": (line(json.dumps(REFUSED)), "the tank is empty", "0"),
    "body as half a JSON text": (line(TEXT[:90]), "", "0"),
    "body: null": (line(None), "", "0"),
    "body: 5": (line(5), "", "0"),
    "body: []": (line([]), "", "0"),
    "body as a page": (line("<html><body>Sign in</body></html>"), "", "0"),
    "an answer with status 500": (line(BODY, 500), "", None),
    "choices: [], billed": (line({**BODY, "choices": []}), "", HALF),
    "finish_reason error, billed": (line(chat("ha", finish="error")), "", HALF),
    "error beside choices, billed": (line(chat(error={"code": 502, "message": "broke"})), "broke", HALF),
    "error beside choices, as a JSON text": (
        line(json.dumps(chat(error={"code": 502, "message": "broke"}))),
        "broke",
        HALF,
    ),
    "no response": (bare(response=None, error={"code": "x", "message": "never ran"}), "never ran", "0"),
    "no response, the error a text": (bare(response=None, error="never ran"), "never ran", "0"),
    "no response, the error a list": (
        bare(response=None, error=[{"message": "never ran"}]),
        "never ran",
        "0",
    ),
    "no response, no error": (bare(response=None, error=None), "", "0"),
    "the response a text": (bare(response="yes", error=None), "", "0"),
    "no response at all": (bare(), "", "0"),
}


async def settled(third, api="chat"):
    """Return the outcome of the middle one of three lines, and what it cost."""
    good = line(BODY if api == "chat" else response())
    requests = [BatchRequest(prompt=f"p{number}") for number in range(3)]
    async with serving(lines=[good, third, good]) as server, connect(server) as client:
        job = await client.submit_batch_job(requests, api=api)
        outcomes = await client.retrieve_batch_results(job.job_id, return_exceptions=True)
        assert [outcomes[0].content, outcomes[2].content] == ["yes", "yes"]
        assert "req_1" in {outcomes[0].request_id, "req_1"}
        return outcomes[1], client.stats.cost.total - Decimal(USD)


@pytest.mark.parametrize("raw", ANSWERS.values(), ids=ANSWERS)
async def test_a_line_that_holds_an_answer(raw):
    """It is read and billed once, at half the price."""
    outcome, cost = await settled(raw)
    assert getattr(outcome, "content", outcome) == "yes"
    assert cost == Decimal(HALF)
    assert outcome.usage.total_tokens == 1500


@pytest.mark.parametrize(("raw", "words", "usd"), FAILURES.values(), ids=FAILURES)
async def test_a_line_that_holds_none(raw, words, usd):
    """Its error says what the server said; what it states to have used is billed."""
    outcome, cost = await settled(raw)
    assert isinstance(outcome, openai.OpenAIError), repr(outcome)
    assert words in str(outcome)
    assert usd is None or cost == Decimal(usd)


async def test_a_key_in_a_line_stays_there():
    """Servers echo what they refuse; the error does not."""
    for body in ({"error": {"message": f"bad key {KEY}"}}, {"detail": f"no {KEY}"}, f"{KEY}?", [KEY]):
        outcome, _ = await settled(line(body, 401))
        assert KEY not in f"{outcome!r} {outcome} {getattr(outcome, 'body', None)}"


async def test_a_response_that_failed():
    """The other API's bodies likewise."""
    body = response(None, usage=None, status="failed", error={"code": "server_error", "message": "broke"})
    for raw in (line(body), line(json.dumps(body), "200")):
        outcome, cost = await settled(raw, "responses")
        assert isinstance(outcome, openai.OpenAIError), repr(outcome)
        assert "broke" in str(outcome)
        assert cost == 0


async def test_what_fails_for_now_is_submitted_once_more():
    """In a run by batches, a failure of the moment is no loss."""
    bad = line({**BODY, "choices": [], "usage": None})
    good = line(BODY)
    async with serving(lines=[bad, good]) as server, connect(server) as client:
        outcomes = await client.batch_generate(["p0", "p1"], use_batch_api=True, return_exceptions=True)
        assert len(outcomes) == 2
        assert outcomes[1].content == "yes"
        assert len(server.batches) == 2


async def test_a_line_that_failed_is_not_cached(tmp_path):
    """A second run asks for it again, and for it alone."""
    bad, cache = line(REFUSED, 400), tmp_path / "cache.sqlite"
    async with serving(lines=[line(BODY), bad]) as server:
        async with connect(server, cache=cache) as client:
            await client.batch_generate(["p0", "p1"], use_batch_api=True, return_exceptions=True)
        async with connect(server, cache=cache) as client:
            answers = await client.batch_generate(["p0", "p1"])
            assert [answer.cached for answer in answers] == [True, False]
        assert server.calls == 1
