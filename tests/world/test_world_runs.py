"""What ends a run, and what does not: evidence that every prompt would fail alike, and nothing less."""

from __future__ import annotations

import openai
import pytest
from wire_rows import connect
from wire_server import GOOD, Reply, refusal, serving

from openai_eval_client import PartialFailureError, QuotaError

pytestmark = pytest.mark.usefixtures("no_pauses", "few_certificates")
KEY, ADDRESS = refusal("no such key", status=401), refusal("no such address", status=404)
PAGE = Reply(b"<!DOCTYPE html><html><body>Sign in</body></html>", kind="text/html")
CONTENT = refusal("flagged", "content_policy_violation", status=400)
BROKE = refusal("no credit", "insufficient_quota")
CODES = {
    "k": KEY,
    "a": ADDRESS,
    "p": PAGE,
    "c": CONTENT,
    "q": BROKE,
    "g": GOOD,
    "s": Reply(usd=GOOD.usd, delay=0.1),  # a slow answer
    "S": Reply(KEY.body, 401, delay=0.1),  # a slow refusal
    "d": refusal("not in your country", status=403),
    "m": refusal("no such model", "model_not_found", status=404),
}


def named(kinds):
    return [f"<{kind}> number {number}" for number, kind in enumerate(kinds)]


async def run(kinds, *, in_flight=1, **options):
    """Return how a run ended that meets these replies in turn: outcomes or the error, and the calls."""
    script = {f"<{kind}>": (reply,) for kind, reply in CODES.items()}
    async with serving(script) as server, connect(server) as client:
        try:
            ended = await client.batch_generate(named(kinds), max_concurrent=in_flight, **options)
        except openai.OpenAIError as error:
            ended = error
        return ended, server.calls


ENDED = [
    ("kkkkk", 3, "no such key"),
    ("aaaaa", 3, "no such address"),
    ("ppppp", 3, "base_url"),
    ("ddddd", 3, "country"),
    ("mmmmm", 3, "no such model"),
    ("kapgg", 3, "base_url"),
    ("g" + "k" * 30, 21, "no such key"),
    ("k" + "g" + "k" * 30, 22, "no such key"),
    ("k" * 19, 3, "no such key"),
]


@pytest.mark.parametrize(("kinds", "calls", "words"), ENDED, ids=[kinds[:9] for kinds, *_ in ENDED])
async def test_evidence_ends_a_run(kinds, calls, words):
    """Three in a row before any answer, twenty after one."""
    ended, sent = await run(kinds, return_exceptions=True)
    assert isinstance(ended, openai.APIError), repr(ended)
    assert not isinstance(ended, PartialFailureError)
    assert words in str(ended)
    assert sent == calls
    answered = [place for place, kind in enumerate(kinds[:calls]) if kind == "g"]
    assert [place for place, answer in enumerate(ended.responses) if answer is not None] == answered


async def test_pages_after_an_answer_end_a_run_later():
    """Twenty prompts in a row, each of which may be tried again: a proxy's notice passes."""
    ended, sent = await run("gg" + "p" * 60)
    assert isinstance(ended, openai.APIResponseValidationError), repr(ended)
    assert 22 <= sent <= 66  # or a few more that were on their way


@pytest.mark.parametrize(
    "kinds",
    ["kkgkkgkk", "kkgggg", "g" + "k" * 19 + "g" + "k" * 19 + "g", "ccccccc", "c" * 25 + "g", "gccccc", "kkg"],
)
async def test_less_ends_none(kinds):
    """Every prompt is sent, and has its outcome."""
    outcomes, sent = await run(kinds, return_exceptions=True)
    assert sent == len(kinds)
    assert [getattr(outcome, "content", None) for outcome in outcomes] == [
        "yes" if kind == "g" else None for kind in kinds
    ]


@pytest.mark.parametrize("kinds", ["k", "kk", "p", "aa", "ka"])
async def test_a_run_of_one_or_two_prompts_raises_the_error_itself(kinds):
    """There is nothing that could have been answered."""
    ended, sent = await run(kinds)
    assert isinstance(ended, openai.APIError), repr(ended)
    assert sent == len(kinds)
    assert ended.responses == [None] * len(kinds)


async def test_refused_contents_alone_are_failures_of_prompts():
    """However few there are."""
    ended, sent = await run("cc")
    assert isinstance(ended, PartialFailureError)
    assert sent == 2


@pytest.mark.parametrize("kinds", ["kkksgggg", "skkkkkgg", "kskkgk"])
async def test_an_answer_in_flight_is_evidence_too(kinds):
    """Three refusals do not end a run while a request is on its way that is then answered."""
    outcomes, sent = await run(kinds, in_flight=4, return_exceptions=True)
    assert sent == len(kinds)
    assert [getattr(outcome, "content", None) for outcome in outcomes] == [
        "yes" if kind in "gs" else None for kind in kinds
    ]


async def test_refusals_in_flight_end_a_run():
    """Once all that was in flight has ended without an answer."""
    ended, sent = await run("kkkSS" + "k" * 60, in_flight=5)
    assert isinstance(ended, openai.AuthenticationError), repr(ended)
    assert sent < 40


async def test_many_in_flight_end_soon():
    """Of a thousand prompts a few dozen are sent."""
    ended, sent = await run("k" * 1000, in_flight=20)
    assert isinstance(ended, openai.AuthenticationError), repr(ended)
    assert sent <= 60


async def test_used_up_credit_ends_a_run_at_once():
    """What is in flight is handed out, nothing more is sent."""
    ended, sent = await run("ssq" + "g" * 50, in_flight=3)
    assert isinstance(ended, QuotaError), repr(ended)
    assert sent == 3
    assert [answer and answer.content for answer in ended.responses[:3]] == ["yes", "yes", None]


async def test_cached_answers_are_no_evidence(tmp_path):
    """A key that was withdrawn since ends a resumed run as it would a new one."""
    cache = tmp_path / "cache.sqlite"
    script = {f"<{kind}>": (reply,) for kind, reply in CODES.items()}
    async with serving(script) as server:
        async with connect(server, cache=cache) as client:
            await client.batch_generate(named("ggggg"))
        async with connect(server, cache=cache) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.batch_generate(named("ggggg" + "k" * 20), max_concurrent=1)
        assert server.counts["<k>"] == 3
        assert [answer is not None for answer in caught.value.responses[:5]] == [True] * 5


async def test_prompts_one_by_one_are_their_own_runs():
    """`generate_response` raises what its prompt met."""
    script = {"<k>": (KEY,)}
    async with serving(script) as server, connect(server) as client:
        for number in range(5):
            with pytest.raises(openai.AuthenticationError):
                await client.generate_response(f"<k> {number}")
        assert server.calls == 5


async def test_as_completed_ends_by_the_same_evidence():
    """After the outcomes of the prompts that were refused."""
    script = {"<k>": (KEY,)}
    async with serving(script) as server, connect(server) as client:
        prompts = named("k" * 20)
        with pytest.raises(openai.AuthenticationError):
            _ = [outcome async for outcome in client.as_completed(prompts, max_concurrent=1)]
        assert server.calls == 3
