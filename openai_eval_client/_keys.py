"""When two requests are the same, and which of several same ones this is."""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from openai_eval_client._requests import PATHS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._requests import Parameters

_VERSION = 1  # of the form below; another one makes all keys others
_PORTS = {"http": 80, "https": 443}
# Who asks and what the request is called: the answer does not depend on these headers.
_NO_MATTER = frozenset(
    {
        "api-key",
        "authorization",
        "idempotency-key",
        "openai-organization",
        "openai-project",
        "traceparent",
        "tracestate",
        "user-agent",
        "x-client-request-id",
        "x-request-id",
    }
)
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=repr)


def request_digest(base_url: str, parameters: Parameters, body: Mapping[str, Any]) -> bytes:
    """Return what a request has in common with the same one asked again, and with no other.

    Everything counts that can change the answer: the address, the API, the whole body as asked for (schema of
    the answer included), and the extra query and headers. The account and the timeout do not.

    Args:
        base_url: The API's address, as `normalised` returns it.
        parameters: What is asked.
        body: The body for one prompt.
    """
    headers = {name.lower(): value for name, value in parameters.headers.items()}
    headers = {name: value for name, value in headers.items() if name not in _NO_MATTER}
    plain = {name: _whole(value) for name, value in body.items()}
    request = [_VERSION, base_url, PATHS[parameters.api], dict(parameters.query), headers, plain]
    return hashlib.sha256(_canonical(request).encode("utf-8", "surrogatepass")).digest()


class Sample(NamedTuple):
    """One answer to one request.

    Attributes:
        digest: Of the request.
        number: How often it was asked before.
        sampled: Whether asking again gives another answer.
    """

    digest: bytes
    number: int
    sampled: bool

    @property
    def key(self) -> bytes:
        """What it is kept under."""
        return hashlib.sha256(b"%s %d" % (self.digest, self.number)).digest()


def is_sampled(body: Mapping[str, Any]) -> bool:
    """Return whether asking again is to give an answer of its own: not at temperature 0, nor with a seed."""
    return body.get("temperature") != 0 and body.get("seed") is None


def normalised(base_url: str) -> str:
    """Return an address as every way to write it comes out."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in {None, _PORTS.get(parts.scheme)} else f":{parts.port}"
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}{query}"


def _canonical(request: object) -> str:
    try:
        return _CANONICAL.encode(request)
    except TypeError:  # keys that are no strings stand in no order before they are written
        return _CANONICAL.encode(json.loads(json.dumps(request, default=repr)))


def _whole(value: object) -> object:
    """Return 1 for 1.0: the same to every API."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Samples:
    """Numbers the same request each time it is asked, from 0, so that each is a sample of its own.

    Numbers are given in the order asked for. That of a request that failed is given again, but not within the
    same call: there the numbers are to depend on the order of the prompts alone.

    What was asked once takes 8 bytes: the digest's first, in sorted segments.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._once: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))
        self._more: dict[int, int] = {}
        self._free: dict[int, list[tuple[int, object]]] = {}

    def take(self, digest: bytes, call: object) -> int:
        """Return the number of the next sample of a request, asked for by one call."""
        name = int.from_bytes(digest[:8], "big")
        with self._lock:
            free = self._take_free(name, call) if name in self._free else None
            return self._next(name) if free is None else free

    def give_back(self, digest: bytes, number: int, call: object) -> None:
        """Let other calls ask for a sample again: this one was not answered."""
        with self._lock:
            self._free.setdefault(int.from_bytes(digest[:8], "big"), []).append((number, call))

    def _take_free(self, name: int, call: object) -> int | None:
        numbers = self._free[name]
        others = [number for number, owner in numbers if owner is not call]
        if not others:
            return None
        least = min(others)
        numbers[:] = [pair for pair in numbers if pair[0] != least]
        if not numbers:
            del self._free[name]
        return least

    def _next(self, name: int) -> int:
        segment = self._once[name >> 52]
        at = bisect_left(segment, name)
        if at == len(segment) or segment[at] != name:
            segment.insert(at, name)
            return 0
        self._more[name] = self._more.get(name, 0) + 1
        return self._more[name]
