"""What an answer used, however a server counts; what it costs to the last digit; what local faults lose."""

from __future__ import annotations

import sqlite3
import sys
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from wire_rows import Row, check_batch, check_drop_in, check_one, connect
from wire_server import MODEL, Reply, chat, response, serving

from openai_eval_client import BudgetExceededError, ModelResponse

pytestmark = pytest.mark.usefixtures("no_pauses", "few_certificates")
INPUT, CACHED, OUTPUT = Decimal("0.15e-6"), Decimal("0.075e-6"), Decimal("0.6e-6")  # USD a token


class Counts(NamedTuple):
    """A row: the usage on the wire, and what is read from it."""

    name: str
    usage: Any
    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0
    estimated: bool | None = False  # None: either is right
    api: str = "chat"

    @property
    def usd(self) -> str:
        """What it costs."""
        ordinary = self.prompt - self.cached
        return str(ordinary * INPUT + self.cached * CACHED + self.completion * OUTPUT)

    @property
    def row(self) -> Row:
        """It as a row of the other tables."""
        body = chat(usage=self.usage) if self.api == "chat" else response(usage=self.usage)
        batch_usd = Decimal(self.usd) / 2 + self.cached * CACHED / 2  # cached input costs as much in a batch
        reply = Reply(body, usd=self.usd)
        return Row(self.name, (reply,), api=self.api, batch_usd=str(batch_usd))


def of(prompt, completion, total=None, reasoning=None, **more):
    """The usage of a chat completion."""
    details = {} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    counted = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    return {**counted, **details, **more}


def of_response(given, made, total=None, reasoning=0, cached=0):
    details = {"output_tokens_details": {"reasoning_tokens": reasoning}}
    details["input_tokens_details"] = {"cached_tokens": cached}
    return {"input_tokens": given, "output_tokens": made, "total_tokens": total, **details}


PARTS = "prompt_tokens_details"
READ = [
    Counts("as OpenAI counts", of(100, 50, 150), 100, 50),
    Counts("reasoning inside", of(100, 50, 150, 30), 100, 50, reasoning=30),
    Counts("reasoning outside", of(10120, 1499, 14428, 2809), 10120, 4308, reasoning=2809),
    Counts("reasoning outside, not said", of(100, 50, 2150), 100, 2050),
    Counts("Google: thoughts outside", of(20, 198, 623), 20, 603),
    Counts("Google: nothing but thoughts", of(21, 0, 81, 60), 21, 60, reasoning=60),
    Counts("no total", of(100, 50), 100, 50),
    Counts("a total of nothing", of(100, 50, 0), 100, 50),
    Counts("a total that is too small", of(100, 50, 120), 100, 50),
    Counts("a total as text", of(100, 50, "2150"), 100, 2050, estimated=None),
    Counts("a total that is no number", of(100, 50, "many"), 100, 50, estimated=None),
    Counts("an absurd total", of(100, 50, 10**18), 100, 50, estimated=None),
    Counts("texts", of("100", "50", "150"), 100, 50, estimated=None),
    Counts("one text", of(100, "50", 150), 100, 50, estimated=None),
    Counts("a total as a list", of(100, 50, [150]), 100, 50, estimated=None),
    Counts("a negative total", of(100, 50, -150), 100, 50, estimated=None),
    Counts("floats", of(1200.0, 300.0, 1500.0), 1200, 300),
    Counts("one float", of(1000, 500.0, 1500), 1000, 500),
    Counts("floats, reasoning outside", of(100.0, 50.0, 2150.0), 100, 2050),
    Counts("reasoning as a float", of(100, 50, 150, 30.0), 100, 50, reasoning=30),
    Counts("cached, as OpenAI counts",
        of(1000, 500, 1500, **{PARTS: {"cached_tokens": 400}}), 1000, 500, 400),
    Counts("cached as a float", of(1000, 500, 1500, **{PARTS: {"cached_tokens": 400.0}}), 1000, 500, 400),
    Counts("cached, as DeepSeek counts",
        of(1000, 500, 1500, prompt_cache_hit_tokens=400, prompt_cache_miss_tokens=600), 1000, 500, 400),
    Counts("cached, as Moonshot counts", of(1000, 500, 1500, cached_tokens=400), 1000, 500, 400),
    Counts("cached, said twice",
        of(1000, 500, 1500, cached_tokens=400, **{PARTS: {"cached_tokens": 400}}), 1000, 500, 400),
    Counts("cached, nothing of it", of(1000, 500, 1500, **{PARTS: {"cached_tokens": 0}}), 1000, 500),
    Counts("cached: null", of(1000, 500, 1500, cached_tokens=None, **{PARTS: None}), 1000, 500),
    Counts("negative cached", of(1000, 500, 1500, **{PARTS: {"cached_tokens": -400}}), 1000, 500,
        estimated=None),
    Counts("details that are lists", of(1000, 500, 1500, **{PARTS: [1]}), 1000, 500),
    Counts("nothing made", of(100, 0, 100), 100, 0),
    Counts("names of the other API",
        {"input_tokens": 100, "output_tokens": 50, "total_tokens": 150}, 100, 50),
    Counts("a response", of_response(100, 50, 150, 30, 40), 100, 50, 40, 30, api="responses"),
    Counts("a response, reasoning outside", of_response(100, 50, 2150), 100, 2050, api="responses"),
    Counts("a response with floats", of_response(100.0, 50.0, 150.0), 100, 50, api="responses"),
]  # fmt: skip
# What cannot be read: the answer says that its counts are estimates. Of what can be, they are that.
UNREAD = [
    ("no usage", "LEFT OUT"),
    ("usage: null", None),
    ("usage: a text", "150"),
    ("usage: a list", [of(100, 50, 150)]),
    ("usage: {}", {}),
    ("usage of nothing", of(None, None, None)),
    ("texts", of("a hundred", "some", "many")),
    ("completion as text", of(100, "some", "many")),
    ("completion: null", of(100, None, None)),
    ("no completion", {"prompt_tokens": 100}),
    ("no prompt", {"completion_tokens": 50, "total_tokens": 50}),
    ("negative", of(-100, -50, -150)),
    ("negative prompt", of(-100, 50, 150)),
    ("negative completion", of(100, -50, 50)),
    ("negative floats", of(-100.0, -50.0, -150.0)),
    ("absurdly large", of(10**30, 10**30, 2 * 10**30)),
    ("a large float", of(1e300, 1e300, 1e300)),
    ("an absurd completion", of(100, 10**18, 10**18 + 100)),
    ("true", of(True, True, True)),
    ("NaN", of(float("nan"), float("nan"), float("nan"))),
    ("Infinity", of(float("inf"), float("inf"), float("inf"))),
    ("-Infinity", of(float("-inf"), 50, 150)),
]
ROWS = [counts.row for counts in READ]
ids = [counts.name for counts in READ]


@pytest.mark.parametrize("counts", READ, ids=ids)
async def test_what_an_answer_used(counts):
    """Its counts, and its price to the last digit."""
    async with serving({"prompt": counts.row.replies}) as server, connect(server) as client:
        usage = (await client.generate_response("a prompt", api=counts.api)).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (counts.prompt, counts.completion)
        assert (usage.cached_tokens, usage.reasoning_tokens) == (counts.cached, counts.reasoning)
        assert usage.total_tokens >= counts.prompt + counts.completion - 30
        assert counts.estimated in {None, usage.estimated}
        assert usage.estimated_cost == pytest.approx(float(counts.usd), abs=1e-15)
        (cost,) = client.stats.cost.rows
        assert (cost.input_tokens, cost.output_tokens, cost.cost) == (
            counts.prompt,
            counts.completion,
            Decimal(counts.usd),
        )


@pytest.mark.parametrize("counts", READ[::2], ids=ids[::2])
async def test_the_bill_of_one_prompt(counts, tmp_path):
    """Also where the answer comes from the cache the next time."""
    await check_one(counts.row, tmp_path / "cache.sqlite")


@pytest.mark.parametrize("counts", READ, ids=ids)
async def test_the_bill_of_a_batch(counts):
    """Half of it."""
    await check_batch(counts.row)


@pytest.mark.parametrize("counts", READ[1::2], ids=ids[1::2])
async def test_the_bill_of_the_drop_in_client(counts):
    """It is the same."""
    await check_drop_in(counts.row)


def unread(name, usage):
    if name == "no usage":
        return Reply(chat(usage=None))
    return Reply({**chat(), "usage": usage})


@pytest.mark.parametrize(("name", "usage"), UNREAD, ids=[name for name, _ in UNREAD])
async def test_what_cannot_be_read_is_estimated(name, usage):
    """The answer is handed out, its usage is said to be an estimate, and costs little."""
    async with serving({"prompt": (unread(name, usage),)}) as server, connect(server) as client:
        (answer,) = await client.batch_generate(["a prompt"])
        assert answer.content == "yes"
        assert answer.usage.estimated
        assert 0 <= answer.usage.prompt_tokens < 1000
        assert 0 <= answer.usage.completion_tokens < 1000
        assert answer.usage.total_tokens > 0
        assert 0 <= client.stats.cost.total < 1
        assert all(row.input_tokens >= 0 <= row.output_tokens for row in client.stats.cost.rows)


@pytest.mark.parametrize(("name", "usage"), UNREAD[::2], ids=[name for name, _ in UNREAD[::2]])
async def test_what_cannot_be_read_in_a_batch(name, usage):
    """Likewise."""
    row = Row("unread", (unread(name, usage),))
    async with serving({"<unread>": row.replies}) as server, connect(server) as client:
        outcomes = await client.batch_generate(["good", "a <unread> prompt"], use_batch_api=True)
        assert outcomes[1].content == "yes"
        assert outcomes[1].usage.estimated
        assert Decimal("0.000225") <= client.stats.cost.total < 1


# --- tiers ------------------------------------------------------------------------------------------------

DEAR = "gpt-5"  # USD 1.25 and 10 a million tokens; 2.50 and 20 with priority


def tiered(tier, prompt=1000):
    return Reply({**chat(usage=of(prompt, 500)), "model": DEAR, "service_tier": tier})


@pytest.mark.parametrize(
    ("tier", "usd"), [("default", "0.00625"), ("priority", "0.0125"), ("flex", "0.003125"), (None, "0.00625")]
)
async def test_the_tier_that_served_is_billed(tier, usd):
    """Whatever the request asked for."""
    async with serving({"prompt": (tiered(tier),)}) as server, connect(server) as client:
        await client.generate_response("a prompt", model=DEAR)
        assert client.stats.cost.total == Decimal(usd)


async def test_a_budget_reserves_the_dearest_tier_until_one_is_named():
    """Where a project's default is a dear tier, nothing in the request shows it."""
    async with serving({"prompt": (tiered("default"),)}) as server, connect(server) as client:
        ask = {"model": DEAR, "max_tokens": 1000}  # 0.01 at the ordinary price, 0.02 with priority
        with pytest.raises(BudgetExceededError):
            await client.generate_response("a prompt", max_cost=0.015, **ask)
        assert server.calls == 0
        await client.generate_response("a prompt", max_cost=0.03, **ask)
        await client.generate_response("a prompt", max_cost=0.015, **ask)
        assert server.calls == 2


async def test_a_budget_holds_where_the_dear_tier_serves():
    """Twenty prompts at once, billed at twice the price, stay within it."""
    async with serving({"prompt": (tiered("priority", 5),)}) as server, connect(server) as client:
        prompts = [f"prompt {number}" for number in range(20)]
        with pytest.raises(BudgetExceededError) as caught:
            await client.batch_generate(prompts, model=DEAR, max_tokens=500, max_cost=0.1)
        assert client.stats.cost.total <= Decimal("0.1")
        assert sum(answer is not None for answer in caught.value.responses) == server.calls > 0


# --- what was paid for is not lost to a local fault --------------------------------------------------------


def broken(*_args, **_options):
    raise OSError(24, "Too many open files")


async def test_an_answer_outlives_a_price_list_that_cannot_be_imported(monkeypatch):
    """It is handed out unpriced."""
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    monkeypatch.setitem(sys.modules, "genai_prices.data_snapshot", None)
    async with serving() as server, connect(server) as client:
        answers = await client.batch_generate(["one", "two"])
        assert [answer.content for answer in answers] == ["yes", "yes"]
        assert answers[0].usage.estimated_cost is None
        assert answers[0].usage.total_tokens == 1500
        assert client.stats.cost.unpriced == 2


async def test_an_answer_outlives_a_price_list_that_fails(monkeypatch):
    """Whatever it raises, and as often."""
    import genai_prices

    monkeypatch.setattr(genai_prices, "calc_price", broken)
    async with serving() as server, connect(server) as client:
        answers = await client.batch_generate(["one", "two"])
        assert [answer.content for answer in answers] == ["yes", "yes"]
        assert server.calls == 2


async def test_an_answer_outlives_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """A full disk costs nothing but the copy."""
    from openai_eval_client._cache.store import Store

    def full(*_args, **_options):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Store, "_do", full)
    async with serving() as server, connect(server, cache=tmp_path / "cache.sqlite") as client:
        answers = await client.batch_generate(["one", "two"])
        assert all(isinstance(answer, ModelResponse) for answer in answers)
        assert server.calls == 2


async def test_an_answer_outlives_statistics_that_fail(monkeypatch):
    """What counts is what was paid for."""
    from openai_eval_client._stats import Recorder

    monkeypatch.setattr(Recorder, "settled_attempt", broken)
    async with serving() as server, connect(server) as client:
        (answer,) = await client.batch_generate(["one"])
        assert answer.content == "yes"
        assert server.calls == 1


async def test_an_answer_outlives_a_vocabulary_that_cannot_be_loaded(monkeypatch):
    """The estimate of what it used is rougher then."""
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", broken)
    monkeypatch.setattr(tiktoken, "encoding_for_model", broken)
    script = {"prompt": (Reply(chat(usage=None)),)}
    async with serving(script) as server, connect(server) as client:
        (answer,) = await client.batch_generate(["a prompt"], model=MODEL)
        assert answer.content == "yes"
        assert answer.usage.estimated
        assert server.calls == 1


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 520, 524])
@pytest.mark.parametrize("caller", ["own", "client.openai"])
async def test_a_cap_holds_as_if_what_a_gateway_ended_was_billed(caller: str, status: int) -> None:
    """Each attempt counts at its most, and none is sent for which too little is left."""
    ended = Reply(b"upstream request failed", status, kind="text/plain")
    options = {"max_retries": 9, "max_cost": 0.1}
    async with serving({"a prompt": [ended]}) as wire, connect(wire, **options) as client:
        messages = [{"role": "user", "content": "a prompt"}]
        ask = {"model": MODEL, "max_tokens": 47_000}
        calls = {
            "own": lambda: client.generate_response(messages, **ask),
            "client.openai": lambda: client.openai.chat.completions.create(messages=messages, **ask),
        }
        with pytest.raises(BudgetExceededError):
            await calls[caller]()
        cost, budget = client.stats.cost, client.stats.budget
    sent = wire.counts["a prompt"]
    assert sent > 1
    assert (cost.unaccounted, cost.total, budget["reserved"]) == (sent, 0, 0)
    assert budget["spent"] <= budget["limit"] < budget["spent"] / sent * (sent + 1)
