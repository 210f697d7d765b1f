"""The ledger: exact sums of prices, whatever interrupts it, and no price list before it is needed."""

from __future__ import annotations

import logging
import threading
from datetime import time as clock_time
from datetime import timezone
from decimal import Context, Decimal, localcontext

import pytest
from budgets import list_price
from genai_prices.data_snapshot import DataSnapshot, set_custom_snapshot
from genai_prices.types import (
    ClauseEquals,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    Provider,
    TimeOfDateConstraint,
)
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client._cost import ledger as ledger_module
from openai_eval_client._cost.ledger import EXACT, Ledger, Pricer
from openai_eval_client._wire.failures import NOT_SENT, Failure, Kind, Outcome, refused
from openai_eval_client._wire.requests import Demand, endpoint_of
from openai_eval_client._wire.usage import Usage, usage_of

PRICER = Pricer()
INPUT = Usage(1000, 0)
THOUSAND = list_price("gpt-4o", 1000)


def answer(ledger: Ledger, model: str = "gpt-4o", usage: Usage = INPUT) -> Decimal | None:
    return ledger.settled(Demand(model), Outcome(200, {}, usage), 0)


MODELS = ["gpt-4o", "gpt-5.4", "gpt-5", "acme/unknown"]
USAGES = st.builds(
    Usage,
    st.integers(0, 600_000),
    st.integers(0, 10**5),
    st.integers(0, 600_000),
    model=st.none() | st.sampled_from(MODELS),
    service_tier=st.sampled_from([None, "auto", "default", "flex", "priority"]),
)
ENTRIES = st.tuples(st.sampled_from(["answered", "retried", "unaccounted", "saved"]), USAGES, st.booleans())


@given(st.lists(st.tuples(ENTRIES, st.sampled_from(["", "keep up", "read"])), max_size=40))
def test_the_ledger_is_the_sum_of_the_prices(steps) -> None:
    """Whatever is entered, and whenever it is read on the way."""
    ledger, kinds, unpriced = Ledger(), [], 0
    sums = dict.fromkeys(["total", "unaccounted", "saved"], Decimal(0))
    for (kind, usage, batch), then in steps:
        ledger._enter(kind, "gpt-4o", usage, batch=batch)
        model = usage.model or "gpt-4o"
        cost = PRICER.cost(model, usage, batch=batch, service_tier=usage.service_tier)
        sums[kind if kind in sums else "total"] += cost or 0
        unpriced += cost is None and kind in {"answered", "retried"}
        kinds.append(kind)
        if then == "keep up":
            ledger.keep_up()
        elif then == "read":
            assert ledger.snapshot().total == sums["total"]
    read = ledger.snapshot()
    assert (read.total, read.unaccounted_cost, read.saved_by_cache) == (
        sums["total"], sums["unaccounted"], sums["saved"],
    )  # fmt: skip
    assert (read.retried, read.unaccounted) == (kinds.count("retried"), kinds.count("unaccounted"))
    assert read.unpriced == unpriced
    assert read.total == sum((row.cost or Decimal(0) for row in read.rows), Decimal(0))
    assert sum(row.calls for row in read.rows) == kinds.count("answered") + kinds.count("retried")
    assert len({(row.model, row.channel, row.service_tier) for row in read.rows}) == len(read.rows)


def test_an_answer_is_priced_once() -> None:
    """As it is settled; reading the ledger does not price it again."""
    ledger, pricer = Ledger(), Counting()
    ledger._pricer = pricer
    pricer.load()
    usage = Usage(1000, 10, model="gpt-5", service_tier="flex")
    cost = answer(ledger, usage=usage)
    assert cost == list_price("gpt-5", 1000, 10, service_tier="flex")
    assert ledger.snapshot().total == cost
    assert pricer.lookups == 1


class Counting(Pricer):
    """Counts how often a price is asked for."""

    lookups = 0

    def rates(self, *args, **options):
        self.lookups += 1
        return super().rates(*args, **options)


def test_what_has_no_cost_is_none() -> None:
    """No answer, an unknown price, a price list that is not loaded: never 0."""
    ledger = Ledger()
    assert answer(ledger) is None
    ledger.pricer_for(None).load()
    assert answer(ledger) == THOUSAND
    assert answer(ledger, "unheard-of") is None
    demand = Demand("gpt-4o", 9)
    outcomes = [Outcome(), refused(429, {}), Outcome(200, {}), NOT_SENT]
    assert [ledger.settled(demand, outcome, 9) for outcome in outcomes] == [None] * 4
    read = ledger.snapshot()
    assert (read.total, read.unpriced, read.unaccounted) == (2 * THOUSAND, 1, 2)


def test_a_program_that_computes_roughly_has_an_exact_ledger() -> None:
    """The precision it sets for its own sums is not that of the ledger."""
    ledger = Ledger()
    with localcontext() as rough:
        rough.prec = 3
        for _ in range(1000):
            answer(ledger, usage=Usage(12345, 678))
        total = ledger.snapshot().total
    assert total == 1000 * list_price("gpt-4o", 12345, 678)


def test_a_price_is_that_of_the_hour_of_the_answer(monkeypatch) -> None:
    """Not of the hour in which the ledger is read."""
    night = TimeOfDateConstraint(
        start_time=clock_time(0, tzinfo=timezone.utc), end_time=clock_time(6, tzinfo=timezone.utc)
    )
    prices = [
        ConditionalPrice(prices=ModelPrice(input_mtok=Decimal(10))),
        ConditionalPrice(constraint=night, prices=ModelPrice(input_mtok=Decimal(1))),
    ]
    models = [ModelInfo("m", ClauseEquals("m"), prices=prices)]
    made = Provider(id="openai", name="openai", api_pattern=r"https://openai\.test", models=models)
    set_custom_snapshot(DataSnapshot(providers=[made], from_auto_update=False))
    try:
        hour, ledger = [0], Ledger()
        monkeypatch.setattr(ledger_module.time, "time", lambda: 1_700_006_400 + 3600 * hour[0])  # midnight
        for hour[0] in (0, 5, 12):
            answer(ledger, "m", Usage(1_000_000, 0))
        assert ledger.snapshot().total == 1 + 1 + 10
    finally:
        set_custom_snapshot(None)


def test_moderations_cost_nothing() -> None:
    """They have no usage, and need none."""
    ledger = Ledger()
    ledger.settled(
        Demand("omni-moderation-latest", 9, free=endpoint_of("/v1/moderations").free), Outcome(200, {}), 9
    )
    ledger.settled(Demand("gpt-4o", 9, free=endpoint_of("/v1/chat/completions").free), Outcome(200, {}), 9)
    assert ledger.snapshot().unaccounted == 1


def test_what_piles_up_is_priced_by_a_thread(monkeypatch) -> None:
    """Where the ledger is never read, the entries stay bounded, and nothing waits for the price list."""
    monkeypatch.setattr(ledger_module, "_GROUP", 5)
    monkeypatch.setattr(ledger_module, "_BACKLOG", 20)
    ledger = Ledger()
    for _ in range(20):
        assert not ledger.pricer_for(None).loaded
        answer(ledger)
        ledger.keep_up()
    for thread in threading.enumerate():
        if thread.name == "openai_eval_client prices":
            thread.join(30)
    assert (ledger.pricer_for(None).loaded, len(ledger._queue)) == (True, 0)
    for _ in range(17):
        answer(ledger)
        ledger.keep_up()
        assert len(ledger._queue) < 5
    assert ledger.snapshot().total == 37 * THOUSAND


class Interruptions:
    """In the middle of something, a collected stream settles and a signal handler reads."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.totals, self.going_on = ledger, [], False

    def happen(self) -> None:
        if self.going_on or len(self.totals) == 300:
            return
        self.going_on = True
        answer(self.ledger)
        self.ledger.keep_up()
        self.totals.append(self.ledger.snapshot().total)
        self.going_on = False


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("where", ["pricing", "summing"])
def test_a_ledger_that_is_interrupted_loses_nothing(where: str, loaded: bool, monkeypatch) -> None:
    """Neither while an answer is priced nor while answers are summed, under the lock."""
    ledger = Ledger()
    interruptions = Interruptions(ledger)

    class Interrupted(Pricer):
        """Is interrupted where it prices."""

        def rates(self, *args, **options):
            interruptions.happen()
            return super().rates(*args, **options)

    class Sums(Context):
        """Is interrupted where it adds."""

        def add(self, one: Decimal, other: Decimal) -> Decimal:
            interruptions.happen()
            return EXACT.add(one, other)

    if where == "pricing":
        ledger._pricer = Interrupted()
    else:
        monkeypatch.setattr(ledger_module, "EXACT", Sums(prec=EXACT.prec))
    if loaded:
        ledger.pricer_for(None).load()
    for _ in range(200):
        answer(ledger)
    while ledger._queue:
        ledger.snapshot()
    assert len(interruptions.totals) >= 200
    assert ledger.snapshot().total == (200 + len(interruptions.totals)) * THOUSAND
    assert interruptions.totals == sorted(interruptions.totals)


def test_a_reading_that_interrupts_the_loading_shows_what_is_priced() -> None:
    """A signal handler that reads while the price list is imported: the import goes on, nothing is lost."""
    ledger, seen = Ledger(), []

    class Interrupted(Pricer):
        """Is interrupted while it loads."""

        def load(self) -> None:
            seen.append(ledger.snapshot().total)
            super().load()

    ledger._pricer = Interrupted()
    answer(ledger)
    assert ledger.snapshot().total == THOUSAND
    assert seen == [0]


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(200, {}, INPUT, Failure(Kind.SERVER_ERROR, retry=True)),
        Outcome(500, {}, INPUT, Failure(Kind.SERVER_ERROR, retry=True, status=500)),
        Outcome(usage=INPUT, failure=Failure(Kind.UNREADABLE, retry=True, billed=True)),
    ],
)
def test_a_failed_attempt_that_states_its_usage_is_billed(outcome: Outcome) -> None:
    """As retried, whatever its status: an error in the body of a 200 is none of the answers."""
    ledger = Ledger()
    ledger.pricer_for(None).load()
    assert ledger.settled(Demand("gpt-4o"), outcome, 0) == THOUSAND
    read = ledger.snapshot()
    assert (read.total, read.retried, read.unaccounted, read.rows[0].calls) == (THOUSAND, 1, 0, 1)


def test_what_can_be_read_of_usage_counts_and_the_rest_is_unaccounted_for(caplog) -> None:
    """The total has what the server counted; what it may have billed besides is what was reserved."""
    ledger = Ledger()
    ledger.pricer_for(None).load()
    for usage in ({"prompt_tokens": 1000, "completion_tokens": None}, {"completion_tokens": 10}):
        partial = usage_of({"model": "gpt-4o", "usage": usage})
        ledger.settled(Demand("gpt-4o", 900), Outcome(200, {}, partial), 900 + 50)
        ledger.keep_up()
    read = ledger.snapshot()
    assert (read.total, read.unaccounted) == (THOUSAND + list_price("gpt-4o", 0, 10), 2)
    assert read.unaccounted_cost == list_price("gpt-4o", 0, 50) + list_price("gpt-4o", 900, 40)
    assert [record.event for record in caplog.records] == ["usage_unreadable"]


def test_what_the_cache_saves_is_no_cost() -> None:
    """What its answers would have cost is counted apart."""
    ledger = Ledger()
    ledger.saved("gpt-4o", Usage(1000, 10))
    ledger.saved("gpt-4o", Usage(1000, 0), batch=True)
    read = ledger.snapshot()
    assert read.saved_by_cache == list_price("gpt-4o", 1000, 10) + THOUSAND / 2
    assert (read.total, read.rows) == (0, [])


def test_an_unpriced_model_is_logged_once_and_not_under_the_lock(caplog) -> None:
    """A log handler that reads the ledger, in whatever thread, does not wait for itself."""
    caplog.set_level(logging.INFO, "openai_eval_client")
    ledger, seen = Ledger(), []

    class Reading(logging.Handler):
        """Reads the ledger in another thread before it goes on."""

        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002  # logging's
            reader = threading.Thread(target=lambda: seen.append(ledger.snapshot().unpriced))
            reader.start()
            reader.join(10)

    handler = Reading()
    logging.getLogger("openai_eval_client").addHandler(handler)
    try:
        for _ in range(3):
            answer(ledger, "unheard-of", Usage(1, 1))
            ledger.snapshot()
    finally:
        logging.getLogger("openai_eval_client").removeHandler(handler)
    assert seen == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "genai-prices has no price for 'unheard-of': its cost is unknown"
    ]
