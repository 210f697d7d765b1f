"""What prompts would need: the estimate, and what a run then comes to."""

from __future__ import annotations

import asyncio
import pickle
import threading
import weakref
from typing import TYPE_CHECKING, ClassVar

import pytest
import tiktoken
from clients import KEY, connect
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual import VirtualServer, rehearse

from openai_eval_client import CostEstimate, OpenAIClient, OpenAIConfig, RateLimitConfig, ValidationError
from openai_eval_client._online.estimate import _CHUNK, minutes
from openai_eval_client._tokens.counter import TokenCounter
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from typing_extensions import Self

NOWHERE = OpenAIConfig(api_key=KEY, base_url="http://127.0.0.1:9/v1", default_model="gpt-4o-mini")
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
]


def tiktoken_count(text: str) -> int:
    """Count a message as the API does: its text, and one for its role."""
    return len(tiktoken.get_encoding("o200k_base").encode_ordinary(text)) + 1


def exact_server(**options: object) -> SimulatedServer:
    return SimulatedServer(count_tokens=tiktoken_count, **options)


# --- what a run then comes to -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 5},
        {"max_tokens": 100},
        {"max_tokens": 7, "n": 3},
        {"max_completion_tokens": 4, "system": "Answer in one word.", "temperature": 0},
        {"max_tokens": 5, "model": "gpt-3.5-turbo", "extra_body": {"top_k": 5}},
    ],
)
async def test_a_run_costs_what_the_bounds_say(options) -> None:
    """Input is exact where the server counts alike; output and dollars are within the bounds."""
    prompts = [f"What is {n} squared? " * (n % 5 + 1) for n in range(60)] + [HISTORY, "日本語のテキスト 🙂"]
    counts = tiktoken_count
    if options.get("model") == "gpt-3.5-turbo":

        def counts(text: str) -> int:
            return len(tiktoken.get_encoding("cl100k_base").encode_ordinary(text)) + 1

    with SimulatedServer(count_tokens=counts, lenient=True) as server:
        async with connect(server) as client:
            estimate = await client.estimate(prompts, **options)
            assert server.calls == []
            await client.batch_generate(prompts, **options)
            stats = client.stats
    assert (estimate.requests, estimate.prompt_tokens) == (62, stats.prompt_tokens)
    assert estimate.completion_tokens_low <= stats.completion_tokens <= estimate.completion_tokens_high
    assert 0 < estimate.cost_low <= stats.cost <= estimate.cost_high
    assert estimate.unpriced == 0


async def test_answers_of_full_length_cost_the_upper_bound() -> None:
    """The lower bound is the cost of the input alone."""
    prompts = [f"{n}" for n in range(50)]
    with exact_server(output_tokens=99) as server:
        async with connect(server) as client:
            estimate = await client.estimate(prompts, max_tokens=9)
            await client.batch_generate(prompts, max_tokens=9)
            assert client.stats.completion_tokens == estimate.completion_tokens_high == 50 * 9
            assert client.stats.cost == estimate.cost_high
    assert estimate.cost_low == pytest.approx(estimate.prompt_tokens * 0.15e-6)
    assert estimate.batch_cost_high == pytest.approx(estimate.cost_high / 2)


async def test_the_expected_cost_follows_the_answers_so_far() -> None:
    """It uses the mean length of a model's answers; the bounds stay what they are."""
    with exact_server(output_tokens=20) as server:
        async with connect(server) as client:
            before = await client.estimate(["x"] * 100, max_tokens=50)
            await client.batch_generate(["y"] * 10, max_tokens=50)
            after = await client.estimate(["x"] * 100, max_tokens=50)
            other = await client.estimate(["x"] * 100, max_tokens=50, model="gpt-4o")
    assert (before.completion_tokens_expected, before.cost_expected) == (None, None)
    assert other.completion_tokens_expected is None
    assert (after.completion_tokens_low, after.completion_tokens_high) == (0, 5000)
    assert after.completion_tokens_expected == 2000
    assert after.cost_expected == pytest.approx(after.cost_low + 2000 * 0.6e-6)
    assert after.batch_cost_expected == pytest.approx(after.cost_expected / 2)


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_it_counts_as_sending_does(api: str) -> None:
    """The counter that the limiter reserves by counts the body of each prompt, long texts too."""
    prompts = ["short", HISTORY, "word " * 10_000, "x" * 30_000]
    async with OpenAIClient(NOWHERE) as client:
        estimate = await client.estimate(prompts, system="Be brief.", api=api, max_tokens=5)
        parameters = client._parameters(None, None, 5, None, "Be brief.", api, {})
        counted = [await client._counter.count_input(parameters.with_prompt(prompt)) for prompt in prompts]
    assert estimate.prompt_tokens == sum(counted)


async def test_without_a_vocabulary_it_estimates_as_sending_does(empty_vocabularies) -> None:
    """It counts bytes, and waits for the network no longer than sending would."""
    async with OpenAIClient(NOWHERE) as client:
        client._counter = TokenCounter(load_timeout=0.01)
        estimate = await client.estimate(["hello there " * 9] * 600)
        tokens = await client._counter.count_input({"model": "gpt-4o-mini", "messages": [
            {"role": "user", "content": "hello there " * 9}]})  # fmt: skip
    assert estimate.prompt_tokens == 600 * tokens


TEXTS = st.lists(st.text(min_size=1).filter(str.strip), max_size=8)


@given(TEXTS, TEXTS, st.integers(1, 1000), st.integers(1, 5))
@settings(deadline=None)
def test_estimates_add_up(some: list[str], others: list[str], most: int, n: int) -> None:
    """The estimate of two lists is the sum of theirs, and more output never costs less."""

    async def three() -> list[CostEstimate]:
        client = OpenAIClient(NOWHERE)
        return [
            await client.estimate(prompts, max_tokens=most, n=n) for prompts in (some, others, some + others)
        ]

    first, second, both = asyncio.run(three())
    for name in ("requests", "prompt_tokens", "completion_tokens_high"):
        assert getattr(first, name) + getattr(second, name) == getattr(both, name)
    for name in ("cost_low", "cost_high", "batch_cost_low", "batch_cost_high"):
        assert getattr(first, name) + getattr(second, name) == pytest.approx(getattr(both, name))
    assert both.cost_low <= both.cost_high
    assert both.batch_cost_high <= both.cost_high
    assert max(first.minutes, second.minutes) <= both.minutes


# --- what is not known -------------------------------------------------------------------------------------


async def test_without_max_tokens_there_is_no_upper_bound() -> None:
    """The bounds are None, not a guess."""
    async with OpenAIClient(NOWHERE) as client:
        estimate = await client.estimate(["hello"])
    assert (estimate.completion_tokens_high, estimate.cost_high, estimate.batch_cost_high) == (None,) * 3
    assert estimate.cost_low > 0
    assert "or more" in str(estimate)


async def test_an_unknown_price_is_none() -> None:
    """Tokens are counted all the same, and the requests are counted as unpriced."""
    async with OpenAIClient(NOWHERE) as client:
        estimate = await client.estimate(["hello"] * 3, model="unknown/model", max_tokens=5)
    assert (estimate.cost_low, estimate.cost_high, estimate.batch_cost_low) == (None,) * 3
    assert (estimate.unpriced, estimate.requests) == (3, 3)
    assert estimate.prompt_tokens > 0
    assert "unknown online" in str(estimate)


async def test_a_service_tier_has_its_own_price() -> None:
    """Flex costs half, where the model has it; a batch has no tier."""
    async with OpenAIClient(NOWHERE) as client:
        options = {"model": "o4-mini", "max_tokens": 9}
        plain = await client.estimate(["hello"] * 9, **options)
        flex = await client.estimate(["hello"] * 9, service_tier="flex", **options)
    assert flex.cost_high == pytest.approx(plain.cost_high / 2)
    assert flex.batch_cost_high == plain.batch_cost_high


async def test_no_prompts_need_nothing() -> None:
    """All numbers are 0, and the progress is reported once, as 1.0."""
    seen: list[float] = []
    async with OpenAIClient(NOWHERE) as client:
        estimate = await client.estimate([], max_tokens=5, progress_callback=seen.append)
    assert (estimate.requests, estimate.prompt_tokens, estimate.cost_high, estimate.minutes) == (0, 0, 0, 0)
    assert seen == [1.0]


# --- minutes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rpm", "tpm", "requests", "tokens", "expected"),
    [
        (600, None, 1600, 1, (1600 - 600 * 59.75 / 60) / 600),
        (None, 6000, 10, 3000, (30_000 - 6000 * 59.75 / 60) / 6000),
        (600, 6000, 1600, 1, (1600 - 600 * 59.75 / 60) / 600),
        (600, 6000, 600, 100, (60_000 - 6000 * 59.75 / 60) / 6000),
        (600, 6000, 10, 10, 0.0),
        (None, None, 10**6, 10**6, None),
    ],
)
def test_minutes_follow_from_the_limits(rpm, tpm, requests, tokens, expected) -> None:
    """What a full bucket does not cover goes at the rate of the limit that takes longer."""
    limits = RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm)
    assert minutes(limits, requests, requests * tokens) == (expected and pytest.approx(expected))


@pytest.mark.parametrize(("rpm", "tpm"), [(1800, 480_000), (600, 480_000)])
def test_minutes_are_what_the_limiter_takes(rpm: int, tpm: int) -> None:
    """A run in virtual time, whose answers are as long as reserved, takes as long within 2%."""
    limits = RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm)
    figures = rehearse(VirtualServer(rpm, tpm), limits, requests=3000, tokens=400)
    rate = min(tpm / 400, rpm) / 60
    wall = figures.ratio * ((3000 - rate * 60) / rate + 0.5)
    assert minutes(limits, 3000, 3000 * 400) * 60 == pytest.approx(wall, rel=0.02)


async def test_reserved_tokens_are_those_of_the_limiter() -> None:
    """They are the input and max_tokens x n; without max_tokens the limiter's guess, then the mean."""
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=1000)
    with exact_server(output_tokens=20) as server:
        async with connect(server, limits) as client:
            guessed = await client.estimate(["x"] * 100)
            capped = await client.estimate(["x"] * 100, max_tokens=50, n=2)
            await client.generate_response("x")
            learnt = await client.estimate(["x"] * 100)
    each = guessed.prompt_tokens / 100
    for estimate, output in ((guessed, 256), (capped, 100), (learnt, 20)):
        assert estimate.minutes == pytest.approx((100 * (each + output) - 1000 * 59.75 / 60) / 1000)


# --- how it counts -----------------------------------------------------------------------------------------


async def late(prompts):
    for prompt in prompts:
        await asyncio.sleep(0)
        yield prompt


@pytest.mark.parametrize("kind", [list, iter, late])
async def test_a_wrong_prompt_is_named(kind) -> None:
    """The error has its index, also far into any kind of iterable."""
    prompts = [f"{n} " + "a word " * 300 for n in range(2 * _CHUNK)]
    prompts[-9] = ""
    async with OpenAIClient(NOWHERE) as client:
        with pytest.raises(ValidationError, match=rf"prompts\[{2 * _CHUNK - 9}\]=''") as raised:
            await client.estimate(kind(prompts))
    assert raised.value.index == 2 * _CHUNK - 9


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ("hello", {}, "prompts='hello'"),
        (None, {}, "prompts=None"),
        (["x"], {"max_tokens": 0}, "max_tokens=0"),
        (["x"], {"max_token": 5}, "did you mean max_tokens"),
        (["x"], {"progress_callback": 5}, "progress_callback=5"),
    ],
)
async def test_wrong_parameters_are_refused(prompts, options, says) -> None:
    """The same parameters are refused as for sending."""
    async with OpenAIClient(NOWHERE) as client:
        with pytest.raises(ValidationError, match=says):
            await client.estimate(prompts, **options)


async def test_an_error_of_the_prompts_is_raised() -> None:
    """It is raised unchanged."""

    def lines():
        yield "a"
        raise OSError("the file ended")

    async with OpenAIClient(NOWHERE) as client:
        with pytest.raises(OSError, match="the file ended"):
            await client.estimate(lines())


async def test_progress_grows_to_one() -> None:
    """Without a known number of prompts it is reported once, at the end. What a callback raises is logged."""
    seen: list[float] = []

    async def slowly(fraction: float) -> None:
        await asyncio.sleep(0)
        seen.append(fraction)

    async with OpenAIClient(NOWHERE) as client:
        await client.estimate(["hello"] * (4 * _CHUNK), progress_callback=slowly)
        assert len(seen) >= 4
        assert seen == sorted(set(seen))
        assert (0 < seen[0] < 0.5, seen[-1]) == (True, 1.0)
        seen.clear()
        await client.estimate(iter(["hello"] * (4 * _CHUNK)), progress_callback=slowly)
        assert seen == [1.0]
        assert (await client.estimate(["hello"], progress_callback=lambda _: 1 / 0)).requests == 1


class Watched(str):
    """A prompt that records the threads it is checked in, and how many prompts are alive."""

    __slots__ = ("__weakref__",)
    alive: ClassVar[int] = 0
    most_alive: ClassVar[int] = 0
    threads: ClassVar[set[int]] = set()

    def __new__(cls, text: str) -> Self:
        made = super().__new__(cls, text)
        cls.alive += 1
        cls.most_alive = max(cls.most_alive, cls.alive)
        weakref.finalize(made, cls.gone)
        return made

    @classmethod
    def gone(cls) -> None:
        cls.alive -= 1

    def isspace(self) -> bool:
        self.threads.add(threading.get_ident())
        return False


async def test_counting_is_off_the_loop_and_in_bounded_memory() -> None:
    """No prompt is checked in the event loop's thread, and few are held at a time."""
    async with OpenAIClient(NOWHERE) as client:
        estimate = await client.estimate(Watched(f"{n}") for n in range(20 * _CHUNK))
    assert estimate.requests == 20 * _CHUNK
    assert threading.get_ident() not in Watched.threads
    assert Watched.threads
    assert Watched.most_alive <= 4 * _CHUNK


async def test_cancelling_it_leaves_nothing() -> None:
    """No task is left, and the client goes on."""
    async with OpenAIClient(NOWHERE) as client:
        before = asyncio.all_tasks()
        counting = asyncio.create_task(client.estimate(f"{n}" for n in range(10**9)))
        await asyncio.sleep(0.05)
        counting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await counting
        assert asyncio.all_tasks() == before
        assert (await client.estimate(["hello"])).requests == 1


# --- what it looks like ------------------------------------------------------------------------------------


def test_it_reads_well() -> None:
    """Three lines, which say what is unknown; it survives JSON and pickle."""
    estimate = CostEstimate(
        model="gpt-4o-mini",
        requests=100_000,
        prompt_tokens=12_345_678,
        completion_tokens_expected=1_000_000,
        completion_tokens_high=5_000_000,
        cost_low=1851.85,
        cost_expected=2451.85,
        cost_high=4851.852,
        batch_cost_low=0.000123,
        batch_cost_high=0.0456,
        minutes=193.74,
    )
    assert str(estimate).splitlines() == [
        "100,000 requests to gpt-4o-mini: 12,345,678 tokens in, 0 to 5,000,000 (likely 1,000,000) out",
        "USD: 1,851.85 to 4,851.85 (likely 2,451.85) online, 0.00012 to 0.046 by batch",
        "Time at the configured limits: 3 h 13 min",
    ]
    assert CostEstimate.model_validate_json(estimate.model_dump_json()) == estimate
    assert pickle.loads(pickle.dumps(estimate)) == estimate  # noqa: S301  # our own
    assert str(estimate.model_copy(update={"minutes": 0.04})).endswith("limits: 2.4 s")
    bare = CostEstimate(model="m", requests=0, prompt_tokens=0)
    assert "unknown online, unknown by batch" in str(bare)
    assert "no limit is configured" in str(bare)
