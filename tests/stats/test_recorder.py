"""The totals, and the finish reasons."""

from answers import answer

from openai_eval_client import _stats
from openai_eval_client._stats import Recorder
from openai_eval_client._wire import NOT_SENT, Demand, Outcome, Usage
from openai_eval_client._wire.failures import refused


def test_finish_reasons_are_counted_for_prompts_and_batches():
    """An answer without one counts as an answer alone."""
    recorder = Recorder()
    for reason in ("stop", "length", "stop", ""):
        recorder.answered(reason)
    recorder.answered()
    recorder.settled([answer(finish_reason=reason) for reason in ("stop", "stop", "tool_calls")], 1)
    recorder.settled([answer(finish_reason="")], 0)
    assert recorder.snapshot().finish_reasons == {"stop": 4, "length": 1, "tool_calls": 1}
    stats = recorder.snapshot()
    assert (stats.requests, stats.failures) == (10, 1)
    assert (stats.prompt_tokens, stats.completion_tokens) == (28, 12)


def test_there_are_no_more_finish_reasons_than_a_table_holds():
    """A server may invent any number of them: the rest is "other"."""
    recorder = Recorder()
    for number in range(1000):
        recorder.answered(f"reason {number}")
    recorder.answered("reason 3")
    reasons = recorder.snapshot().finish_reasons
    assert len(reasons) == 21
    assert (reasons["reason 3"], reasons["other"]) == (2, 980)
    assert recorder.snapshot().requests == 1001


def test_report_data_stays_as_it_is():
    """What happens later does not change it."""
    recorder = Recorder()
    recorder.admitted("m", 10, 0.0, 0.0)
    recorder.answered("stop")
    data, stats = recorder.report_data(), recorder.snapshot()
    recorder.admitted("m", 10, 0.1, 0.1)
    recorder.answered("stop")
    assert sum(data.history.models["m"].admitted) == 1
    assert stats.finish_reasons == {"stop": 1}


def test_429s_and_retries_are_known_at_any_time():
    """Before the first attempt there are none."""
    recorder = Recorder()
    assert recorder.rate_limited_and_retries == (0, 0)
    recorder.retry("m", ValueError(), 2.5)
    assert recorder.rate_limited_and_retries == (0, 1)
    assert recorder.snapshot().retry_seconds == 2.5


def test_an_answer_from_the_cache_counts_with_its_finish_reason():
    """It is one more prompt answered."""
    recorder = Recorder()
    recorder.answered("stop")
    recorder.answered("stop", cached=True)
    assert recorder.snapshot().finish_reasons == {"stop": 2}
    stats = recorder.snapshot()
    assert (stats.requests, stats.cache_hits) == (2, 1)


def test_what_answers_lack_is_counted():
    """Online, from the cache and by batch: misses of the schema, and what requests went without."""
    recorder = Recorder()
    odd = answer(finish_reason="length", fits_schema=False, unsent_parameters=["temperature"])
    recorder.answered(odd)
    recorder.answered(odd, cached=True)
    recorder.answered(answer(fits_schema=True))
    recorder.settled([odd, answer()], 0)
    stats = recorder.snapshot()
    assert stats.finish_reasons == {"length": 3, "stop": 2}
    assert (stats.schema_misses, stats.unsent_parameters) == (3, {"temperature": 3})


def test_an_attempt_is_counted_with_its_tokens_and_seconds():
    """One that was not sent counts in the timeline alone."""
    recorder = Recorder()
    for outcome in (Outcome(200, {}, Usage(10, 5)), refused(429, {}), NOT_SENT):
        recorder.admitted("m", 10, 0.0, 1.0)
        recorder.settled_attempt(Demand("m", 10), outcome, 1.0, 3.0)
    stats = recorder.snapshot()
    assert (stats.attempts, stats.rate_limited, stats.server_seconds) == (2, 1, 4.0)
    assert (stats.prompt_tokens, stats.completion_tokens, stats.requests) == (10, 5, 0)
    timeline = recorder.report_data().history.models["m"]
    assert (sum(timeline.used), sum(timeline.rate_limited), timeline.seconds) == (15, 1, 6.0)


def test_calls_of_the_sdk_are_counted_by_their_attempts():
    """A first attempt is a call; only a refusal that the SDK does not repeat is a failure for good."""
    recorder = Recorder()
    for retry, outcome in ((False, refused(500, {})), (True, refused(400, {})), (False, refused(429, {}))):
        recorder.settled_attempt(Demand("m", 10, retry=retry), outcome, 0.0, 1.0)
    stats = recorder.snapshot()
    assert (stats.requests, stats.retries, stats.failures) == (2, 1, 1)
    failures = recorder.report_data().failures
    assert {row.status: row.prompts for row in failures} == {400: 1, 429: 0, 500: 0}


def test_a_stream_collected_while_intervals_are_joined_counts_afterwards(monkeypatch):
    """The garbage collector may run at any moment, this one included."""
    recorder, in_between = Recorder(), []
    demand, outcome, join = Demand("m", 1), Outcome(200, {}, Usage(3, 2)), _stats._joined

    def collecting(bins):
        if not in_between:
            recorder.settled_attempt(demand, outcome, 0.0, 0.1)
            in_between.append(recorder.snapshot().attempts)
        return join(bins)

    monkeypatch.setattr(_stats, "_joined", collecting)
    recorder.admitted("m", 1, 0.0, 0.0)
    recorder.admitted("m", 1, 70.0, 70.0)
    assert in_between == [0]
    assert recorder.snapshot().attempts == 1
    assert sum(recorder.report_data().history.models["m"].used) == 5
    assert recorder._timeline._in_flight == 1
