"""What threads, event loops, forks and files ask of a library."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # its fork hook has to be older than ours: a fork takes its lock last
import contextlib
import errno
import functools
import heapq
import itertools
import os
import stat
import sys
import threading
import uuid
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> bool:
    """Call `function` on `loop`, now if it is the running one; False where the loop was closed."""
    if running_loop() is loop:
        function(*args)
        return True
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread, if it runs one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def check_loop() -> None:
    """Refuse to go on where no event loop of asyncio runs: under trio, or outside any loop."""
    if running_loop() is None:
        raise RuntimeError("openai_eval_client runs on asyncio, and no event loop of asyncio runs here")


def resolve(waiter: asyncio.Future[Any], outcome: object = None) -> bool:
    """Wake a waiter with a result, or an exception to raise; False where it was cancelled meanwhile."""
    if waiter.done():
        return False
    if isinstance(outcome, Exception):
        waiter.set_exception(outcome)
        waiter.exception()  # retrieved: what waits may be cancelled in the same turn
    else:
        waiter.set_result(outcome)
    return True


@dataclass(slots=True, eq=False, kw_only=True)
class Queued:
    """What may have to wait in a `FairQueue`."""

    future: Any = None  # of the event loop that it waits on
    waits: bool = False  # set to False, it is passed over

    def wake(self, outcome: object = None) -> bool:
        """Resolve its future, on its own loop; False where that was closed."""
        return call_on(self.future.get_loop(), resolve, self.future, outcome)


Q = TypeVar("Q", bound=Queued)


class FairQueue(list[tuple[int, int, Q]]):
    """A heap of what waits, on any event loop; what waits no more stays until it is first."""

    def add(self, turn: int, waiter: Q) -> None:
        """Put it at its place: the lowest turn goes first."""
        waiter.waits = True
        heapq.heappush(self, (turn, id(waiter), waiter))  # turns may be equal

    def first(self) -> Q | None:
        """Return what goes next; None where nothing waits."""
        while self and not self[0][-1].waits:
            heapq.heappop(self)
        return self[0][-1] if self else None

    def waiting(self) -> list[Q]:
        """Return all that wait, in order."""
        return [waiter for *_, waiter in sorted(self) if waiter.waits]


_WAVE = 32  # requests that start in one turn of an event loop, as long as none has to wait for the next
_AT_A_TIME = 8  # requests that start in one turn after having waited


class StartThrottle:
    """Lets admitted requests start in order, a few in each turn of their event loop.

    A loop that starts hundreds of requests in one turn reads no answer meanwhile, and may read all of theirs
    in one turn again. What all of them need would be alive at once, again and again, and cost the garbage
    collector more than anything else: a quarter of the CPU with 1,000 in flight.
    """

    def __init__(self) -> None:
        # a loop's next callback keeps an entry that has more to do; a closed loop lets go of it
        self._by_loop: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, _LoopStarts]
        self._by_loop = weakref.WeakValueDictionary()

    def now_or_later(self) -> asyncio.Future[None] | None:
        """Return what a request on the running loop has to wait for; None where it may start in this turn."""
        loop = asyncio.get_running_loop()
        starts = self._of(loop)
        if not starts.later and starts.started < _WAVE:
            starts.started += 1
            return None
        waiter = loop.create_future()
        starts.later.append(waiter)
        return waiter

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Wake a waiter of the running loop in one of the loop's next turns."""
        self._of(waiter.get_loop()).later.append(waiter)

    def _of(self, loop: asyncio.AbstractEventLoop) -> _LoopStarts:
        """Return the loop's entry, with its next turn scheduled."""
        starts = self._by_loop.get(loop)
        if starts is None:
            starts = self._by_loop[loop] = _LoopStarts(loop)
        starts.schedule()
        return starts


class _LoopStarts:
    """What starts on one event loop, in this turn and later."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.later: deque[asyncio.Future[None]] = deque()
        self.started = 0  # in this turn
        self._is_scheduled = False

    def schedule(self) -> None:
        """Have the loop begin the next turn, if it is not going to."""
        if not self._is_scheduled:
            self._loop.call_soon(self._next_turn)
            self._is_scheduled = True

    def _next_turn(self) -> None:
        try:
            self._is_scheduled, self.started, woken = False, 0, 0
            while self.later and woken < _AT_A_TIME:
                if resolve(self.later.popleft()):
                    woken, self.started = woken + 1, _WAVE  # a newcomer does not pass them
        finally:
            if self.started or self.later:
                self.schedule()


class ForkAware(Protocol):
    """Holds something that a forked child cannot share."""

    def before_fork(self) -> None:
        """Let go of it, and keep other threads from taking it until the fork is over."""
        return  # by default nothing

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Go on, in the parent or in the child."""


_LOCK = threading.RLock()  # held during a fork: no object is added meanwhile
_NUMBERS = itertools.count()
_PREPARED: list[ForkAware] = []  # for the fork that is going on


def mind_forks(thing: ForkAware) -> None:
    """Call an object's `before_fork` and `after_fork` at every fork for as long as it lives.

    The latest object is the first, so that of two locks that one thread takes together the outer one has to
    be the later one.
    """
    with _LOCK:
        _fork_aware()[next(_NUMBERS)] = thing


@functools.cache
def _fork_aware() -> weakref.WeakValueDictionary[int, ForkAware]:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before,
            after_in_parent=functools.partial(_after, child=False),
            after_in_child=functools.partial(_after, child=True),
        )
    return weakref.WeakValueDictionary()


def _before() -> None:
    _LOCK.acquire()
    _PREPARED.extend(thing for _, thing in sorted(_fork_aware().items(), reverse=True))
    for thing in _PREPARED:
        thing.before_fork()


def _after(*, child: bool) -> None:
    for thing in _PREPARED:
        thing.after_fork(child=child)
    _PREPARED.clear()
    _LOCK.release()


class DeferringLock(ForkAware):
    """A lock for state that collected objects hand something back to; forks wait for it.

    The garbage collector and signal handlers may run anywhere, also inside a locked region of the same
    thread. What a collected stream or coroutine wants done then waits until that region is left: it neither
    deadlocks nor sees the state half changed.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0  # how many regions the thread that holds the lock is in, each within the one before
        self._later: deque[Callable[[], None]] = deque()
        mind_forks(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        try:
            while self._later and self._depth == 1:
                self._later.popleft()()
        finally:
            self._depth -= 1
            self._lock.release()

    def when_free(self, action: Callable[[], None]) -> None:
        """Call `action` under the lock: now, or when this thread leaves the region that it is in."""
        with self:
            self._later.append(action)

    def before_fork(self) -> None:
        """Take the lock: a child could not leave a region that another thread is in."""
        self.__enter__()

    def after_fork(self, *, child: bool) -> None:  # noqa: ARG002  # the same on both sides
        """Leave it again."""
        self.__exit__()


# Round the limits, budgets and statistics of all clients. A collected stream may hand something back to any
# of them, so with a lock for each, two threads could wait for one another's.
STATE_LOCK = DeferringLock()


_LINGER = 0.1  # seconds an idle thread waits for more jobs, and thereby at most delays the interpreter's end


class Background(ForkAware):
    """Does jobs in groups on one thread, which ends when it has had nothing to do for a moment."""

    def __init__(self, name: str, work: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._name = name
        self._work = work  # returns an outcome for each job; one that is an exception is raised
        self._reset()
        mind_forks(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._thread: threading.Thread | None = None
        self._linger = _LINGER

    async def do(self, job: Any) -> Any:
        """Have one job done and return its outcome; cancelling the wait does not cancel the job."""
        outcome = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name)
                self._thread.start()
            self._waiting.append((job, outcome))
            self._changed.notify()
        return await outcome

    def finish(self) -> None:
        """Wait until all jobs are done and the thread has ended."""
        with self._changed:
            self._linger = 0.0
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Forget thread and jobs in the child; they go on in the parent."""
        if child:
            self._reset()

    def _run(self) -> None:
        while group := self._next_group():
            try:
                outcomes = self._work([job for job, _ in group])
            except Exception as error:  # noqa: BLE001  # raised where each job was asked for
                outcomes = [error] * len(group)
            by_loop = defaultdict(list)
            for (_, waiter), outcome in zip(group, outcomes, strict=True):
                by_loop[waiter.get_loop()].append((waiter, outcome))
            for loop, pairs in by_loop.items():
                call_on(loop, lambda pairs: [resolve(*pair) for pair in pairs], pairs)

    def _next_group(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        with self._changed:
            if not self._waiting:
                self._changed.wait(self._linger)
            group, self._waiting = self._waiting, []
            if not group:
                self._thread = None
            return group


@contextlib.contextmanager
def replacing(name: str) -> Iterator[IO[bytes]]:
    """Open a file that takes its name, and its mode, once all is written: until then, what is there stays."""
    path = Path(name).resolve()
    is_special = path.exists() and not path.is_file()
    target = path if is_special else path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.part")
    try:
        mode = stat.S_IMODE(path.stat().st_mode) & 0o777 if path.is_file() else None
        if not is_special:
            target.touch(0o666 if mode is None else 0o600, exist_ok=False)  # nobody else reads it before
        file = target.open("wb")
    except OSError as error:
        error.filename = name
        raise
    try:
        with file:
            yield file
        if mode is not None:
            with contextlib.suppress(OSError):  # some file systems have no modes
                target.chmod(mode)
        if not is_special:
            target.replace(path)
    finally:
        if not is_special:
            target.unlink(missing_ok=True)


_NO_LOCK = "in the place of a lock file is something else"


class FileLock(ForkAware):
    """The operating system's lock on a file made for it: `async with` waits for it without blocking the loop.

    Processes, threads and tasks exclude one another alike. The file is removed when the lock is released.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None  # open while the lock is waited for or held
        mind_forks(self)

    async def __aenter__(self) -> Self:
        if not self._take(wait=False):
            taken: concurrent.futures.Future[None] = concurrent.futures.Future()
            taken.set_running_or_notify_cancel()  # from here on, no cancelled wait can cancel it
            # nothing interrupts the thread, so it is a daemon: the interpreter's end does not wait for it
            threading.Thread(target=self._wait, args=(taken,), name="file lock", daemon=True).start()
            try:
                await asyncio.wrap_future(taken)
            except BaseException:
                taken.add_done_callback(lambda _: self._release())
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Close the child's copy of the file, which would hold the lock beyond the parent's end."""
        if child:
            self._close()

    def _wait(self, taken: concurrent.futures.Future[None]) -> None:
        try:
            while not self._take(wait=True):
                pass  # the lock was that of a file removed by its last holder: the next is on a new one
        except OSError as error:
            taken.set_exception(error)
        else:
            taken.set_result(None)

    def _take(self, *, wait: bool) -> bool:
        taken = False
        flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        self._file = file = os.open(self._path, flags, 0o600)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_size:  # it would be changed, and removed
                raise FileExistsError(errno.EEXIST, _NO_LOCK, str(self._path))
            if hasattr(os, "fchmod"):
                os.fchmod(file, 0o600)  # whatever the umask
            if _lock(file, wait=wait):
                with contextlib.suppress(FileNotFoundError):  # the last holder has removed the file
                    taken = os.path.samestat(os.fstat(file), self._path.stat())
        finally:
            if not taken:
                self._close()
        return taken

    def _release(self) -> None:
        if self._file is None:  # in a forked child, or where waiting failed
            return
        with contextlib.suppress(OSError):  # where an open file cannot be removed, it stays
            self._path.unlink()
        _unlock(self._file)
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


if sys.platform == "win32":
    import msvcrt

    def _lock(file: int, *, wait: bool) -> bool:
        try:
            msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:  # LK_LOCK waits for 10 seconds at most
            return False
        return True

    def _unlock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: int, *, wait: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
