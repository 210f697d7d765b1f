"""Budgets: never overspent, first come, first served, and no request waits for ever."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal, localcontext

import pytest
from budgets import list_price
from hypothesis import example, given, settings
from hypothesis import strategies as st
from virtual import VirtualLoop

from openai_eval_client import BudgetExceededError
from openai_eval_client._cost.budget import Budgets, CostBudget, Reservation, commit, reserve_now
from openai_eval_client._cost.ledger import Ledger
from openai_eval_client._tokens import TokenCounter
from openai_eval_client._wire.failures import NOT_SENT, Failure, Kind, Outcome, refused
from openai_eval_client._wire.requests import Demand
from openai_eval_client._wire.usage import Usage, usage_of


async def reserve(budgets, amount: Decimal) -> Reservation:
    reservation = Reservation()
    await reservation.reserve(budgets, amount)
    return reservation


async def held_in(budget: CostBudget, amount: Decimal):
    return (await reserve([budget], amount)).holds[0]


async def reserved(client: Budgets, demand: Demand, own: CostBudget | None) -> Reservation:
    reservation = Reservation()
    await client.reserve(demand, own, reservation)
    return reservation


NOTHING = Decimal(0)
A_LONG_TIME = 1e9  # virtual seconds


@dataclass(frozen=True)
class Request:
    """One request: when it comes, what it reserves, how long it takes, what it comes to."""

    at: float
    amount: int
    takes: float
    actual: float = 1.0  # share of what it reserved
    patience: float | None = None  # virtual seconds until its caller cancels it, waiting or not; None: never
    kept: bool = False  # its reservation is kept instead of settled


class Watched(CostBudget):
    """A budget that remembers what was asked for and what was granted, in which order."""

    def __init__(self, limit: Decimal) -> None:
        super().__init__(limit)
        self.asked: list[object] = []
        self.granted: list[object] = []

    def _ask(self, amount: Decimal):
        self.asked.append(hold := super()._ask(amount))
        return hold

    def _move(self, hold, state) -> None:
        super()._move(hold, state)
        if state == "held":
            self.granted.append(hold)


@dataclass
class Result:
    """What came of one request."""

    granted: bool = False
    refused: str = ""
    cancelled: bool = False
    spent: Decimal = NOTHING


class Scenario:
    """Requests on one budget in virtual time, watched at every step."""

    def __init__(self, limit: int, requests: list[Request]) -> None:
        self.budget, self.limit = Watched(Decimal(limit)), Decimal(limit)
        self.requests = requests
        self.results: list[Result] = []

    def watch(self) -> dict[str, Decimal]:
        stats = self.budget.stats
        assert stats["spent"] + stats["reserved"] <= self.limit
        assert min(stats.values()) >= 0
        return stats

    async def one(self, request: Request) -> None:
        await asyncio.sleep(request.at)
        amount = Decimal(request.amount)
        result = Result()
        self.results.append(result)
        try:
            hold = await held_in(self.budget, amount)
        except BudgetExceededError as error:
            stats = self.watch()
            assert amount > self.limit - stats["spent"] - stats["reserved"]
            result.refused = str(error)
            return
        except asyncio.CancelledError:
            result.cancelled = True
            self.watch()
            raise
        result.granted = True
        self.watch()
        try:
            await asyncio.sleep(request.takes)
        finally:
            result.spent = (
                amount if request.kept else (amount * Decimal(request.actual)).quantize(Decimal("0.01"))
            )
            if request.kept:
                self.budget.keep_reserved(hold)
            else:
                self.budget.settle(hold, result.spent)
                self.budget.settle(hold, amount)  # does nothing
            self.watch()

    async def impatient(self, request: Request) -> None:
        task = asyncio.ensure_future(self.one(request))
        _, left = await asyncio.wait([task], timeout=request.patience)
        for each in left:
            each.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() or task.exception() is None

    async def run(self) -> None:
        tasks = [asyncio.ensure_future(self.impatient(request)) for request in self.requests]
        done, left = await asyncio.wait(tasks, timeout=A_LONG_TIME)
        assert not left, "a request waits for ever"
        for task in done:
            task.result()


def play(limit: int, requests: list[Request]) -> Scenario:
    loop = VirtualLoop()
    scenario = Scenario(limit, requests)
    try:
        loop.run_until_complete(scenario.run())
    finally:
        loop.close()
    return scenario


REQUESTS = st.builds(
    Request,
    at=st.integers(0, 10).map(float),
    amount=st.integers(1, 60),
    takes=st.integers(0, 10).map(float),
    actual=st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]),
    patience=st.sampled_from([None, None, None, 0.5, 3.0, 7.5]),
    kept=st.sampled_from([False, False, False, True]),
)


@settings(max_examples=250, deadline=None)
@given(limit=st.integers(0, 150), requests=st.lists(REQUESTS, min_size=1, max_size=25))
@example(limit=10, requests=[Request(0, 10, 5, 0.5), Request(1, 10, 1), Request(2, 5, 1)])
@example(limit=10, requests=[Request(0, 8, 5, kept=True), Request(1, 10, 1), Request(2, 2, 1)])
@example(limit=10, requests=[Request(0, 8, 5, 0.1), Request(1, 9, 1, patience=3.0), Request(2, 2, 1)])
def test_any_requests_in_any_order(limit: int, requests: list[Request]) -> None:
    """Never over the limit; each is served, refused or cancelled, and served in the order of asking."""
    scenario = play(limit, requests)
    stats = scenario.watch()
    order = [scenario.budget.asked.index(hold) for hold in scenario.budget.granted]
    assert order == sorted(order)
    assert stats["spent"] + stats["reserved"] == sum((result.spent for result in scenario.results), NOTHING)
    assert all(result.refused or result.cancelled or result.granted for result in scenario.results)


def test_one_that_fits_waits_behind_one_that_does_not_yet() -> None:
    """First come, first served: the small one does not overtake, and goes as soon as the large one does."""
    scenario = play(10, [Request(0, 8, 5, 0.5), Request(1, 6, 4, 0.5), Request(2, 1, 1)])
    assert scenario.budget.granted == scenario.budget.asked
    assert [hold.amount for hold in scenario.budget.granted] == [8, 6, 1]
    assert scenario.budget.stats["spent"] == 8


def test_one_that_can_never_fit_is_refused_at_once() -> None:
    """It neither waits for what is in flight nor holds up the next."""
    scenario = play(10, [Request(0, 8, 5), Request(1, 11, 1), Request(2, 2, 1)])
    assert scenario.results[1].refused == (
        "max_cost=10 USD: 0 spent, 8 reserved for what is in flight, and the next request may cost 11"
    )
    assert scenario.results[2].granted


def test_one_that_does_not_fit_any_more_is_refused_when_that_is_known() -> None:
    """While something is in flight it may still turn out cheaper."""
    scenario = play(10, [Request(0, 8, 5, 1.0), Request(1, 3, 1)])
    assert scenario.results[1].refused.startswith("max_cost=10 USD: 8 spent, 0 reserved")


def test_one_that_waits_for_a_kept_reservation_is_refused() -> None:
    """A reservation that is kept is as good as spent."""
    scenario = play(10, [Request(0, 8, 5, kept=True), Request(1, 3, 1)])
    assert "0 spent, 8 reserved" in scenario.results[1].refused


def test_a_cancelled_waiter_lets_the_next_one_go() -> None:
    """Its place is given up at once, not only when its turn comes."""
    scenario = play(10, [Request(0, 8, 100), Request(1, 9, 1, patience=3.0), Request(2, 2, 1)])
    assert scenario.results[1].cancelled
    assert scenario.results[2].granted


async def test_what_is_committed_counts_even_beyond_the_limit() -> None:
    """It is being spent already."""
    budget = CostBudget(Decimal(5))
    held = commit([budget], Decimal(7))
    assert budget.stats["reserved"] == 7
    assert (budget.free, budget.idle) == (0, False)
    with pytest.raises(BudgetExceededError):
        await held_in(budget, Decimal(6))
    waiting = asyncio.ensure_future(held_in(budget, Decimal(3)))
    await asyncio.sleep(0)
    held.settle(Decimal(2))
    assert (await waiting).amount == 3
    assert (budget.free, budget.idle) == (0, False)


async def test_what_costs_more_than_was_reserved_is_not_forgotten() -> None:
    """Nothing more is granted."""
    budget = CostBudget(Decimal(5))
    (await reserve([budget], Decimal(4))).settle(Decimal(6))
    assert budget.stats == {"limit": 5, "spent": 6, "reserved": 0}
    assert budget.free == 0
    with pytest.raises(BudgetExceededError, match="6 spent"):
        await held_in(budget, Decimal("0.01"))


async def test_two_budgets_reserve_together_or_not_at_all() -> None:
    """What the second refuses, or has no room for now, is given back to the first."""
    wide, narrow = CostBudget(Decimal(10)), CostBudget(Decimal(3))
    with pytest.raises(BudgetExceededError, match="max_cost=3 "):
        await reserve([wide, narrow], Decimal(4))
    assert reserve_now([wide, narrow], Decimal(4)) is None
    both = await reserve([wide, narrow], Decimal(2))
    assert reserve_now([wide, narrow], Decimal(2)) is None
    assert [budget.stats["reserved"] for budget in (wide, narrow)] == [2, 2]
    waiting = asyncio.ensure_future(reserve([wide, narrow], Decimal(3)))
    await asyncio.sleep(0)
    assert wide.stats["reserved"] == 5
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert wide.stats["reserved"] == 2
    both.settle(Decimal(1))
    assert [budget.stats["spent"] for budget in (wide, narrow)] == [1, 1]


async def test_a_request_that_does_not_wait_cannot_overtake() -> None:
    """It gets nothing while others wait."""
    budget = CostBudget(Decimal(10))
    first = await held_in(budget, Decimal(8))
    waiting = asyncio.ensure_future(held_in(budget, Decimal(5)))
    await asyncio.sleep(0)
    assert budget.reserve_now(Decimal(1)) is None
    assert budget.free == 0
    budget.settle(first, NOTHING)
    await waiting
    assert budget.reserve_now(Decimal(5)) is not None


def test_sums_are_exact_whatever_precision_the_program_has_set() -> None:
    """A thousand times a billionth and a half is neither more nor less."""
    with localcontext() as context:
        context.prec = 3
        budget = CostBudget(Decimal("1.0000000015"))
        for _ in range(1000):
            hold = budget.reserve_now(Decimal("0.0000000015"))
            budget.settle(hold, Decimal("0.0000000015"))
        assert budget.stats["spent"] == Decimal("0.0000015000")
        assert budget.free == Decimal("0.9999985015")


def test_a_loop_that_was_closed_holds_nothing_back() -> None:
    """A request that waited on it is passed over, and what was granted to it is given back."""
    budget = CostBudget(Decimal(10))
    held = budget.reserve_now(Decimal(8))
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(held_in(budget, Decimal(5)))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    budget.settle(held, NOTHING)
    assert budget.stats["reserved"] == 0
    assert budget.reserve_now(Decimal(10)) is not None
    waiting._log_destroy_pending = False


def test_a_loop_that_ends_between_grant_and_waking_gives_back() -> None:
    """The waiting request was collected before it could go on."""
    budget = CostBudget(Decimal(10))
    held = budget.reserve_now(Decimal(8))

    async def leave() -> None:
        waiting.append(asyncio.ensure_future(held_in(budget, Decimal(5))))
        await asyncio.sleep(0)
        threading.Thread(target=budget.settle, args=(held, NOTHING)).start()

    waiting: list[asyncio.Future] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    waiting.pop()._log_destroy_pending = False
    loop.close()
    del loop
    gc.collect()
    assert budget.stats["reserved"] == 0


def test_threads_with_loops_of_their_own_share_one_budget() -> None:
    """Eight of them, asking, settling and giving up at random: never over, and all of them end."""
    limit = Decimal(100)
    budget = CostBudget(limit)
    over: list[object] = []
    spent: list[Decimal] = []

    async def one(chance: random.Random) -> None:
        amount = Decimal(chance.randint(1, 30))
        try:
            held = await asyncio.wait_for(held_in(budget, amount), chance.choice([0.001, 30]))
        except (BudgetExceededError, asyncio.TimeoutError):
            return
        stats = budget.stats
        if stats["spent"] + stats["reserved"] > limit:
            over.append(stats)
        await asyncio.sleep(chance.random() / 1000)
        actual = amount * chance.randint(0, 10) / 500
        spent.append(actual)
        budget.settle(held, actual)

    async def work(seed: int) -> None:
        await asyncio.gather(*[one(random.Random(1000 * seed + n)) for n in range(150)])  # noqa: S311

    threads = [threading.Thread(target=lambda n=n: asyncio.run(work(n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not any(thread.is_alive() for thread in threads)
    assert over == []
    assert budget.stats == {"limit": limit, "spent": sum(spent, NOTHING), "reserved": 0}
    assert budget.idle


# --- what an attempt cost ----------------------------------------------------------------------------------

MODEL = "gpt-4o"
USED = Usage(1000, 10, model=MODEL)
USED_COST = list_price(MODEL, 1000, 10)
MOST = Decimal("0.01")  # USD
ATTEMPT = Demand(MODEL, 1000, most_cost=MOST)


def budgets(limit: float = 1) -> Budgets:
    return Budgets(Ledger(), limit)


@pytest.mark.parametrize(
    ("outcome", "actual"),
    [
        (Outcome(200, {}, USED), list_price(MODEL, 1000, 10)),
        (Outcome(usage=USED), list_price(MODEL, 1000, 10)),
        (Outcome(200, {}, USED._replace(model="unheard-of")), MOST),
        (Outcome(200, {}, USED._replace(estimated=True)), MOST),
        (
            Outcome(200, {}, USED._replace(estimated=True, completion_tokens=5000)),
            list_price(MODEL, 1000, 5000),
        ),
        (Outcome(200, {}, USED, Failure(Kind.SERVER_ERROR)), list_price(MODEL, 1000, 10)),
        (Outcome(500, {}, USED, Failure(Kind.SERVER_ERROR)), list_price(MODEL, 1000, 10)),
        (Outcome(200, {}), MOST),
        (Outcome(), MOST),
        *[(refused(status, {}), MOST) for status in (408, 409, 499, 500, 502, 503, 504, 520, 524)],
        *[(refused(status, {}), NOTHING) for status in (400, 401, 404, 413, 422, 429, 529)],
        (refused(503, {}, b'{"error": {"message": "overloaded"}}'), NOTHING),
        (refused(400, {}, b'{"usage": {"prompt_tokens": 1000, "completion_tokens": 10}}'), USED_COST),
        (NOT_SENT, NOTHING),
    ],
)
async def test_an_attempt_is_settled_by_what_it_cost(outcome: Outcome, actual: Decimal) -> None:
    """Its price by the server's own count; nothing where it was refused; else the most it can cost."""
    ledger = Ledger()
    ledger.pricer_for(None).load()
    client = Budgets(ledger, 1)
    own = client.budget_for(Decimal("0.5"), {"max_tokens": 5}, "/v1/chat/completions")
    reservation = await reserved(client, ATTEMPT, own)
    assert own.stats == {"limit": Decimal("0.5"), "spent": 0, "reserved": MOST}
    cost = ledger.settled(ATTEMPT, outcome, 1000)
    reservation.settle(client.actual(ATTEMPT, outcome, cost))
    reservation.refund()  # does nothing
    assert client.stats == {"limit": 1, "spent": actual, "reserved": 0}
    assert own.stats["spent"] == actual


async def test_a_cost_that_is_known_is_not_looked_up() -> None:
    """It is what the ledger returned, and the price list is not even loaded."""
    client = budgets()
    assert client.actual(ATTEMPT, Outcome(200, {}, USED), Decimal("0.004")) == Decimal("0.004")
    assert not client._ledger.pricer_for(None).loaded


async def test_an_overspent_budget_is_logged_once_for_each_model(caplog) -> None:
    """An answer that costs more than the most it could."""
    client = budgets()
    for _ in range(2):
        actual = client.actual(ATTEMPT, Outcome(200, {}, USED), Decimal("0.02"))
        (await reserved(client, ATTEMPT, None)).settle(actual)
    assert [record.event for record in caplog.records] == ["overspent"]
    assert client.stats["spent"] == Decimal("0.04")


# --- what an attempt can cost, by what answers show ---------------------------------------------------------

CHAT = "/v1/chat/completions"
COUNTER = TokenCounter()
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1000}
LEAST, PRIORITY = Decimal("0.01"), Decimal("0.017")  # USD for 1000 tokens of output


async def demand_of(client: Budgets, **more: object) -> Demand:
    body = {**BODY, **more}
    return Demand(str(body["model"]), 9, 1000, most_cost=await client.most(body, CHAT, COUNTER))


async def settle(client: Budgets, demand: Demand, completion: int = 10, tier: str | None = None) -> None:
    outcome = Outcome(200, {}, Usage(9, completion, model="gpt-4o-2024-08-06", service_tier=tier))
    reservation = await reserved(client, demand, None)
    reservation.settle(client.actual(demand, outcome, client._ledger.settled(demand, outcome, 0)))


async def output_price(client: Budgets, **more: object) -> Decimal:
    """What 1000 tokens of output are reserved at, rounded: the input is next to nothing."""
    return (await client.most({**BODY, **more}, CHAT, COUNTER)).quantize(Decimal("0.001"), ROUND_DOWN)


async def test_the_dearest_tier_is_reserved_until_an_answer_tells_which_one_serves() -> None:
    """The project's own where none is asked for; a dearer one later raises it again, for good."""
    client = budgets()
    assert await output_price(client) == await output_price(client, service_tier="auto") == PRIORITY
    await settle(client, await demand_of(client), tier="default")
    assert await output_price(client) == LEAST
    assert await output_price(client, model="gpt-4o-mini") == Decimal("0.001")  # has shown nothing
    await settle(client, await demand_of(client), tier="priority")
    await settle(client, await demand_of(client), tier="default")
    assert await output_price(client) == PRIORITY


@pytest.mark.parametrize("tier", [None, "auto", "flex", "scale", "\ud83d"])
async def test_an_answer_in_no_dearer_tier_ends_the_doubt(tier: str | None) -> None:
    """Servers that name none bill the ordinary price, and a name without a price has no dearer one."""
    client = budgets()
    await settle(client, await demand_of(client), tier=tier)
    assert await output_price(client) == LEAST


async def test_a_tier_that_is_asked_for_is_the_dearest_that_serves() -> None:
    """What serves then says nothing of the project's own."""
    client = budgets()
    for asked in ("default", "flex"):
        model = "gpt-5" if asked == "flex" else MODEL
        assert await output_price(client, service_tier=asked, model=model) == LEAST
        await settle(client, await demand_of(client, service_tier=asked, model=model), tier=asked)
    assert await output_price(client, service_tier="priority") == PRIORITY
    assert await output_price(client) == PRIORITY
    assert await output_price(client, model="gpt-5") == 2 * LEAST


async def test_a_batch_has_one_price() -> None:
    client = budgets()
    await client.ready()
    most = await asyncio.to_thread(client.most_by_batch, BODY, CHAT, COUNTER)
    assert most.quantize(Decimal("0.001")) == LEAST / 2


async def test_who_waits_reserves_by_what_is_known_when_served() -> None:
    """Not by what was known on asking: it is not refused for a tier that does not serve."""
    client = budgets(0.02)
    first, second = [await demand_of(client) for _ in range(2)]
    held = await reserved(client, first, None)
    waiting = asyncio.ensure_future(reserved(client, second, None))
    await asyncio.sleep(0)
    assert not waiting.done()
    outcome = Outcome(200, {}, Usage(9, 900, model=MODEL, service_tier="default"))
    held.settle(client.actual(first, outcome, client._ledger.settled(first, outcome, 0)))
    assert client.stats["spent"] < LEAST
    assert (await waiting).holds[0].amount < Decimal("0.011") < second.most_cost
    (await waiting).refund()
    await settle(client, await demand_of(client), tier="priority")
    assert Decimal("0.016") < client._amount(await demand_of(client))


async def test_a_model_that_exceeds_its_bound_is_reserved_for_by_how_much(caplog) -> None:
    """Some reason beyond max_tokens: from the first such answer on its share is reserved, and it is said."""
    client = budgets()
    for completion, share in ((900, 1), (2500, Decimal("2.5")), (1500, Decimal("2.5")), (4000, 4)):
        await settle(client, await demand_of(client), completion, "default")
        assert await output_price(client) == (LEAST * share).quantize(Decimal("0.001"))
    assert [record.event for record in caplog.records] == ["overspent"]
    assert await output_price(client, model="gpt-4o-mini") == Decimal("0.001")


NUMBERS = st.none() | st.integers() | st.floats() | st.integers(0, 5000) | st.text(max_size=5)
NAMES = ["prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "reasoning_tokens"]
CACHE = ["cached_tokens", "cache_read_input_tokens", "cache_write_tokens"]
ANY_USAGE = st.dictionaries(st.sampled_from(NAMES + CACHE), NUMBERS)
CLIENT = budgets()
CLIENT._ledger.pricer_for(None).load()


@given(ANY_USAGE, st.sampled_from([None, "default", "priority", "unheard-of"]), st.booleans())
def test_no_usage_releases_more_than_it_shows(usage: object, tier: str | None, failed: bool) -> None:
    """Whatever a server sends: at least what its counts come to is spent, and never less than nothing."""
    body = {"model": MODEL, "usage": usage, "service_tier": tier}
    outcome = Outcome(200, {}, usage_of(body), Failure(Kind.SERVER_ERROR) if failed else None)
    spent = CLIENT.actual(ATTEMPT, outcome, CLIENT._ledger.settled(ATTEMPT, outcome, 1000))
    stated = {name: value for name, value in usage.items() if type(value) is int and 0 <= value <= 10**9}
    output = stated.get("completion_tokens", 0)
    prompt = max(stated.get("prompt_tokens", 0), stated.get("input_tokens", 0))
    assert spent >= list_price(MODEL, prompt, output, prompt) >= 0
    total = stated.get("total_tokens", 0)
    if total > prompt + output and {"prompt_tokens", "completion_tokens"} <= stated.keys():
        assert spent >= list_price(MODEL, total, 0, total)


async def test_what_was_not_sent_is_given_back() -> None:
    client = budgets()
    (await reserved(client, ATTEMPT, None)).refund()
    assert client.stats == {"limit": 1, "spent": 0, "reserved": 0}


def test_a_shared_budget_is_one() -> None:
    """Of two accounts, whose prices may differ."""
    client = budgets()
    other = client.shared(Ledger())
    commit(other.budgets(), MOST)
    assert client.stats["reserved"] == MOST


def test_a_reservation_is_split_in_every_budget() -> None:
    """Also where there is none to pay from."""
    wide, narrow = CostBudget(Decimal(10)), CostBudget(Decimal(3))
    first, second = commit([wide, narrow], Decimal(3)).split([Decimal(1), Decimal(2)])
    first.settle(Decimal(1))
    second.keep_reserved()
    assert [budget.stats["spent"] for budget in (wide, narrow)] == [1, 1]
    assert [budget.stats["reserved"] for budget in (wide, narrow)] == [2, 2]
    assert (wide.idle, narrow.free) == (True, 0)
    assert len(commit([], Decimal(3)).split([Decimal(1), Decimal(2)])) == 2
