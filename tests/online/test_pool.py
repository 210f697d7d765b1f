"""The worker pool in virtual time: nothing lost, nothing left behind, nothing taken ahead of its time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import sys
import traceback
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from virtual import VirtualLoop

from openai_eval_client._online.prompts import WorkerPool
from openai_eval_client._online.stopping import StopRule


class ItemError(Exception):
    """The error of one item."""


class FatalError(Exception):
    """An error that every item would meet."""


@dataclass(frozen=True)
class Item:
    """How one item goes."""

    before: float = 0.0  # seconds before its request
    during: float = 0.0
    after: float = 0.0
    raises: type[Exception] | None = None
    retry: float | None = None  # the first request fails, and after so many seconds there is another


@dataclass(frozen=True)
class Story:
    """One run."""

    items: list[Item]
    slots: int = 3
    width: int = 3
    source: str = "list"
    source_delay: float = 0.0
    fails_at: int | None = None  # the item instead of which the source raises
    consumer_delay: float = 0.0
    ends: str = "exhausted"  # how the consumer ends after so many outcomes; "exhausted": with the source
    after: int = 0


@dataclass
class Seen:
    """What was seen of a run."""

    taken: int = 0
    consumed: int = 0
    furthest: int = 0
    sending: int = 0
    sending_at: list[int] = field(default_factory=list)
    sent: set[int] = field(default_factory=set)
    outcomes: dict[int, object] = field(default_factory=dict)
    error: BaseException | None = None
    source_ended: bool = False
    met_fatal: bool = False
    sent_after_fatal: int = 0
    pool: WorkerPool | None = None
    ended_at: float = 0.0

    def took(self) -> None:
        self.taken += 1
        self.furthest = max(self.furthest, self.taken - self.consumed)


class Rule(StopRule):
    """Ends the run by one class of errors alone."""

    def __init__(self, seen=None) -> None:
        super().__init__()
        self.seen = seen

    def failed(self, error, item):  # noqa: ARG002  # one class of errors decides
        fatal = isinstance(error, FatalError)
        if self.seen is not None:
            self.seen.met_fatal = self.seen.met_fatal or fatal
        return error if fatal else None


def from_list(story: Story, seen: Seen):
    try:
        for index, item in enumerate(story.items):
            if index == story.fails_at:
                raise OSError("the file ended")
            seen.took()
            yield item
    finally:
        seen.source_ended = True


async def from_async(story: Story, seen: Seen):
    try:
        for item in from_list(story, seen):
            await asyncio.sleep(story.source_delay)
            yield item
    finally:
        await asyncio.sleep(0)
        seen.source_ended = True


class AsyncCursor:
    """An async iterator that is no generator, such as a database's cursor."""

    def __init__(self, story: Story, seen: Seen) -> None:
        self.items, self.delay = from_list(story, seen), story.source_delay

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(self.delay)
        for item in self.items:
            return item
        raise StopAsyncIteration


SOURCES = {"list": from_list, "async generator": from_async, "async iterator": AsyncCursor}


async def work(index: int, item: Item, *, sending, seen: Seen) -> int:
    await asyncio.sleep(item.before)
    if item.retry is not None:
        with contextlib.suppress(ItemError):
            await request(index, item, ItemError, sending, seen)
        await asyncio.sleep(item.retry)
    await request(index, item, item.raises, sending, seen)
    await asyncio.sleep(item.after)
    return index


async def request(index: int, item: Item, raises: type[Exception] | None, sending, seen: Seen) -> None:
    with sending:
        seen.sending += 1
        seen.sending_at.append(seen.sending)
        seen.sent.add(index)
        seen.sent_after_fatal += seen.met_fatal
        try:
            await asyncio.sleep(item.during)
            if raises is not None:
                raise raises(index)
        finally:
            seen.sending -= 1


async def consume(story: Story, seen: Seen) -> None:
    pool = seen.pool = WorkerPool(
        lambda *args, **options: work(*args, **options, seen=seen),
        slots=story.slots,
        width=story.width,
        rule=Rule(seen),
    )
    async with contextlib.AsyncExitStack() as stack:
        streams = [pool.run(SOURCES[story.source](story, seen))]
        if story.ends == "aclose":
            stack.push_async_callback(streams[0].aclose)
        async for index, outcome in streams.pop():  # nothing else holds on to it
            assert index not in seen.outcomes
            seen.outcomes[index] = outcome
            if len(seen.outcomes) == story.after and story.ends == "raise":
                raise KeyError(index)
            if len(seen.outcomes) == story.after and story.ends in {"break", "aclose"}:
                break
            await asyncio.sleep(story.consumer_delay)
            seen.consumed += 1
    if story.ends == "aclose":
        assert len(asyncio.all_tasks()) == 2  # this one, and the one that waits for it


def played(story: Story) -> Seen:
    """Play a story in virtual time; nothing may be left when it is over."""
    seen = Seen()

    async def play() -> None:
        run = asyncio.create_task(consume(story, seen))
        if story.ends == "cancel":
            asyncio.get_running_loop().call_later(story.after / 10, run.cancel)
        await asyncio.wait([run])
        seen.ended_at = loop.time()
        seen.error = asyncio.CancelledError() if run.cancelled() else run.exception()
        for _ in range(20):  # a stream that was dropped is closed by the loop, soon
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    loop = VirtualLoop()
    unhandled: list[dict] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    try:
        loop.run_until_complete(play())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
    gc.collect(0)  # young objects: all of this story
    assert unhandled == []
    assert (seen.sending, seen.sent_after_fatal) == (0, 0)
    assert not seen.pool._tasks | seen.pool._sending | seen.pool._waiting
    assert seen.pool._stopped or seen.pool._workers == 0
    return seen


DELAYS = st.sampled_from([0.0, 0.0, 0.1, 0.3, 1.0])
ITEMS = st.builds(
    Item,
    before=DELAYS,
    during=DELAYS,
    after=DELAYS,
    raises=st.sampled_from([None, None, None, None, ItemError, FatalError]),
    retry=st.sampled_from([None, None, None, 0.0, 0.2]),
)
STORIES = st.builds(
    Story,
    items=st.lists(ITEMS, max_size=20),
    slots=st.integers(1, 6),
    width=st.integers(1, 6),
    source=st.sampled_from(sorted(SOURCES)),
    source_delay=DELAYS,
    fails_at=st.none() | st.integers(0, 20),
    consumer_delay=DELAYS,
    ends=st.sampled_from(["exhausted", "exhausted", "break", "aclose", "raise", "cancel"]),
    after=st.integers(1, 20),
)


@given(STORIES)
@example(Story([Item(during=1.0, raises=FatalError), Item(during=1.0, raises=FatalError), Item(during=2.0)]))
@example(Story([Item(raises=FatalError), Item(before=1.0), Item(during=1.0)], source="async generator"))
@example(Story([Item(during=1.0)] * 9, fails_at=4, source_delay=0.1, source="async iterator"))
@example(Story([Item()] * 9, source="async generator", source_delay=1.0, ends="cancel", after=5))
def test_any_interleaving_loses_no_outcome_and_leaves_no_task(story: Story) -> None:
    """Consumers may be slow or end early in any way, items may fail, sources may raise."""
    seen = played(story)
    assert max(seen.sending_at, default=0) <= seen.furthest <= story.width
    for index, outcome in seen.outcomes.items():
        expected = story.items[index].raises
        assert outcome == index if expected is None else type(outcome) is expected
    if story.source == "async generator" and seen.taken:
        assert seen.source_ended
    ended_early = isinstance(seen.error, KeyError | asyncio.CancelledError) or (
        story.ends in {"break", "aclose"} and len(seen.outcomes) == story.after
    )
    if ended_early:
        return
    broken_off = seen.sent - set(seen.outcomes)
    assert all(seen.met_fatal and story.items[index].retry is not None for index in broken_off)
    if not isinstance(seen.error, FatalError):
        assert set(seen.outcomes) == set(range(seen.taken))
        assert seen.taken == len(story.items) if seen.error is None else seen.taken == story.fails_at
    if seen.error is not None:
        assert isinstance(seen.error, FatalError | OSError)
        assert isinstance(seen.error, OSError) or seen.error in seen.outcomes.values()


def test_outcomes_come_in_the_order_of_completion() -> None:
    """The fastest item is yielded first."""
    seen = played(Story([Item(during=3.0), Item(during=1.0), Item(during=2.0)]))
    assert list(seen.outcomes) == [1, 2, 0]


@pytest.mark.parametrize("source", SOURCES)
def test_a_slow_consumer_slows_the_source_down(source: str) -> None:
    """As many items as the width are taken and not yet consumed, and never more."""
    seen = played(Story([Item(during=0.1)] * 50, width=5, consumer_delay=1.0, source=source))
    assert (seen.taken, seen.furthest) == (50, 5)


def test_work_begins_before_the_next_item_is_taken() -> None:
    """A generator that is slow to make items does not hold up those it made, however much room there is."""
    begun: list[int] = []

    async def begin(index: int, _: int, *, sending) -> None:
        begun.append(index)

    def slow():
        for n in range(9):
            assert begun == list(range(n))
            yield n

    async def main() -> int:
        return len([pair async for pair in WorkerPool(begin, slots=99, width=99, rule=Rule()).run(slow())])

    assert asyncio.run(main()) == 9


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_that_is_done_goes_on_with_the_next_item(fails: bool) -> None:
    """There are as many tasks as slots, however many items; a failed item without another attempt is done."""
    workers: set[asyncio.Task | None] = set()

    async def one(index: int, _: None, *, sending) -> None:
        workers.add(asyncio.current_task())
        with sending:
            await asyncio.sleep(1.0 + index % 3)
            if fails:
                raise ItemError

    async def main() -> int:
        pool = WorkerPool(one, slots=3, width=9, rule=Rule())
        return len([pair async for pair in pool.run([None] * 50)])

    loop = VirtualLoop()
    assert loop.run_until_complete(main()) == 50
    loop.close()
    assert len(workers) == 3


@pytest.mark.parametrize("waiting", [1, 2, 3])
def test_an_item_between_two_attempts_leaves_its_slot_to_another(waiting: int) -> None:
    """Items that wait hold up no others, also where nothing more is taken; in the end all are done."""
    items = [Item(retry=100.0)] * waiting + [Item(during=1.0)] * 8
    seen = played(Story(items, slots=2, width=2 + waiting))
    assert list(seen.outcomes)[:8] == list(range(waiting, waiting + 8))
    assert 100.0 <= seen.ended_at < 101.0


def test_no_more_workers_than_slots_are_left_once_the_items_that_waited_are_back() -> None:
    """The worker that took a waiting item's slot ends; the client's limits bound what is sent meanwhile."""
    seen = played(
        Story([Item(during=1.0)] * 3 + [Item(retry=0.5, during=1.0)] + [Item(during=1.0)] * 30, width=9)
    )
    assert max(seen.sending_at[-12:]) == 3


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_a_source_that_is_slow_lets_the_others_go_in_between(seconds: float) -> None:
    """Items are taken in one turn of the loop only where that takes no time."""
    went: list[int] = []
    at: list[int] = []
    loop = VirtualLoop()

    def source():
        for n in range(20):
            at.append(len(went))
            loop.call_soon(went.append, n)
            yield Item(during=1.0)
            loop.jump.slept += seconds

    async def main() -> None:
        pool = WorkerPool(functools.partial(work, seen=Seen()), slots=1, width=99, rule=Rule())
        async with contextlib.aclosing(pool.run(source())) as stream:
            await anext(stream)

    loop.run_until_complete(main())
    loop.close()
    assert len(set(at[3:])) == (17 if seconds else 1)


class BugError(BaseException):
    """Not an Exception, so that no item has it as its outcome."""


def test_what_is_no_exception_ends_the_run_and_is_raised() -> None:
    """What is in flight is awaited; what has not been sent is dropped."""
    seen = played(
        Story(
            [Item(during=2.0), Item(during=1.0, raises=BugError)] + [Item(during=1.0)] * 9, slots=2, width=5
        )
    )
    assert set(seen.outcomes) == seen.sent - {1}
    assert len(seen.sent) < seen.taken == 5
    assert isinstance(seen.error, BugError)


def test_clearing_the_frames_of_an_error_does_not_touch_the_work_on_others() -> None:
    """unittest's assertRaises clears them."""

    async def one(index: int, _: None, *, sending) -> int:
        if index == 0:
            raise ItemError
        await asyncio.sleep(1.0)
        return index

    async def main() -> list[object]:
        outcomes = []
        pool = WorkerPool(one, slots=1, width=2, rule=Rule())
        async for _, outcome in pool.run([None] * 5):
            if isinstance(outcome, ItemError):
                traceback.clear_frames(outcome.__traceback__)
            outcomes.append(outcome)
        return outcomes[1:]

    loop = VirtualLoop()
    assert loop.run_until_complete(asyncio.wait_for(main(), 60.0)) == [1, 2, 3, 4]
    loop.close()


def test_nothing_is_sent_in_the_place_of_what_is_cancelled() -> None:
    """A task cancelled from outside, while other items are ready, ends the run."""
    sent: list[int] = []

    async def one(index: int, _: None, *, sending) -> None:
        with sending:
            sent.append(index)
            if index == 1:
                asyncio.current_task().cancel()
            await asyncio.sleep(1.0)

    async def main() -> None:
        async for _ in WorkerPool(one, slots=3, width=6, rule=Rule()).run([None] * 9):
            pass

    loop = VirtualLoop()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(main())
    loop.close()
    assert sent == [0, 1, 2]


def test_the_error_of_the_source_comes_after_all_it_gave() -> None:
    """What was taken is finished and yielded first, items not yet sent too."""
    seen = played(Story([Item(before=1.0, during=1.0)] * 9, width=6, fails_at=4, consumer_delay=1.0))
    assert sorted(seen.outcomes) == [0, 1, 2, 3]
    assert isinstance(seen.error, OSError)


def test_a_fatal_error_is_raised_rather_than_an_earlier_one_of_the_source() -> None:
    """It is the reason why some of what was taken has no outcome."""
    seen = played(Story([Item(during=0.1, raises=FatalError), Item(before=1.0), Item()], fails_at=2))
    assert sorted(seen.outcomes) == [0]
    assert isinstance(seen.error, FatalError)


def test_a_fatal_error_stops_sending_at_once_however_slow_the_consumer() -> None:
    """It counts when it happens, not when it is consumed; what was in flight is yielded."""
    story = Story(
        [Item(during=0.1), Item(during=0.2, raises=FatalError), Item(during=9.0), *[Item(before=0.5)] * 9],
        consumer_delay=100.0,
    )
    seen = played(story)
    assert sorted(seen.outcomes) == [0, 1, 2]
    assert seen.error is seen.outcomes[1]


def test_what_is_in_flight_and_fails_after_a_fatal_error_is_yielded_too() -> None:
    """Each item has its own error; the first is raised."""
    seen = played(Story([Item(during=n, raises=FatalError) for n in (0.1, 0.2, 0.3)] + [Item()] * 3))
    assert [str(outcome) for outcome in seen.outcomes.values()] == ["0", "1", "2"]
    assert str(seen.error) == "0"


def test_after_a_fatal_error_there_is_no_further_attempt() -> None:
    """Neither for an item that waits for one already, nor for one that fails later."""
    items = [Item(during=0.1, raises=FatalError), Item(retry=100.0), Item(during=0.2, retry=100.0)]
    seen = played(Story(items))
    assert list(seen.outcomes) == [0]
    assert seen.ended_at < 1


@pytest.mark.parametrize("met_fatal", [True, False])
def test_what_swallows_its_cancellation_still_sends_no_more(met_fatal: bool) -> None:
    """A timeout that passes in the same moment swallows a cancellation, for instance."""
    sent: list[int] = []

    async def stubborn(index: int, _: None, *, sending) -> None:
        if index == 0:
            await asyncio.sleep(1.0)
            if met_fatal:
                raise FatalError
            return
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(2.0)
        with sending:
            sent.append(index)

    async def main() -> None:
        stream = WorkerPool(stubborn, slots=2, width=2, rule=Rule()).run([None] * 9)
        await anext(stream)
        await stream.aclose()

    loop = VirtualLoop()
    loop.run_until_complete(main())
    loop.close()
    assert sent == []


async def test_an_async_generator_is_closed_by_the_time_the_stream_is() -> None:
    """Also where there is another reference to it."""
    seen = Seen()
    source = from_async(Story([Item()] * 9), seen)
    stream = WorkerPool(functools.partial(work, seen=seen), slots=2, width=2, rule=Rule()).run(source)
    await anext(stream)
    await stream.aclose()
    assert seen.source_ended
    assert [item async for item in source] == []


def test_a_task_cancelled_from_outside_is_not_lost_in_silence() -> None:
    """The consumer is cancelled too, after what was in flight."""

    async def one(index: int, _: None, *, sending) -> int:
        with sending:
            if index == 1:
                asyncio.current_task().cancel()
            await asyncio.sleep(1.0)
        return index

    async def all_of_them() -> None:
        pool = WorkerPool(one, slots=3, width=3, rule=Rule())
        async for _, outcome in pool.run([None] * 9):
            outcomes.append(outcome)

    outcomes: list[int] = []
    loop = VirtualLoop()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(all_of_them())
    loop.close()
    assert outcomes == [0, 2]


def test_a_source_that_is_never_read_from_is_not_touched() -> None:
    """Nothing starts before the first outcome is asked for, and nothing is left when none is."""
    seen = Seen()
    story = Story([Item()])
    stream = WorkerPool(work, slots=1, width=1, rule=Rule()).run(from_list(story, seen))
    del stream
    assert seen.taken == 0


def test_a_run_that_stands_still_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Once in that many seconds in which no prompt has ended."""
    loop = VirtualLoop()

    async def one(index: int, item: float, *, sending: WorkerPool) -> None:
        with sending:
            await asyncio.sleep(item)

    async def run() -> int:
        pool = WorkerPool(one, slots=3, width=9, patience=60)
        return len([pair async for pair in pool.run([1.0, 50.0, 200.0])])

    try:
        assert loop.run_until_complete(run()) == 3
    finally:
        loop.close()
    said = [record for record in caplog.records if record.event == "run_stands_still"]
    assert len(said) == 2
    assert "no prompt of this run has ended: 1 of 1 at work are in flight" in said[0].message


def test_what_a_closed_loop_left_behind_cancels_nobody(monkeypatch) -> None:
    """A run whose loop closed in the middle is collected while another task runs, which goes on."""
    ended = []

    async def work(_index: int, _item: int, *, sending) -> None:
        with sending:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

    async def consume() -> None:
        pool = WorkerPool(work, slots=3, width=6)
        asyncio.get_running_loop().call_later(0.01, pool.stop)
        async for _ in pool.run(range(9)):
            pass

    async def innocent() -> int:
        gc.collect()
        await asyncio.sleep(0)
        return len(ended)

    loop = asyncio.new_event_loop()
    task = loop.create_task(consume())
    loop.call_later(0.02, loop.stop)
    loop.run_forever()
    loop.close()
    del task, loop
    monkeypatch.setattr(
        sys, "unraisablehook", lambda _: None
    )  # asyncio's own queue says that its loop closed
    assert asyncio.run(innocent()) == 3
