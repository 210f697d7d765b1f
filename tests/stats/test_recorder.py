"""The totals, and the finish reasons."""

from openai_eval_client._stats import Recorder


def test_finish_reasons_are_counted_for_prompts_and_batches():
    """An answer without one counts as an answer alone."""
    recorder = Recorder()
    for reason in ("stop", "length", "stop", ""):
        recorder.answered(reason)
    recorder.answered()
    recorder.settled(3, 1, 10, 20, {"stop": 2, "tool_calls": 1})
    recorder.settled(1, 0, 1, 1)
    assert recorder.report_data().finish_reasons == {"stop": 4, "length": 1, "tool_calls": 1}
    assert (recorder.snapshot().requests, recorder.snapshot().failures) == (10, 1)


def test_there_are_no_more_finish_reasons_than_a_table_holds():
    """A server may invent any number of them: the rest is "other"."""
    recorder = Recorder()
    for number in range(1000):
        recorder.answered(f"reason {number}")
    recorder.answered("reason 3")
    reasons = recorder.report_data().finish_reasons
    assert len(reasons) == 21
    assert (reasons["reason 3"], reasons["other"]) == (2, 980)
    assert recorder.snapshot().requests == 1001


def test_report_data_stays_as_it_is():
    """What happens later does not change it."""
    recorder = Recorder()
    recorder.admitted("m", 10, 0.0, 0.0)
    recorder.answered("stop")
    data = recorder.report_data()
    recorder.admitted("m", 10, 0.1, 0.1)
    recorder.answered("stop")
    assert sum(data.history.models["m"].admitted) == 1
    assert data.finish_reasons == {"stop": 1}


def test_429s_and_retries_are_known_at_any_time():
    """Before the first attempt there are none."""
    recorder = Recorder()
    assert recorder.rate_limited_and_retries == (0, 0)
    recorder.retry("m", ValueError(), 2.5)
    assert recorder.rate_limited_and_retries == (0, 1)
    assert recorder.snapshot().retry_seconds == 2.5
