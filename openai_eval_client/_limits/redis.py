"""The way to the shared state: one connection and one thread for each client, whatever its event loops."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from openai_eval_client._limits import buckets
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

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 1.0  # a Redis that takes longer counts as gone


def script() -> str:
    """Return `shared.lua` with the constants that it has from Python."""
    shared = {"ALIVE_SECONDS": ALIVE_SECONDS, **vars(buckets)}
    floats = {name: value for name, value in shared.items() if isinstance(value, float)}
    constants = "".join(f"local {name} = {value!r}\n" for name, value in floats.items())
    return constants + Path(__file__).with_name("shared.lua").read_text("utf-8")


class RedisBackend:
    """Exchanges messages with the shared state of one account."""

    def __init__(self, config: RateLimitConfig, account: Iterable[str | None]) -> None:
        self._url = str(config.redis_url)
        self._shown_url = without_password(self._url)
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
        self._client = self._connect(redis.Redis)
        self._thread = ThreadPoolExecutor(1, "openai-eval-client-redis")

    def _connect(self, kind: Any) -> Any:
        """Return a client, which connects when it is used."""
        options = {"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": CONNECT_SECONDS}
        try:
            client = kind.from_url(self._url, retry=Retry(NoBackoff(), 0), **options)
        except ValueError as error:
            raise self._unusable(error) from None
        self._script = client.register_script(script())
        return client

    def ask(self, model: str, message: dict[str, Any], done: Callable[[Any], None]) -> None:
        """Send a message; `done` is called with the reply or the exception, on the thread."""
        self._thread.submit(self._ask, model, message, done)

    def leave(self, messages: Mapping[str, dict[str, Any]]) -> None:
        """Send the last messages, by model, and close the connection, without waiting for it."""
        for model, message in messages.items():
            self._thread.submit(self._ask, model, message, lambda _: None)
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

    def _ask(self, model: str, message: dict[str, Any], done: Callable[[Any], None]) -> None:
        reply: Any
        try:
            reply = self._run(self._keys(model), json.dumps({**message, "worker": self._worker}))
            self._note(None)
        except Exception as error:  # noqa: BLE001  # of a cluster, not even RedisError; a queue waits for the reply
            self._note(error)
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
            self._client = self._connect(redis.RedisCluster)
            reply = self._script(keys, [message])
        return [float(number) for number in reply]

    def _keys(self, model: str) -> list[str]:
        """Return the two keys of a model's limits, which a cluster keeps on one node."""
        digest = hashlib.sha256("\0".join([*self._account, model]).encode()).hexdigest()[:32]
        return [f"{{{self._namespace}:{digest}}}:{part}" for part in ("state", "workers")]

    def _note(self, error: Exception | None) -> None:
        """Log once that the shared state is gone, and once that it is back."""
        down = error is not None and self.workers > 0
        if error is not None and down and not self._down:
            text, share = "%s is gone (%s): going on with 1/%d of the limits", self.workers
            warn(text, self._shown_url, self._text(error), share, event="redis_lost", workers=share)
        elif error is None and self._down:
            warn("%s is back: sharing the limits again", self._shown_url, event="redis_back")
        self._down = down

    def _unusable(self, error: Exception) -> ValidationError:
        message = f"redis_url={self._shown_url!r}: no Redis can be used there: {self._text(error)}"
        return ValidationError(message, field="redis_url")

    def _text(self, error: Exception) -> str:
        """Return what an error says, without what is secret in the URL."""
        parts = urlsplit(self._url)
        secrets = [parts.password, *(value for _, value in parse_qsl(parts.query))]
        text = f"{type(error).__name__}: {error}"
        for secret in filter(None, secrets):
            text = text.replace(secret, "***").replace(unquote(secret), "***")
        return text
