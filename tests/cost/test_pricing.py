"""Prices: against genai-prices itself, with the variants it does not tell apart, and as properties."""

import asyncio
import logging
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from decimal import Decimal

import genai_prices
import pytest
from genai_prices.data_snapshot import DataSnapshot, get_snapshot, set_custom_snapshot
from genai_prices.types import (
    ClauseEquals,
    ModelInfo,
    ModelPrice,
    PriceVariant,
    Provider,
    Tier,
    TieredPrices,
    TimeOfDateConstraint,
)
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client._cost import ledger as _pricing
from openai_eval_client._cost.ledger import Pricer, Rates
from openai_eval_client._wire.usage import Usage

PRICER = Pricer()
COUNTS = st.integers(0, 2_000_000)
UNTIERED = ["gpt-3.5-turbo", "gpt-4", "gpt-4o", "gpt-4.1", "gpt-5", "o3", "text-embedding-3-small"]
TIERED = ["gpt-5.4", "gpt-5.5"]


def by_genai_prices(model, usage, context=None, provider="openai"):
    counts = genai_prices.Usage(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        input_audio_tokens=usage.audio_input_tokens,
        output_audio_tokens=usage.audio_output_tokens,
    )
    price = genai_prices.calc_price(counts, model, provider_id=provider, price_context=context)
    return price.total_price


@st.composite
def usages(draw, output=COUNTS):
    prompt = draw(COUNTS)
    cached = draw(st.integers(0, prompt))
    return Usage(prompt, draw(output), cached, draw(st.integers(0, prompt - cached)))


@pytest.fixture
def made_up():
    """Put made-up models into the price data."""

    def install(*models, provider="openai"):
        made = Provider(
            id=provider, name=provider, api_pattern=f"https://{provider}\\.test", models=list(models)
        )
        set_custom_snapshot(DataSnapshot(providers=[made], from_auto_update=False))

    yield install
    set_custom_snapshot(None)


def model_info(name, variants=(), **prices):
    prices = {"input_mtok": Decimal(2), "output_mtok": Decimal(8), **prices}
    return ModelInfo(name, ClauseEquals(name), prices=ModelPrice(**prices), price_variants=list(variants))


@given(st.sampled_from([*UNTIERED, *TIERED]), usages())
def test_a_price_is_what_genai_prices_computes(model, usage):
    output = 0 if model.startswith("text-embedding") else usage.completion_tokens
    usage = Usage(usage.prompt_tokens, output, usage.cached_tokens, usage.cache_write_tokens)
    assert PRICER.cost(model, usage) == by_genai_prices(model, usage)


@pytest.mark.parametrize(
    "known", get_snapshot().find_provider(None, "openai", None).models, ids=lambda m: m.id
)
def test_every_model_has_genai_prices_price_or_none(known):
    """None where text has no price, or where kinds of tokens have one that usage does not tell apart."""
    usage = Usage(1000, 0, cached_tokens=100)
    prices = known.get_prices(datetime.now(tz=timezone.utc))
    name = f"{known.id}-2024-08-06:org::1" if known.id.startswith("ft:") else known.id
    cost = PRICER.cost(name, usage)
    if prices.input_mtok is None or vars(prices).keys() & _pricing._UNCOUNTED:
        assert cost is None
    else:
        assert cost == by_genai_prices(name, usage) > 0


def test_a_known_answer_costs_what_the_price_list_says():
    usage = Usage(1_000_000, 100_000, cached_tokens=200_000)
    assert PRICER.cost("gpt-4o-2024-08-06", usage) == Decimal("3.25")
    assert PRICER.cost("gpt-4o", Usage(0, 0)) == 0


@pytest.mark.parametrize("model", TIERED)
def test_a_long_prompt_has_another_price_for_all_of_it(model):
    short, long = Usage(272_000, 10), Usage(272_001, 10)
    assert PRICER.cost(model, short) == by_genai_prices(model, short)
    assert PRICER.cost(model, long) == by_genai_prices(model, long)
    assert PRICER.cost(model, long) > PRICER.cost(model, short) * Decimal("1.9")


def test_the_highest_tier_passed_is_the_price(made_up):
    tiers = [Tier(100, Decimal(4)), Tier(200, Decimal(8))]
    made_up(model_info("t", input_mtok=TieredPrices(base=Decimal(2), tiers=tiers)))
    pricer = Pricer()
    million = Decimal(1_000_000)
    for tokens, price in ((0, 2), (100, 2), (101, 4), (200, 4), (201, 8)):
        assert pricer.cost("t", Usage(tokens, 1)) == (tokens * price + 8) / million


@given(st.sampled_from(UNTIERED[:-1]), usages(), usages(), st.booleans())
def test_without_tiers_costs_add_up(model, one, other, batch):
    both = Usage(*(getattr(one, name) + getattr(other, name) for name in Usage._fields[:6]))
    costs = [PRICER.cost(model, usage, batch=batch) for usage in (one, other)]
    assert PRICER.cost(model, both, batch=batch) == sum(costs)


@given(st.sampled_from(UNTIERED[:-1]), usages(), COUNTS, COUNTS)
def test_more_tokens_never_cost_less(model, usage, prompt, completion):
    more = Usage(
        usage.prompt_tokens + prompt,
        usage.completion_tokens + completion,
        usage.cached_tokens,
        usage.cache_write_tokens,
    )
    assert PRICER.cost(model, more) >= PRICER.cost(model, usage)


@given(st.sampled_from(UNTIERED[:-1] + TIERED), COUNTS, COUNTS, st.data())
def test_cached_input_never_costs_more(model, prompt, completion, data):
    cached = data.draw(st.integers(0, prompt))
    for batch in (False, True):
        uncached = PRICER.cost(model, Usage(prompt, completion), batch=batch)
        assert PRICER.cost(model, Usage(prompt, completion, cached), batch=batch) <= uncached


@pytest.mark.parametrize("model", ["gpt-3.5-turbo", "gpt-4o", "gpt-5", "gpt-5.4", "gpt-4o-search-preview"])
def test_a_batch_costs_half(model):
    """With a batch price in the data, or without one, as gpt-4o-search-preview."""
    usage = Usage(1000, 500)
    assert PRICER.cost(model, usage, batch=True) * 2 == PRICER.cost(model, usage)
    assert PRICER.cost(model, usage, batch=True, service_tier="flex") * 2 == PRICER.cost(model, usage)


def test_embeddings_cost_half_in_a_batch():
    usage = Usage(1_000_000, 0)
    assert PRICER.cost("text-embedding-3-small", usage) == Decimal("0.02")
    assert PRICER.cost("text-embedding-3-small", usage, batch=True) == Decimal("0.01")


def test_output_of_a_model_without_a_price_for_it_is_unpriced():
    assert PRICER.cost("text-embedding-3-small", Usage(1000, 1)) is None


def test_a_batch_price_of_the_data_wins_over_the_flat_discount():
    """One model's batch price equals its ordinary one."""
    usage = Usage(1000, 500)
    assert PRICER.cost("gpt-3.5-turbo-1106", usage, batch=True) == PRICER.cost("gpt-3.5-turbo-1106", usage)


@pytest.mark.parametrize(
    ("model", "tier"), [("gpt-5", "flex"), ("gpt-5", "priority"), ("gpt-4o", "priority")]
)
def test_a_service_tier_has_its_own_price(model, tier):
    usage = Usage(1000, 500, cached_tokens=100)
    assert PRICER.cost(model, usage, service_tier=tier) == by_genai_prices(
        model, usage, {"service_tier": tier}
    )
    assert PRICER.cost(model, usage, service_tier=tier) != PRICER.cost(model, usage)


@pytest.mark.parametrize("tier", [None, "auto", "default"])
def test_the_ordinary_tiers_have_the_ordinary_price(tier):
    usage = Usage(1000, 500)
    assert PRICER.cost("gpt-4o", usage, service_tier=tier) == by_genai_prices("gpt-4o", usage)


@pytest.mark.parametrize(("model", "tier"), [("gpt-4o", "flex"), ("gpt-4", "priority"), ("gpt-4o", "scale")])
def test_a_tier_without_a_price_is_unpriced(model, tier):
    assert PRICER.cost(model, Usage(1000, 500), service_tier=tier) is None


def test_a_variant_that_has_not_begun_is_no_price(made_up):
    now = datetime.now(tz=timezone.utc).timetz()
    never = TimeOfDateConstraint(start_time=now, end_time=now)
    prices = ModelPrice(input_mtok=Decimal(1))
    made_up(model_info("v", [PriceVariant({"service_tier": "flex"}, prices, never)]))
    assert Pricer().cost("v", Usage(1000, 0), service_tier="flex") is None
    made_up(model_info("v", [PriceVariant({"service_tier": "flex"}, prices)]))
    assert Pricer().cost("v", Usage(1000, 0), service_tier="flex") == Decimal("0.001")


def test_prices_that_change_are_looked_up_again(made_up, monkeypatch):
    made_up(model_info("p", input_mtok=Decimal(2)))
    now = [9000.0]
    monkeypatch.setattr(_pricing.time, "time", lambda: now[0])
    pricer = Pricer()
    usage = Usage(1_000_000, 0)
    assert pricer.cost("p", usage) == 2
    made_up(model_info("p", input_mtok=Decimal(3)))
    assert pricer.cost("p", usage) == 2
    now[0] += 900
    assert pricer.cost("p", usage) == 3


def test_a_price_is_looked_up_once(monkeypatch):
    calls = []
    calc_price = genai_prices.calc_price
    monkeypatch.setattr(_pricing.time, "time", lambda: 9000.0)
    monkeypatch.setattr(genai_prices, "calc_price", lambda *a, **k: calls.append(a) or calc_price(*a, **k))
    pricer = Pricer()
    for _ in range(5):
        pricer.cost("gpt-4o", Usage(1, 1))
        pricer.cost("unknown-model", Usage(1, 1))
    assert len(calls) == 2


def test_audio_has_its_own_price_or_none():
    usage = Usage(1000, 500, audio_input_tokens=600, audio_output_tokens=400)
    assert PRICER.cost("gpt-audio", usage) == by_genai_prices("gpt-audio", usage)
    assert PRICER.cost("gpt-audio", usage) > PRICER.cost("gpt-audio", Usage(1000, 500))
    assert PRICER.cost("gpt-4o-audio-preview", usage) is None
    assert PRICER.cost("gpt-4o-audio-preview", Usage(1000, 500)) == Decimal("0.0075")


@pytest.mark.parametrize("model", ["gpt-image-1", "tts-1", "whisper-1", "no-such-model", ""])
def test_what_tokens_cannot_price_is_unpriced(model):
    assert PRICER.cost(model, Usage(1000, 500)) is None


def test_a_fee_for_each_request_is_counted():
    pricer = Pricer("https://api.perplexity.ai")
    usage = Usage(1000, 500)
    assert pricer.cost("sonar", usage) == by_genai_prices("sonar", usage, provider="perplexity")
    assert pricer.cost("sonar-deep-research", usage) is None


def test_cache_writes_have_their_own_price_by_how_long_they_are_kept(made_up):
    """Where the list has none for an hour it is that for minutes, where it has none at all that of input."""
    made_up(
        model_info("both", cache_write_mtok=Decimal("2.5"), cache_write_1h_mtok=Decimal(4)),
        model_info("one", cache_write_mtok=Decimal("2.5")),
        model_info("none"),
    )
    usage = Usage(10**6, 0, cached_tokens=100_000, cache_write_tokens=600_000, long_write_tokens=200_000)
    pricer = Pricer()
    assert pricer.cost("both", usage) == Decimal("0.8") + Decimal("1.0") + Decimal("0.8")
    assert pricer.cost("one", usage) == Decimal("0.8") + Decimal("1.5")
    assert pricer.cost("none", usage) == 2
    rates = pricer.rates("both", batch=False, service_tier=None, at=0)
    assert rates.most(10**6, 0, audio_input=False, audio_output=False) == 4


def test_parts_that_exceed_their_whole_are_cut_to_it():
    excessive = Usage(10, 5, cached_tokens=100, cache_write_tokens=100, audio_input_tokens=9)
    assert PRICER.cost("gpt-4o", excessive) == PRICER.cost("gpt-4o", Usage(10, 5, cached_tokens=10))


@pytest.mark.parametrize(
    ("base_url", "priced", "unpriced"),
    [
        (None, "gpt-4o", "llama-3.3-70b-versatile"),
        ("https://api.openai.com/v1", "gpt-4o", "openai-unknown"),
        ("http://127.0.0.1:8000/v1", "gpt-4o", "my-finetune"),
        ("https://proxy.example.com/v1", "openai/gpt-4o", "mistral/x"),
        ("https://api.groq.com/openai/v1", "llama-3.3-70b-versatile", "gpt-4o"),
        ("https://openrouter.ai/api/v1", "openai/gpt-4o", "gpt-4o-no"),
        ("https://mine.openai.azure.com/openai", "gpt-4o", "my-deployment"),
    ],
)
def test_the_host_decides_whose_prices(base_url, priced, unpriced):
    pricer = Pricer(base_url)
    assert pricer.cost(priced, Usage(1000, 500)) > 0
    assert pricer.cost(unpriced, Usage(1000, 500)) is None


def test_the_flat_discount_is_openai_s_alone(made_up):
    made_up(model_info("m"), provider="elsewhere")
    pricer = Pricer("https://elsewhere.test/v1")
    assert pricer.cost("m", Usage(1000, 500)) == Decimal("0.006")
    assert pricer.cost("m", Usage(1000, 500), batch=True) is None


def test_another_provider_s_price_has_no_variants():
    """Where the data has none of Azure's, OpenAI's hold, but not those of its batches and tiers."""
    azure = Pricer("https://mine.openai.azure.com/openai")
    for more in ({"batch": True}, {"service_tier": "priority"}):
        assert azure.cost("gpt-4o", Usage(1000, 500), **more) is None


def test_what_has_no_price_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "openai_eval_client")
    pricer = Pricer()
    for _ in range(3):
        pricer.cost("unheard-of", Usage(1, 1))
        pricer.cost("gpt-4o", Usage(1, 1), service_tier="flex")
    assert [record.getMessage() for record in caplog.records] == [
        "genai-prices has no price for 'unheard-of': its cost is unknown",
        "genai-prices has no flex price for 'gpt-4o': its cost is unknown",
    ]


@pytest.mark.parametrize(
    ("model", "tiers"),
    [
        ("gpt-4o", {"priority", "fast"}),
        ("gpt-5", {"flex", "priority", "fast"}),
        ("gpt-4", set()),
        ("unheard-of", set()),
    ],
)
def test_the_tiers_that_have_a_price(model, tiers):
    """Those of the ordinary price are no tiers, and another provider's prices have none."""
    assert PRICER.tiers(model, at=time.time()) == tiers
    assert Pricer("https://mine.openai.azure.com/openai").tiers(model, at=time.time()) == set()


FAULTS = [OSError(24, "Too many open files"), SystemError(), RecursionError(), MemoryError(), ValueError()]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("broken", ["genai_prices.data_snapshot.get_snapshot", "genai_prices.calc_price"])
def test_a_price_list_that_fails_costs_no_answer(broken, fault, monkeypatch, caplog):
    """Neither data that cannot be loaded nor a name that breaks a matcher: the price is not known, once."""

    def fail(*_args, **_options):
        raise fault

    monkeypatch.setattr(broken, fail)
    pricer = Pricer()
    for _ in range(3):
        assert pricer.cost("gpt-4o", Usage(1000, 500)) is None
        assert pricer.tiers("gpt-4o", at=time.time()) == set()
    assert [record.event for record in caplog.records] == ["no_price_list"] * broken.endswith("snapshot")


def test_prices_that_are_no_numbers_are_no_prices(monkeypatch):
    """Their arithmetic fails, and the answer is not lost to it."""
    wrong = Rates(Decimal(0), {"input_mtok": ((-1, Decimal("sNaN")),)})
    monkeypatch.setattr(Pricer, "_find_rates", lambda *_: wrong)
    assert Pricer().cost("gpt-4o", Usage(1000, 0)) is None


async def test_ready_needs_no_thread(monkeypatch):
    """Where none can be started, it loads the list itself: an answer may wait for it."""

    async def fail(*_args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio, "to_thread", fail)
    pricer = Pricer()
    await pricer.ready()
    assert pricer.cost("gpt-4o", Usage(1000, 0)) == Decimal("0.0025")


def test_threads_share_a_pricer():
    pricer = Pricer()
    usage = Usage(1000, 500)
    expected = [by_genai_prices(model, usage) for model in UNTIERED[:-1]] * 50
    results = []

    def price_all():
        results.append([pricer.cost(model, usage) for _ in range(50) for model in UNTIERED[:-1]])

    threads = [threading.Thread(target=price_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_ready_imports_in_a_thread_what_cost_would_import_on_demand():
    program = (
        "import asyncio, sys; from openai_eval_client._wire import Usage;"
        "from openai_eval_client._cost import Pricer; pricer = Pricer();"
        "before = 'genai_prices' in sys.modules; asyncio.run(pricer.ready());"
        "print(before, 'genai_prices.data' in sys.modules, pricer.cost('gpt-4o', Usage(1000, 0)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "0.0025000"]


async def test_ready_may_be_awaited_by_many():
    pricer = Pricer()
    await asyncio.gather(*(pricer.ready() for _ in range(10)))
    assert pricer.cost("gpt-4o", Usage(1000, 0)) == Decimal("0.0025")
