"""One dimension of a model's limit: requests, or tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from openai_eval_client._belief import Belief
from openai_eval_client._bucket import MINUTE, Bucket

if TYPE_CHECKING:
    from openai_eval_client._belief import Mark
    from openai_eval_client._bucket import Clock
    from openai_eval_client._headers import Quota
    from openai_eval_client.config import RateLimitConfig

MARGIN = 0.25  # seconds of quota left unused: requests travel at different speeds, so some arrive early
MARGIN_SHARE = 0.1  # of the bucket, at most
UNLIMITED = 1e12  # units per second, for who needs a number: more than any limit
UNLIMITED_SHARE = UNLIMITED / 10_000  # so much is a part of it, however many share


class Limit(NamedTuple):
    """What holds in one dimension.

    Attributes:
        configured: Units per minute that the user set; None: none.
        server: Units per minute that the server stated or its refusals taught; None: not known.
        burst: Units that a full bucket admits at once.
    """

    configured: float | None
    server: float | None
    burst: float

    @property
    def per_minute(self) -> float | None:
        """The lower of both; None where neither is known."""
        return min((value for value in (self.configured, self.server) if value is not None), default=None)


class Budget:
    """One dimension of a model's limit: what the user configured, and what the server is believed to keep.

    An estimate that was too high is given back to the configured bucket only: servers that charge
    `max_tokens` up front do not give it back.

    Args:
        per_minute: The configured limit; None: only what the server is believed to keep.
        config: How long its bucket is, and whether to heed the server at all.
        clock: Where the time comes from.
        metered: Whether there is any limit at all.
    """

    def __init__(
        self, per_minute: int | None, config: RateLimitConfig, clock: Clock, *, metered: bool = True
    ) -> None:
        rate = per_minute / MINUTE if per_minute and metered else None
        margin = min(MARGIN, config.burst_seconds * MARGIN_SHARE)
        capacity = max((rate or 0.0) * (config.burst_seconds - margin), 1.0)
        self._whole = Bucket(rate, capacity, clock) if rate else None
        self._configured = self._whole
        self._server = Belief(rate, capacity, clock) if config.adaptive_throttling and metered else None
        self._clock = clock
        self._began: float | None = None
        self.spent = 0.0

    def limit(self) -> Limit:
        """Return what holds."""
        own, server = self._whole, self._server
        known = None if server is None else server.known_limit()
        theirs = server.bucket if server is not None and known is not None else None
        bursts = [bucket.max_rate for bucket in (own, theirs) if bucket is not None]
        return Limit(None if own is None else own.rate * MINUTE, known, min(bursts, default=0.0))

    @property
    def limit_rate(self) -> float:
        """The configured limit, in units per second; `UNLIMITED` where there is none."""
        return self._whole.rate if self._whole is not None else UNLIMITED

    @property
    def limit_size(self) -> float:
        """What the configured limit lets through at once, likewise."""
        return self._whole.max_rate if self._whole is not None else UNLIMITED

    def hold_to(self, rate: float, left: float, *, least: float) -> None:
        """Keep to a part of the limit for now.

        Args:
            rate: Units per second.
            left: Units to begin with.
            least: Units that its bucket has to hold, so that one request waits for all that it takes.
        """
        if rate < UNLIMITED_SHARE:
            size = max(rate * self.limit_size / self.limit_rate, least)
            self._configured = Bucket(rate, size, self._clock)
            self._configured.set_left(left)

    def let_go(self) -> None:
        """Go back to the whole limit."""
        self._configured = self._whole

    def stated(self, quota: Quota, mark: Mark | None) -> tuple[float, float]:
        """Return the rate and the size of the server's bucket, as an answer's headers state them."""
        assert self._server is not None  # noqa: S101  # asked only by who heeds the server
        assert mark is not None  # noqa: S101  # as is given out then
        return self._server.stated(quota, mark)

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` may be spent."""
        configured = self._configured.ready_in(amount) if self._configured is not None else 0.0
        return max(configured, self._server.ready_in(amount)) if self._server is not None else configured

    def too_small_for(self, amount: float, max_wait: float) -> int | None:
        """Return the limit per minute that can never admit `amount`; None where one can, or there is none.

        The server admits no more than its own limit at once. The configured one may be exceeded, at the
        cost of a debt that those behind wait for: up to `max_wait` seconds' worth.
        """
        server = self._server.limit if self._server is not None else None
        if server is not None and amount > server:
            return server
        bucket = self._whole
        if bucket is None or amount <= bucket.max_rate + bucket.rate * max_wait:
            return None
        return round(bucket.rate * MINUTE)

    def charge(self, amount: float) -> Mark | None:
        """Spend `amount`, or take the whole of it back where negative."""
        self._began = self._clock.time() if self._began is None else self._began
        self.spent += amount
        if self._configured is not None:
            self._configured.charge(amount)
        return self._server.charge(amount) if self._server is not None else None

    def settle(self, reserved: float, actual: float) -> None:
        """Replace what was reserved by what it came to."""
        if self._configured is not None:
            self._configured.charge(actual - reserved)
        if self._server is not None and actual > reserved:
            self._server.owe(actual - reserved)

    def give_back(self, amount: float) -> None:
        """Learn that what was reserved was refused for good, and so not spent."""
        if self._server is not None:
            self._server.give_back(amount)

    def used_share(self) -> float | None:
        """Return what was spent, as a share of a full bucket and its refill since the first request.

        None where no limit is known. It is what was reserved: servers charge that.
        """
        bucket = self._whole or (self._server.bucket if self._server is not None else None)
        if bucket is None or self._began is None:
            return None
        return self.spent / (bucket.max_rate + bucket.rate * (self._clock.time() - self._began))

    def passed(self, amount: float) -> None:
        """Learn that the server served what was reserved."""
        if self._server is not None:
            self._server.passed(amount)

    def refused(self, amount: float, mark: Mark | None, wait: float, *, spoke: bool) -> None:
        """Learn that this limit is why the server refused; it `spoke` if it said what is left."""
        if self._server is not None and mark is not None:
            self._server.refused(amount, mark, wait, spoke=spoke)
        elif self._configured is not None and amount > 0:  # after the wait, this one and then the rate
            self._configured.lower_to(amount - wait * self._configured.rate)

    def heeds(self, mark: Mark | None) -> bool:
        """Return whether an answer's headers would be heeded."""
        return self._server is not None and mark is not None and self._server.heeds(mark)

    def hear(self, quota: Quota, mark: Mark | None) -> None:
        """Heed an answer's headers."""
        if self._server is not None and mark is not None:
            self._server.hear(quota, mark)
