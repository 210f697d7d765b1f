"""One thread that does jobs in groups, for any number of event loops."""

import asyncio
import threading

import pytest

from openai_eval_client._runtime.loops import Background


async def test_jobs_that_wait_are_done_together() -> None:
    """Those asked for while a group is at work make the next one, in order; each gets its own outcome."""
    groups, go_on = [], threading.Event()

    def work(jobs):
        groups.append(list(jobs))
        go_on.wait(10)
        return [ValueError(job) if job == 7 else -job for job in jobs]

    background = Background("test", work)
    first = asyncio.create_task(background.do(0))
    while not groups:
        await asyncio.sleep(0.001)
    rest = [asyncio.create_task(background.do(job)) for job in range(1, 50)]
    await asyncio.sleep(0)
    go_on.set()
    outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
    assert groups == [[0], list(range(1, 50))]
    assert [one for one in outcomes if not isinstance(one, ValueError)] == [-n for n in range(50) if n != 7]
    background.finish()


async def test_the_thread_ends_when_there_is_nothing_to_do() -> None:
    """By itself after a moment, at once when finished; with a new job a new one begins."""
    background = Background("test thread", lambda jobs: jobs)
    for _ in range(2):
        assert await background.do("job") == "job"
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "test thread"]
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
    await background.do("job")
    background.finish()
    assert "test thread" not in [thread.name for thread in threading.enumerate()]


async def test_what_the_work_raises_is_raised_for_each_job_of_its_group() -> None:
    """The next group is done as usual."""

    def work(jobs):
        if "bad" in jobs:
            raise OSError("no")
        return jobs

    background = Background("test", work)
    with pytest.raises(OSError, match="no"):
        await background.do("bad")
    assert await background.do("good") == "good"
    background.finish()
