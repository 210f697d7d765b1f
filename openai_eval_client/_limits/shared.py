"""Limits shared by several processes and machines, through a Redis."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import threading
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from openai_eval_client._limits import buckets
from openai_eval_client._limits.queue import ModelQueue, Waiter
from openai_eval_client._log import warn
from openai_eval_client._runtime import mind_forks
from openai_eval_client._wire import DIMENSIONS
from openai_eval_client.config import without_password
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    from openai_eval_client._limits.buckets import Clock
    from openai_eval_client._limits.queue import Position
    from openai_eval_client._wire import Outcome, StatedLimit
    from openai_eval_client.config import RateLimitConfig

    Replied = Callable[["SharedModelQueue", Any], None]

try:
    import redis
except ImportError as missing:  # pragma: no cover  # the suite installs it
    raise ImportError("redis_url needs redis: pip install 'openai-eval-client[redis]'") from missing

_CONNECT_SECONDS = 3.0
_ANSWER_SECONDS = 1.0  # a Redis that takes longer counts as gone
ALIVE_SECONDS = 10.0  # a worker that waits and sent no message for so long is gone


def script() -> str:
    """Return `shared.lua` with the constants that it has from Python."""
    shared = {"ALIVE_SECONDS": ALIVE_SECONDS, **vars(buckets)}
    floats = {name: value for name, value in shared.items() if isinstance(value, float)}
    constants = "".join(f"local {name} = {value!r}\n" for name, value in floats.items())
    return constants + Path(__file__).with_name("shared.lua").read_text("utf-8")


class RedisBackend:
    """Exchanges messages with the shared state of one account: one connection and one thread for a client."""

    def __init__(self, config: RateLimitConfig, account: Iterable[str | None]) -> None:
        self._url = str(config.redis_url)
        self._shown_url = without_password(self._url)
        self._namespace = config.namespace
        self._account = [part or "" for part in account]
        self.generation = 0  # another number in a forked child, which has to ask for itself
        self.workers = 0  # how many were alive at the latest reply to any queue; 0: there was none yet
        self._replying = threading.Lock()
        self._begin()
        mind_forks(self)

    def _begin(self) -> None:
        self._worker = uuid.uuid4().hex
        self._down = False
        self._connect(redis.Redis)
        self._thread = ThreadPoolExecutor(1, "openai-eval-client-redis")

    def _connect(self, kind: Any) -> None:
        """Make a client, which connects when it is used."""
        options = {"socket_timeout": _ANSWER_SECONDS, "socket_connect_timeout": _CONNECT_SECONDS}
        retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        try:
            self._client = kind.from_url(self._url, retry=retry, **options)
        except ValueError as error:
            raise self._unusable(error) from None
        self._script = self._client.register_script(script())

    def ask(self, model: str, message: dict[str, Any], done: Callable[[Any], object]) -> None:
        """Send a message; `done` is called with the reply or the exception, on the thread."""
        self._thread.submit(self._ask, model, message, done)

    def close(self) -> None:
        """Close the connection once all messages are sent, without waiting for it."""
        self._thread.submit(self._client.close)

    def before_fork(self) -> None:
        """Wait for the reply that is being taken: a child could not leave the lock that this thread holds."""
        self._replying.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Be another worker in the child, with a connection of its own; the parent's goes on."""
        self._replying.release()
        if child:
            self.generation += 1
            self._begin()

    def _ask(self, model: str, message: dict[str, Any], done: Callable[[Any], object]) -> None:
        reply: Any
        digest = hashlib.sha256("\0".join([*self._account, model]).encode()).hexdigest()[:32]
        # a cluster keeps both on one node, for what is in braces
        keys = [f"{{{self._namespace}:{digest}}}:{part}" for part in ("state", "workers")]
        try:
            reply = self._run(keys, json.dumps({**message, "worker": self._worker}))
            self._log_change(None)
        except Exception as error:  # noqa: BLE001  # of a cluster, not even RedisError; a queue waits for the reply
            self._log_change(error)
            reply = self._unusable(error)
        with self._replying:
            done(reply)

    def _run(self, keys: list[str], message: str) -> Sequence[float]:
        try:
            reply = self._script(keys, [message])
        except redis.ResponseError as error:
            if not isinstance(error, redis.exceptions.MovedError) and not str(error).startswith("MOVED"):
                raise
            # it is one node of a cluster, which keeps each state whole
            self._connect(redis.RedisCluster)
            reply = self._script(keys, [message])
        return [float(number) for number in reply]

    def _log_change(self, error: Exception | None) -> None:
        """Log once that the shared state is gone, and once that it is back."""
        was_down, self._down = self._down, error is not None and self.workers > 0
        if error is not None and self._down and not was_down:
            text, share = "%s is gone (%s): going on with 1/%d of the limits", self.workers
            warn(text, self._shown_url, self._text(error), share, event="redis_lost", workers=share)
        elif error is None and was_down:
            warn("%s is back: sharing the limits again", self._shown_url, event="redis_back")

    def _unusable(self, error: Exception) -> ValidationError:
        message = f"redis_url={self._shown_url!r}: no Redis can be used there: {self._text(error)}"
        return ValidationError(message, field="redis_url")

    def _text(self, error: Exception) -> str:
        """Return an error's text, without what is secret in the URL."""
        parts = urlsplit(self._url)
        text = f"{type(error).__name__}: {error}"
        for secret in filter(None, [parts.password, *(value for _, value in parse_qsl(parts.query))]):
            text = text.replace(secret, "***").replace(unquote(secret), "***")
        return text


class SharedBucket(NamedTuple):
    """One bucket as of a reply."""

    released: float  # units in all
    rate: float  # units per second
    size: float  # units


class SharedQuota(NamedTuple):
    """One dimension as of a reply."""

    reserved: float  # before the waiters of this reply
    buckets: tuple[SharedBucket, SharedBucket]  # the configured one and the server's
    stated: bool  # the server's headers state its limit


class SharedSnapshot(NamedTuple):
    """The shared state as of one reply."""

    at: float  # clock time at which it came
    epoch: float  # when the shared state began: another one knows nothing of the positions in this one
    age: float  # seconds since then
    workers: int  # how many are alive
    reserved: int  # how many of the waiters asked for have a position
    pause: float  # seconds from `at` for which the server asked that nothing be sent
    quotas: tuple[SharedQuota, ...]

    @classmethod
    def read(cls, reply: Sequence[float], at: float) -> SharedSnapshot:
        """Read a reply that came at that clock time."""
        epoch, age, workers, reserved, pause = reply[:5]
        quotas = tuple(
            SharedQuota(before, (SharedBucket(*numbers[:3]), SharedBucket(*numbers[3:])), bool(stated))
            for before, *numbers, stated in (reply[5:13], reply[13:])
        )
        return cls(at, epoch, age, int(workers), int(reserved), max(pause, 0.0), quotas)

    def ready_in(self, position: Position, tokens: float, now: float) -> tuple[float, str]:
        """Return the seconds until what was reserved at a position may go, and what it waits for."""
        waits = [(self.pause, "pause")]
        dimensions = zip(DIMENSIONS, self.quotas, position, (1, tokens), strict=True)
        for dimension, quota, before, amount in dimensions:
            for bucket in quota.buckets:
                missing = before + min(amount, bucket.size) - bucket.released
                waits.append((missing / bucket.rate, dimension))
        wait, cause = max(waits)
        return self.at + wait - now, cause

    def rate_and_left(self, number: int, reserved: float, now: float) -> tuple[float, float]:
        """Return the rate of one dimension, and what is left of it now, as far as that is known."""
        both, seconds, left = self.quotas[number].buckets, now - self.at, 0.0
        if seconds <= ALIVE_SECONDS:  # else other workers may have reserved any amount since
            left = min(min(b.released + b.rate * seconds - reserved, b.size) for b in both)
        return min(bucket.rate for bucket in both), max(left, 0.0)


class PendingUpdates:
    """What happened since the worker's latest message."""

    def __init__(self) -> None:
        self.urgent = False
        # requests and tokens "spent" without a position, of "credit", of "debt", and "served"
        self.sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        # by dimension: when the newest of the answered requests was sent, and what its headers state
        self.stated: dict[int, tuple[float, dict[str, float]]] = {}
        self.cancelled: list[tuple[float, float, float]] = []  # position and tokens of each
        self.refusals: list[dict[str, float]] = []
        self.pause_until = 0.0  # clock time

    def __bool__(self) -> bool:
        return bool(self.sums or self.cancelled or self.stated or self.refusals or self.pause_until)

    def add(self, what: str, requests: float, tokens: float) -> None:
        """Add to one of the sums."""
        sums = self.sums[what]
        sums[0] += requests
        sums[1] += tokens

    def message(self, now: float) -> dict[str, Any]:
        """Return all of it as `shared.lua` reads it; times become ages in seconds."""
        return {
            **self.sums,
            "stated": [{**numbers, "age": max(now - at, 0.0)} for at, numbers in self.stated.values()],
            "cancelled": self.cancelled,
            "refusals": self.refusals,
            "pause": max(self.pause_until - now, 0.0),
        }


_BEAT_SECONDS = 3.0  # between two messages of a worker that waits, which learns what has changed, at most
_YOUNG_SECONDS, _YOUNG_BEAT = 10.0, 0.25  # likewise while the state is young: much is learned then
_REPORT_SECONDS = 1.0  # the longest that updates wait for a message to travel with
_RETRY_SECONDS = 0.25  # after the shared state was lost, doubled from try to try up to the next
_MAX_RETRY_SECONDS = 5.0
_MAX_WANTED = 16  # waiters in one message: also while there is plenty, workers take turns
_KEEP_SECONDS = 3600.0  # for which an idle state is kept at least; then its buckets are full


class SharedModelQueue(ModelQueue):
    """The queue of one model for all workers; its own quotas are kept up too, for when it is alone."""

    def __init__(
        self, model: str, config: RateLimitConfig, clock: Clock, backend: RedisBackend, replied: Replied
    ) -> None:
        super().__init__(model, config, clock)
        self._backend = backend
        self._replied = functools.partial(replied, self)
        self._config = config
        self._largest = 0.0  # tokens reserved at once
        self._reset()

    def _reset(self) -> None:
        """Know nothing of the shared state, as at first."""
        self._generation, self._alone = self._backend.generation, False
        self._snapshot: SharedSnapshot | None = None
        self._next_position: Position = (0.0, 0.0)
        self._positions: dict[Waiter, Position] = {}  # of those that wait, in order
        self._wanted: list[Waiter] | None = None  # those asked for; None: no reply is awaited
        self._pending = self._reported = PendingUpdates()
        self._granted_at = self._asked_at = float("-inf")
        self._retry_at, self._retry_seconds = 0.0, _RETRY_SECONDS

    def try_grant(self, waiter: Waiter) -> bool:
        """Grant a new waiter at once, where this worker is alone."""
        return self._alone and super().try_grant(waiter)

    def grant_next(self) -> Waiter | None:
        """Grant the waiter whose turn it is, if it can go now; otherwise see whether to send a message."""
        if self._generation != self._backend.generation:
            self._reset()
        waiter = super().grant_next()
        if waiter is None:
            self._exchange()
        return waiter

    def next_in(self) -> float | None:
        """Return the seconds until there is something to do; None where a reply or an answer tells."""
        now, delay = self._clock.time(), super().next_in()
        if self._alone:
            return max(self._retry_at - now, 0.0) if delay is None else min(delay, self._retry_at - now)
        if delay is None or self._wanted is not None:
            return delay
        return min(delay, max(self._next_beat() - now, 0.0))

    def cancel(self, waiter: Waiter) -> None:
        """Take back a waiter that was not sent, and what is reserved for it."""
        position = waiter.position if waiter.granted else self._positions.pop(waiter, None)
        if position is not None:
            self._pending.cancelled.append((*position, waiter.tokens))
        elif waiter.granted:
            self._pending.add("spent", -1, -waiter.tokens)
        super().cancel(waiter)

    def settle(self, waiter: Waiter, outcome: Outcome) -> None:
        """Free the waiter's slot, replace its estimate by what it took, and learn from that."""
        super().settle(waiter, outcome)
        reserved, taken = waiter.tokens, outcome.tokens
        if waiter.position is None:
            return
        if taken is not None and taken != reserved:
            self._pending.add("credit", 0, reserved - taken)
            if taken > reserved:
                self._pending.add("debt", 0, taken - reserved)
        if outcome.ok:
            self._pending.add("served", 1, reserved)
        elif outcome.is_refusal and not outcome.is_rate_limit:
            self._pending.add("debt", 0, -reserved)

    def refused(self, waiter: Waiter, dimension: str | None, wait: float, stated: Container[str]) -> None:
        """Learn that the server had no room for this waiter."""
        super().refused(waiter, dimension, wait, stated)
        if waiter.position is None:
            return
        for number, (name, amount) in enumerate(zip(DIMENSIONS, (1, waiter.tokens), strict=True)):
            if dimension in {None, name}:
                refusal = {"quota": number + 1, "amount": amount, "wait": wait, "stated": name in stated}
                self._pending.refusals.append({**refusal, "position": waiter.position[number] + amount})
                self._pending.urgent = True

    def is_news(self, waiter: Waiter) -> bool:  # noqa: ARG002  # whichever it is
        """Return whether the headers of an answer are worth reading: the shared state decides that."""
        return True

    def update_from_headers(self, waiter: Waiter, stated: Mapping[str, StatedLimit]) -> None:
        """Take over the limits that the headers of the answer to this waiter state."""
        super().update_from_headers(waiter, stated)
        if waiter.position is None or self._snapshot is None or not self._config.adaptive_throttling:
            return
        for number, (name, sent) in enumerate(zip(DIMENSIONS, waiter.sent, strict=True)):
            if (limit := stated.get(name)) is None:
                continue
            self._pending.urgent |= not self._snapshot.quotas[number].stated
            rate, size = self._quotas[name].server.rate_and_size(limit, sent)
            newest, _ = self._pending.stated.get(number, (0.0, {}))
            if newest <= waiter.granted_at:
                numbers = {"quota": number + 1, "rate": rate, "size": size, "left": limit.remaining}
                numbers["position"] = waiter.position[number] + sent.amount
                self._pending.stated[number] = waiter.granted_at, numbers

    def pause(self, seconds: float) -> None:
        """Grant nothing for that long, as the server asked."""
        super().pause(seconds)
        self._pending.pause_until, self._pending.urgent = self._paused_until, True

    def take(self, outcome: Any) -> Exception | None:
        """Take over a reply; after an error go on alone, or return it where this worker cannot even begin."""
        wanted, self._wanted = self._wanted or [], None
        if isinstance(outcome, Exception):
            return self._go_alone(outcome)
        snapshot = SharedSnapshot.read(outcome, self._clock.time())
        if self._alone:
            self._alone = False
            self.requests.use_whole()
            self.tokens.use_whole()
        if self._snapshot is not None and self._snapshot.epoch != snapshot.epoch:
            self._positions.clear()  # of a state that is no more
        self._snapshot, self._backend.workers = snapshot, snapshot.workers
        self._next_position = snapshot.quotas[0].reserved, snapshot.quotas[1].reserved
        self._paused_until = max(self._paused_until, snapshot.at + snapshot.pause)
        for waiter in wanted[: snapshot.reserved]:
            requests, tokens = position = self._next_position
            self._next_position = requests + 1, tokens + waiter.tokens
            self._largest = max(self._largest, waiter.tokens)
            if waiter.waits:
                self._positions[waiter] = position
            else:  # it was cancelled meanwhile, and gives the position back
                self._pending.cancelled.append((*position, waiter.tokens))
        return None

    def leave(self) -> None:
        """Send the last message to the shared state, if that knows of this worker."""
        if self._snapshot is None or self._alone:
            return
        for waiter, position in self._positions.items():
            self._pending.cancelled.append((*position, waiter.tokens))
        self._backend.ask(str(self.model), {**self._message([]), "leaving": True}, lambda _: None)

    def _next(self) -> Waiter | None:
        """Return the first waiter with a position, among those with room in their concurrency limit."""
        if self._alone:
            return super()._next()
        return next((w for w in self._positions if w.concurrency.in_flight < w.concurrency.limit), None)

    def _ready_in(self, waiter: Waiter) -> tuple[float, str]:
        position = None if self._alone else self._positions.get(waiter)
        if position is None or self._snapshot is None:
            return super()._ready_in(waiter)
        delay, cause = self._snapshot.ready_in(position, waiter.tokens, self._clock.time())
        return max(delay, self.pause_left()), cause

    def _grant(self, waiter: Waiter) -> None:
        super()._grant(waiter)
        self._granted_at = waiter.granted_at
        waiter.position = self._positions.pop(waiter, None)
        if waiter.position is None:
            self._pending.add("spent", 1, waiter.tokens)

    def _exchange(self) -> None:
        """Ask for positions, or send the updates, if it is time to."""
        now = self._clock.time()
        if self._wanted is not None or (self._alone and now < self._retry_at):
            return
        wanted = [] if self._alone or self._positions else self._without_position()
        beat = self._positions and now >= self._next_beat()
        report = self._pending and (self._pending.urgent or now - self._asked_at >= _REPORT_SECONDS)
        if wanted or beat or report or self._alone:
            self._wanted, self._asked_at = wanted, now
            self._backend.ask(str(self.model), self._message(wanted), self._replied)

    def _next_beat(self) -> float:
        """Return the clock time at which a worker that waits sends its next message."""
        young = self._snapshot is not None and self._snapshot.age < _YOUNG_SECONDS
        return self._asked_at + (_YOUNG_BEAT if young else _BEAT_SECONDS)

    def _without_position(self) -> list[Waiter]:
        """Return those that would go next if there were no quotas, in the order of their turns."""
        able: list[Waiter] = []
        for limit in self._limits_in_use():
            if limit.first() is not None:
                room = int(min(limit.limit - limit.in_flight, _MAX_WANTED))
                able += limit.queue.waiting()[:room]
        return sorted(able, key=lambda waiter: waiter.turn)[:_MAX_WANTED]

    def _message(self, wanted: Sequence[Waiter]) -> dict[str, Any]:
        now = self._clock.time()
        # after that long its buckets are full again: it need not say from which state it has reserved
        spends = now - self._granted_at <= self._config.burst_seconds
        configured = [quota.whole for quota in self._quotas.values()]
        self._reported, self._pending = self._pending, PendingUpdates()
        return {
            **self._reported.message(now),
            "epoch": self._snapshot.epoch if self._snapshot is not None and spends else 0,
            "rates": [bucket.rate for bucket in configured],
            "sizes": [bucket.max_rate for bucket in configured],
            "adaptive": self._config.adaptive_throttling,
            "expire": round(max(_KEEP_SECONDS, 2 * self._config.burst_seconds)),
            "wanted": [waiter.tokens for waiter in wanted],
        }

    def _go_alone(self, error: Exception) -> Exception | None:
        """Go on alone with a part of what was last known; return the error where nothing is."""
        if not self._backend.workers:
            return error
        now = self._clock.time()
        if self._alone:
            self._pending.add("spent", *self._reported.sums["spent"])  # it has still not been received
        else:
            self._alone, self._retry_seconds = True, _RETRY_SECONDS
            self._positions.clear()
            self._pending = PendingUpdates()
            # keep to this worker's part of each quota
            workers, smallest = self._backend.workers, (1.0, self._largest)
            for number, quota in enumerate(self._quotas.values()):
                rate, left = quota.whole.rate, 0.0
                if self._snapshot is not None:
                    rate, left = self._snapshot.rate_and_left(number, self._next_position[number], now)
                quota.use_share(rate / workers, left / workers, smallest=smallest[number])
        self._retry_at = now + self._retry_seconds * random.uniform(0.5, 1)  # noqa: S311  # not all at once
        self._retry_seconds = min(2 * self._retry_seconds, _MAX_RETRY_SECONDS)
        return None
