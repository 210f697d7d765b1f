"""The ledger as a user has it: a number where one is wanted, and its rows."""

import copy
import json
import math
import operator
import pickle
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import ClientStats, CostLedger, ModelCost

AMOUNTS = st.decimals(0, 10**6, places=12)
COUNTS = st.integers(0, 10**12)
ROWS = st.builds(
    ModelCost,
    model=st.text(),
    channel=st.sampled_from(["online", "batch"]),
    service_tier=st.sampled_from(["default", "flex"]),
    calls=COUNTS,
    input_tokens=COUNTS,
    cached_tokens=COUNTS,
    output_tokens=COUNTS,
    reasoning_tokens=COUNTS,
    unpriced=COUNTS,
    cost=st.none() | AMOUNTS,
)
LEDGERS = st.builds(
    CostLedger,
    total=AMOUNTS,
    rows=st.lists(ROWS, max_size=4),
    unpriced=COUNTS,
    retried=COUNTS,
    unaccounted=COUNTS,
    unaccounted_cost=AMOUNTS,
    saved_by_cache=AMOUNTS,
)
COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
ARITHMETIC = [operator.add, operator.sub, operator.mul]


def of(total):
    return CostLedger(total=Decimal(total))


@given(AMOUNTS, st.floats(-1e6, 1e6) | st.integers(-(10**6), 10**6) | AMOUNTS, st.data())
def test_it_compares_and_computes_as_its_total(total, other, data):
    """It does so on either side: exactly with a Decimal, as a float with any other number."""
    own = total if isinstance(other, Decimal) else float(total)
    operation = data.draw(st.sampled_from([*COMPARISONS, *ARITHMETIC]))
    for found, expected in (
        (operation(of(total), other), operation(own, other)),
        (operation(other, of(total)), operation(other, own)),
    ):
        assert found == expected
        assert type(found) is type(expected)


@given(AMOUNTS, AMOUNTS)
def test_two_ledgers_compare_and_compute_by_their_totals(one, other):
    """A difference is that of the exact totals: nothing cancels."""
    assert of(one) - of(other) == float(one - other)
    assert type(of(one) + of(other)) is float
    for compare in COMPARISONS:
        assert compare(of(one), of(other)) is compare(one, other)


def test_it_is_used_as_the_number_it_was():
    """It can be formatted, rounded, summed, tested for truth and compared with floats."""
    cost = of("0.0123456")
    assert float(cost) == 0.0123456
    assert (
        f"{cost:.4f} {cost:>8.2f} {cost:,.3f} {cost:.1%} {cost:g}" == "0.0123     0.01 0.012 1.2% 0.0123456"
    )
    assert "%.3f" % cost == "0.012"  # noqa: UP031  # that form calls float() itself
    assert f"{cost} {of('1E+2')} {of('0.00000015000')} {of('0E-9')}" == "0.0123456 100 0.00000015 0"
    assert str(cost) == "0.0123456"
    assert round(cost, 3) == 0.012
    assert round(of(2)) == 2
    assert (bool(cost), bool(CostLedger())) == (True, False)
    assert sum([cost, cost]) == 2 * 0.0123456 == 0.0246912
    assert cost == pytest.approx(0.0123456)
    assert math.isclose(cost, 0.0123456)
    assert cost / 2 == 0.0123456 / 2
    assert 2 / cost == 2 / 0.0123456
    assert max(cost, of(2), key=float) == 2
    assert cost != "0.0123456"
    assert cost != None  # noqa: E711  # not an identity
    for wrong in ("1", None, []):
        with pytest.raises(TypeError):
            operator.lt(cost, wrong)
        with pytest.raises(TypeError):
            operator.add(cost, wrong)


@given(LEDGERS, LEDGERS)
def test_ledgers_are_equal_when_all_is(one, other):
    """The same total of other rows is another ledger."""
    assert one == copy.deepcopy(one)
    assert (one == other) == (one.model_dump() == other.model_dump())


@given(LEDGERS)
def test_it_reads_back_as_it_was(ledger):
    """It reads back from JSON, dict and pickle to the last digit, also inside the statistics."""
    assert CostLedger.model_validate_json(ledger.model_dump_json()) == ledger
    assert CostLedger.model_validate(ledger.model_dump()) == ledger
    assert CostLedger.model_validate(json.loads(json.dumps(ledger.model_dump(mode="json")))) == ledger
    assert pickle.loads(pickle.dumps(ledger)) == ledger  # noqa: S301
    stats = ClientStats(cost=ledger)
    assert ClientStats.model_validate_json(stats.model_dump_json()) == stats


def row(model, cost, **more):
    counts = dict.fromkeys(
        ("calls", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "unpriced"), 1
    )
    return ModelCost(
        **{"model": model, "channel": "online", "service_tier": "default", **counts, "cost": cost, **more}
    )


def test_costs_by_model_add_up_channels_and_tiers():
    """A model without any known price costs None, never 0."""
    ledger = CostLedger(
        rows=[
            row("a", Decimal("0.1")),
            row("a", Decimal("0.02"), channel="batch"),
            row("a", None, service_tier="flex"),
            row("b", None),
            row("c", None),
            row("c", Decimal("0.3")),
        ]
    )
    assert ledger.by_model == {"a": Decimal("0.12"), "b": None, "c": Decimal("0.3")}
