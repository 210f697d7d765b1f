"""The way to the shared stated: one connection and one thread for each client, whatever its event loops."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path  # typer reads the annotations
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from openai_eval_client._limits import buckets
from openai_eval_client._limits.buckets import ROUNDING, UNLIMITED
from openai_eval_client._limits.shared import ALIVE_SECONDS
from openai_eval_client._log import warn
from openai_eval_client._runtime import mind_forks
from openai_eval_client.config import without_password
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from openai_eval_client.config import RateLimitConfig


try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as missing:  # pragma: no cover  # the suite installs it
    raise ImportError("redis_url needs redis: pip install 'openai-eval-client[redis]'") from missing

_GONE = "%s is gone (%s): going on with 1/%d of the limits"
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 1.0  # a Redis that takes longer counts as gone
_CONSTANTS = {
    "ALIVE_SECONDS": ALIVE_SECONDS,
    "ROUNDING": ROUNDING,
    "UNLIMITED": UNLIMITED,
    **{name: value for name, value in vars(buckets).items() if isinstance(value, float)},
}


def script() -> str:
    """Return the script that asks and tells, with the constants that it shares with `buckets.py`."""
    constants = "".join(f"local {name} = {value!r}\n" for name, value in _CONSTANTS.items())
    return constants + Path(__file__).with_name("shared.lua").read_text("utf-8")


class RedisBackend:
    """Asks and tells the shared stated of one account."""

    def __init__(self, config: RateLimitConfig, account: Iterable[str | None]) -> None:
        self._url = str(config.redis_url)
        self._namespace = config.namespace
        self._account = [part or "" for part in account]
        self.generation = 0
        self.workers = 0
        self._begin()
        mind_forks(self)

    def _begin(self) -> None:
        self._worker = uuid.uuid4().hex
        self._down = False
        self._replying = threading.Lock()
        self._client = self._connected(redis.Redis)
        self._thread = ThreadPoolExecutor(1, "openai-eval-client-redis")

    def _connected(self, kind: Any) -> Any:
        """Return a client, which connects when it is used."""
        options = {"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": CONNECT_SECONDS}
        try:
            client = kind.from_url(self._url, retry=Retry(NoBackoff(), 0), **options)
        except ValueError as error:
            raise self._unusable(error) from None
        self._script = client.register_script(script())
        return client

    def ask(self, model: str, told: dict[str, Any], done: Callable[[Any], None]) -> None:
        """Ask and tell; `done` is called with the reply or the exception, on the thread."""
        self._thread.submit(self._ask, model, told, done)

    def leave(self, told: Mapping[str, dict[str, Any]]) -> None:
        """Tell the last, by model, and close the connection; only the interpreter's end waits for it."""
        for model, last in told.items():
            self._thread.submit(self._exchange, model, last)
        self._thread.submit(self._client.close)

    def before_fork(self) -> None:
        """Let what is being told be heard: a child cannot leave the lock that our thread is in."""
        self._replying.acquire()

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Be another worker in the child, with a connection of its own; the parent's goes on."""
        self._replying.release()
        if child:
            self.generation += 1
            self._begin()

    def _ask(self, model: str, told: dict[str, Any], done: Callable[[Any], None]) -> None:
        reply = self._exchange(model, told)
        with self._replying:
            done(reply)

    def _exchange(self, model: str, told: dict[str, Any]) -> Sequence[float] | Exception:
        try:
            reply = self._run(self._keys(model), json.dumps({**told, "worker": self._worker}))
        except Exception as error:  # noqa: BLE001  # of a cluster, not even RedisError; a queue waits for a word
            self._note(error)
            return self._unusable(error)
        self._note(None)
        return reply

    def _run(self, keys: list[str], told: str) -> Sequence[float]:
        try:
            reply = self._script(keys, [told])
        except redis.ResponseError as error:
            if not isinstance(error, redis.exceptions.MovedError) and not str(error).startswith("MOVED"):
                raise
            # it is one node of a cluster, which keeps each stated whole
            self._client = self._connected(redis.RedisCluster)
            reply = self._script(keys, [told])
        return [float(number) for number in reply]

    def _keys(self, model: str) -> list[str]:
        """Return the two keys of a model's stated, which a cluster keeps in one place."""
        digest = hashlib.sha256("\0".join([*self._account, model]).encode()).hexdigest()[:32]
        return [f"{{{self._namespace}:{digest}}}:{part}" for part in ("stated", "workers")]

    def _note(self, error: Exception | None) -> None:
        """Log once that the shared stated is gone, and once that it is back."""
        if error is not None and self.workers and not self._down:
            where, share = without_password(self._url), self.workers
            warn(_GONE, where, self._said(error), share, event="redis_lost", workers=share)
        elif error is None and self._down:
            warn("%s is back: sharing the limits again", without_password(self._url), event="redis_back")
        self._down = error is not None and bool(self.workers)

    def _unusable(self, error: Exception) -> ValidationError:
        shown = without_password(self._url)
        message = f"redis_url={shown!r}: no Redis can be used there: {self._said(error)}"
        return ValidationError(message, field="redis_url")

    def _said(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        for secret in self._secrets():
            text = text.replace(secret, "***")
        return text

    def _secrets(self) -> list[str]:
        parts = urlsplit(self._url)
        given = [parts.password, *(value for _, value in parse_qsl(parts.query))]
        return [form for secret in given if secret for form in (secret, unquote(secret))]
