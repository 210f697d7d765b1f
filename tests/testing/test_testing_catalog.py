"""What other servers send: refusals, answers that are none, usage of other shapes, and scripted answers."""

import json
from collections import Counter
from datetime import timedelta
from email.utils import parsedate_to_datetime

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from simulated_batches import finished, several
from simulated_calls import CHAT, client, error_of, events_of, send

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._catalog import REASONING, REFUSALS, SPOILERS
from openai_eval_client.testing._faults import FAULTS
from openai_eval_client.testing._options import OUTCOMES

ASKED = {"model": "m", "input": "hello there"}


def answered(fault, body=CHAT, path="/chat/completions", **options):
    """The one call that met the fault, its headers, and the body that was sent."""
    with SimulatedServer(script=[fault], **options) as server:
        status, headers, raw = send(server, body, path)
        (call,) = server.calls
    assert (status, call.fault) == (call.status, fault)
    return call, headers, json.loads(raw) if headers["content-type"] == "application/json" else raw.decode()


def test_every_fault_is_documented():
    """The help names each fault once or more, and no name stands for two."""
    assert [fault for fault in FAULTS if f'"{fault}"' not in SimulatedServer.__doc__] == []
    assert len(set(FAULTS)) == len(FAULTS)
    assert len(set(OUTCOMES)) == len(OUTCOMES)


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_refusal_is_sent_as_the_table_has_it(fault):
    """Status, shape and words are the table's; nothing is billed, and only some are charged."""
    call, headers, body = answered(fault, {**CHAT, "service_tier": "flex"}, rpm=100)
    row = REFUSALS[fault]
    assert call.status == row.status
    assert not call.served
    charged = fault in ("500", "503", "408", "409", "login_page")
    assert bool(call.charged_tokens) == charged == ("x-ratelimit-limit-requests" in headers)
    shown = body if isinstance(body, str) else json.dumps(body)
    assert shown == (row.body if isinstance(row.body, str) else json.dumps(row.body)).replace("{wait}", "1")
    assert "{" not in "".join(headers.values())


@pytest.mark.parametrize(
    ("fault", "off"),
    [("date_behind", -20), ("date_ahead", 3), ("date_asctime", 0), ("date_zone", 0)],
)
def test_a_date_to_retry_at_is_by_the_servers_own_clock(fault, off):
    """The wait is the difference to the answer's own date, however wrong that is."""
    with SimulatedServer(script=["ok", fault], fault_wait=7) as server:
        right = parsedate_to_datetime(send(server)[1]["date"])
        headers = send(server)[1]
    sent = parsedate_to_datetime(headers["date"])
    until = parsedate_to_datetime(headers["retry-after"]).replace(tzinfo=sent.tzinfo)
    assert timedelta(seconds=6) <= until - sent <= timedelta(seconds=9)  # both are in whole seconds
    assert abs(sent - right - timedelta(minutes=off)) < timedelta(seconds=60)


@pytest.mark.parametrize(("fault", "shown"), [("retry_in", "retry in 11.6s."), ("retry_delay", '"11.6s"')])
def test_a_wait_in_words_can_be_set(fault, shown):
    """`fault_wait` is the wait that is stated."""
    assert shown in json.dumps(answered(fault, fault_wait=11.6)[2])


def test_only_flex_requests_lack_capacity():
    """The same fault leaves other tiers alone."""
    with SimulatedServer(faults={"resource_unavailable": 1}) as server:
        assert send(server, {**CHAT, "service_tier": "flex"})[0] == 429
        assert send(server)[0] == 200
        assert [call.fault for call in server.calls] == ["resource_unavailable", None]


@pytest.mark.parametrize("fault", ["failed", "failed_rate_limit", "failed_half", "finish_error"])
def test_an_answer_can_fail_with_status_200(fault):
    """A completion says so where it ends, a response by its status; only the completion is billed."""
    half = "echo: hello there"[:8] if fault == "failed_half" else ""
    code = {"failed_rate_limit": 429, "finish_error": None}.get(fault, 502)
    call, _, body = answered(fault)
    (choice,) = body["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("error", half)
    assert choice.get("error", {}).get("code") == code
    assert (call.served, call.completion_tokens) == (True, 3)
    call, _, body = answered(fault, ASKED, "/responses")
    response = Response.model_validate(body)
    assert (response.status, response.usage, bool(response.output)) == ("failed", None, bool(half))
    assert (response.error is None) == (code is None)
    assert (call.served, call.completion_tokens) == (False, 0)


def test_other_answers_that_are_none():
    """Statuses of a response, an error beside, no choices, choices of another type."""
    for status in ("cancelled", "in_progress"):
        assert answered(f"status_{status}", ASKED, "/responses")[2]["status"] == status
        assert answered(f"status_{status}")[2]["choices"]
    assert answered("error_beside")[2].keys() >= {"choices", "error"}
    assert (answered("empty")[2]["choices"], answered("empty", ASKED, "/responses")[2]["output"]) == ([], [])
    assert answered("wrong_types")[2]["choices"] == "none"
    assert answered("filtered")[2]["choices"][0]["finish_reason"] == "content_filter"
    assert answered("filtered", ASKED, "/responses")[2]["incomplete_details"] == {"reason": "content_filter"}


async def test_a_failure_in_the_background_comes_with_its_end():
    """The response is queued as ever; failed, it is not on the bill."""
    async with SimulatedServer(script=["failed", "filtered"]) as server, client(server) as sdk:
        for ends, billed in (("failed", False), ("incomplete", True)):
            created = await sdk.responses.create(**ASKED, background=True)
            shown = [(await sdk.responses.retrieve(created.id)).status for _ in range(2)]
            assert (created.status, *shown) == ("queued", "in_progress", ends)
            assert [call.served for call in server.calls][-3] is billed


@pytest.mark.parametrize(("path", "body"), [("/chat/completions", CHAT), ("/responses", ASKED)])
def test_an_answer_can_come_as_something_else(path, body):
    """A whole answer, then the end of a stream; or all of a stream though none was asked for."""
    with SimulatedServer(script=["json_done", "sse"]) as server:
        _, headers, raw = send(server, body, path)
        head, done = raw.decode().split("\n\n", 1)
        assert (headers["content-type"], done) == ("application/json", "data: [DONE]\n\n")
        kind = ChatCompletion if body is CHAT else Response
        assert kind.model_validate_json(head, strict=True)
        _, headers, raw = send(server, body, path)
        assert headers["content-type"].startswith("text/event-stream")
        assert any('"total_tokens":' in event for event in events_of(raw))


TOTALS = {
    "reasoning_outside": 11 + REASONING,
    "float_usage": 11.0,
    "negative_usage": -11,
    "huge_usage": 10**15,
}


@pytest.mark.parametrize(
    ("fault", "total"), [*TOTALS.items(), ("text_usage", "many"), ("null_counts", None), ("cached_hits", 11)]
)
@pytest.mark.parametrize(("path", "body"), [("/chat/completions", CHAT), ("/responses", ASKED)])
def test_usage_can_have_another_shape(path, body, fault, total):
    """What is stated changes; what is billed only where more was generated."""
    call, _, body = answered(fault, body, path)
    assert (body["usage"]["total_tokens"], type(body["usage"]["total_tokens"])) == (total, type(total))
    assert call.completion_tokens == 3 + (REASONING if fault == "reasoning_outside" else 0)


def test_cached_tokens_can_be_spelled_otherwise():
    """As two counts of the prompt, or as one beside the others."""
    hits = answered("cached_hits")[2]["usage"]
    assert (hits["prompt_cache_hit_tokens"], hits["prompt_cache_miss_tokens"]) == (4, 4)
    assert answered("cached_beside", ASKED, "/responses")[2]["usage"]["cached_tokens"] == 4


def test_an_answer_can_name_a_tier_that_was_not_asked_for():
    """The tier is that of the project."""
    assert [answered(tier)[2]["service_tier"] for tier in ("priority", "fast")] == ["priority", "fast"]


@pytest.mark.parametrize("fault", SPOILERS)
def test_a_spoilt_answer_can_be_streamed_or_be_of_embeddings(fault):
    """Every fault of an answer leaves something that can be sent, from every endpoint."""
    embedded = {"model": "m", "input": "x", "dimensions": 2}
    for path, body in (("/chat/completions", CHAT), ("/responses", ASKED), ("/completions", PROMPTED)):
        with SimulatedServer(script=[fault]) as server:
            assert send(server, {**body, "stream": True}, path)[0] == 200
    assert answered(fault, embedded, "/embeddings")[0].status == 200
    assert answered(fault, PROMPTED, "/completions")[0].status == 200


PROMPTED = {"model": "m", "prompt": "hello there"}


async def test_a_line_of_a_batch_can_be_spoilt():
    """Lines end like answers online; their status may be a text, and so may their body."""
    outcomes = ["failed", "error_beside", "empty", "float_usage", "status_text", "body_text"]
    async with (
        SimulatedServer(batch_seconds=0, batch_plans=[{"lines": outcomes}]) as server,
        client(server) as sdk,
    ):
        batch = await finished(sdk, several(6))
        content = (await sdk.files.content(batch.output_file_id)).content
    read = sorted((json.loads(line) for line in content.splitlines()), key=lambda line: line["custom_id"])
    failed, beside, empty, floats, status, text = (line["response"] for line in read)
    assert failed["body"]["choices"][0]["finish_reason"] == "error"
    assert beside["body"]["error"]["code"] == 502
    assert empty["body"]["choices"] == []
    assert type(floats["body"]["usage"]["total_tokens"]) is float
    assert (status["status_code"], text["status_code"]) == ("200", 200)
    assert json.loads(text["body"])["choices"]


# --- scripted answers ---------------------------------------------------------------------------------------


def asked(text, **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def text_of(reply):
    return json.loads(reply[2])["choices"][0]["message"]["content"]


def test_a_prompt_gets_what_its_pattern_says():
    """The first pattern counts; other prompts, and "ok", are answered as ever."""
    script = [("capital of France", "Paris"), ("France", "500"), ("^Spain", "ok")]
    with SimulatedServer(script=script) as server:
        assert text_of(send(server, asked("the capital of France?"))) == "Paris"
        assert text_of(send(server, asked("the capital of France?"))) == "Paris"
        assert send(server, asked("France"))[0] == 500
        assert text_of(send(server, asked("Spain"))) == "echo: Spain"
        assert text_of(send(server, asked("in Spain"))) == "echo: in Spain"
        assert [call.completion_tokens for call in server.calls] == [1, 1, 0, 2, 3]
        assert [call.fault for call in server.calls] == [None, None, "500", None, None]


def test_a_prompt_can_get_one_outcome_after_the_other():
    """The last one stays; each pattern counts for itself, and names in order are for the others."""
    script = ["429", ("a", ["503", "slow_down", "first", "second"]), ("b", ["401", "yes"])]
    with SimulatedServer(script=script) as server:
        replies = [send(server, asked(text)) for text in "abaaaabcc"]
    assert [status for status, _, _ in replies] == [503, 401, 503, 200, 200, 200, 200, 429, 200]
    assert [text_of(replies[index]) for index in (3, 4, 5, 6, 8)] == [
        "first",
        "second",
        "second",
        "yes",
        "echo: c",
    ]


@pytest.mark.parametrize("process", [False, True])
def test_a_body_can_be_given(process):
    """A mapping is sent as JSON, bytes as they are, each billed by the usage that it states."""
    whole = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 150}}
    refused = {"status": 418, "headers": {"retry-after": "{5}"}, "body": ["I am a teapot"]}
    script = [
        ("whole", whole),
        ("bytes", b"\xff\x00"),
        ("pot", refused),
        ("text", {"status": 503, "body": "no"}),
    ]
    with SimulatedServer(script=script, process=process, tpm=10_000, charge="actual") as server:
        assert json.loads(send(server, asked("whole", stream=True))[2]) == whole
        assert send(server, asked("bytes"))[2] == b"\xff\x00"
        status, headers, raw = send(server, asked("pot"))
        assert (status, headers["retry-after"], json.loads(raw)) == (418, "{5}", ["I am a teapot"])
        status, headers, raw = send(server, asked("text"))
        assert (status, headers["content-type"], raw) == (503, "text/plain; charset=utf-8", b"no")
        calls = [(call.served, call.prompt_tokens, call.completion_tokens) for call in server.calls]
        assert calls[0] == (True, 100, 50)
        assert [served for served, _, _ in calls] == [True, False, False, False]
        assert [call.charged_tokens for call in server.calls] == [150, 0, 0, 0]
        assert server.counts == Counter({"scripted": 4, "200": 2, "418": 1, "503": 1})


def test_a_scripted_text_is_cut_and_can_be_a_response():
    """A text is an answer like any other, of every endpoint, in or out of the background."""
    with SimulatedServer(script=[("hello", "one two three")], background_polls=0) as server:
        cut = json.loads(send(server, asked("hello", max_tokens=2))[2])
        assert (cut["choices"][0]["message"]["content"], cut["usage"]["completion_tokens"]) == ("one two ", 2)
        created = json.loads(send(server, {**ASKED, "background": True}, "/responses")[2])
        polled = send(server, None, f"/responses/{created['id']}", method="GET")[2]
        assert Response.model_validate_json(polled).output_text == "one two three"


def test_a_fault_of_the_api_is_in_its_words():
    """The refusal by a quota that is used up is that of the table."""
    with SimulatedServer(quota_exhausted_after=0) as server:
        assert error_of(send(server)[2]) == REFUSALS["insufficient_quota"].body["error"]
