"""A thread that does jobs in groups, a lock for collected objects, a fair queue, a few starts in a turn."""

import asyncio
import gc
import os
import subprocess
import sys
import threading

import pytest

from openai_eval_client._runtime.loops import Background, DeferringLock, FairQueue, Queued, StartThrottle


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


# --- the lock for collected objects -------------------------------------------------------------------------


def test_what_is_deferred_waits_for_the_outermost_region() -> None:
    """Also where the thread enters a region inside it, as a signal handler that reads statistics does."""
    lock, done = DeferringLock(), []
    with lock:
        lock.when_free(lambda: done.append("first"))
        with lock:
            lock.when_free(lambda: done.append("second"))
        assert done == []
        lock.when_free(lambda: done.append("third"))
        assert done == []
    assert done == ["first", "second", "third"]
    lock.when_free(lambda: done.append("at once"))
    assert done[-1] == "at once"


def test_an_action_that_fails_leaves_the_lock_free() -> None:
    """Its error is raised where the region ends; the actions behind it follow with the next region."""
    lock, done = DeferringLock(), []
    with pytest.raises(ZeroDivisionError), lock:  # noqa: PT012  # it is raised where the region ends
        lock.when_free(lambda: 1 // 0)
        lock.when_free(lambda: done.append("behind it"))
    thread = threading.Thread(target=lock.when_free, args=(lambda: done.append("another thread"),))
    thread.start()
    thread.join(10)
    assert done == ["behind it", "another thread"]


# --- the fair queue -----------------------------------------------------------------------------------------


def test_the_lowest_turn_goes_first() -> None:
    """Whenever it came, and whatever else has the same; what waits no more is passed over."""
    queue: FairQueue[Queued] = FairQueue()
    waiters = [Queued() for _ in range(6)]
    for turn, waiter in zip((4, 2, 2, 0, 3, 1), waiters, strict=True):
        queue.add(turn, waiter)
    waiters[3].waits = waiters[4].waits = False
    assert queue.waiting()[0] is waiters[5]
    assert set(queue.waiting()[1:3]) == {waiters[1], waiters[2]}
    assert queue.waiting()[3:] == [waiters[0]]
    order = []
    while (first := queue.first()) is not None:
        order.append(first)
        first.waits = False
    assert order == [waiters[5], *sorted(waiters[1:3], key=id), waiters[0]]
    assert not queue


async def test_a_waiter_is_woken_on_its_own_loop() -> None:
    """From another thread; with a result or an error; not where its loop was closed or it waits no more."""
    loop = asyncio.get_running_loop()
    answered, failed, cancelled = [Queued(future=loop.create_future()) for _ in range(3)]
    cancelled.future.cancel()
    assert await asyncio.to_thread(answered.wake)
    assert await asyncio.to_thread(failed.wake, KeyError("no"))
    assert await asyncio.to_thread(cancelled.wake)
    assert await answered.future is None
    with pytest.raises(KeyError, match="no"):
        await failed.future
    closed = asyncio.new_event_loop()
    left = Queued(future=closed.create_future())
    closed.close()
    assert not left.wake()


async def test_an_error_for_a_waiter_that_is_gone_is_not_reported() -> None:
    """What waited may be dropped in the same turn; asyncio would log that nothing retrieved it."""
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    assert Queued(future=asyncio.get_running_loop().create_future()).wake(KeyError("no"))
    gc.collect()
    assert reported == []


# --- a few in a turn ----------------------------------------------------------------------------------------


async def test_those_admitted_at_once_start_a_few_at_a_time() -> None:
    """In their order, without those cancelled meanwhile, and with nothing left behind."""
    starts, loop, order = StartThrottle(), asyncio.get_running_loop(), []
    waiters = [loop.create_future() for _ in range(30)]
    for number, waiter in enumerate(waiters):
        waiter.add_done_callback(lambda done, number=number: done.cancelled() or order.append(number))
        starts.wake(waiter)
    waiters[3].cancel()
    at_most, turns = 0, 0
    while len(order) < 29:
        before = len(order)
        await asyncio.sleep(0)
        at_most, turns = max(at_most, len(order) - before), turns + 1
    assert order == [number for number in range(30) if number != 3]
    assert at_most == 8
    assert turns < 9


async def test_a_waiter_added_while_others_are_woken_is_woken_too() -> None:
    """As the collector adds them, wherever it runs; an exception on the way holds up no other."""

    class Reentrant(asyncio.Future):
        def done(self) -> bool:
            if not inner:
                inner.append(asyncio.get_running_loop().create_future())
                starts.wake(inner[0])
                raise KeyError
            return super().done()

    starts, loop, inner = StartThrottle(), asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda *_: None)
    outer = [loop.create_future(), Reentrant(), loop.create_future()]
    for waiter in outer:
        starts.wake(waiter)
    await asyncio.wait_for(asyncio.gather(outer[0], outer[2]), 5)
    await asyncio.wait_for(inner[0], 5)
    assert not outer[1].done()


# --- forks --------------------------------------------------------------------------------------------------

FORKING = """
import os, threading, time
from openai_eval_client._runtime.loops import mind_forks

class Guarded:
    lock = threading.Lock()
    def before_fork(self):
        self.lock.acquire()
    def after_fork(self, *, child):
        self.lock.release()

guarded, locked = Guarded(), threading.Event()
mind_forks(guarded)
from concurrent.futures import ThreadPoolExecutor  # loaded later than the hooks were set
pool = ThreadPoolExecutor(1)

def submit():
    with guarded.lock:
        locked.set()
        time.sleep(0.2)  # the fork begins meanwhile
        pool.submit(print, "submitted", flush=True)

threading.Thread(target=submit).start()
locked.wait()
if not os.fork():
    os._exit(0)
pool.shutdown()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork")
def test_a_thread_that_uses_an_executor_holds_up_a_fork_only_for_a_moment() -> None:
    """A fork takes the executors' lock last: a thread that it waits for may need it."""
    run = [sys.executable, "-W", "ignore", "-c", FORKING]
    done = subprocess.run(run, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "submitted\n"
