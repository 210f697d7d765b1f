"""One HTTP attempt, from arrival to its record."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from ._records import Call

if TYPE_CHECKING:
    from aiohttp import web

    from ._records import Recorder


class Exchange:
    """What is known so far of one attempt; recorded once, before the first byte of its answer leaves."""

    def __init__(self, request: web.BaseRequest, recorder: Recorder, started: float) -> None:
        self.request = request
        self._recorder = recorder
        self._arrived = time.monotonic()
        self._started = started
        self._index = recorder.arrive()
        self._in_flight = True
        self._recorded = False
        self.ident = uuid.uuid4().hex
        self.raw: bytes | None = None
        self.model: str | None = None
        self.fault: str | None = None
        self.limited = False
        self.stamped: dict[str, str] | None = None
        self.prompt_tokens = self.completion_tokens = self.charged_tokens = 0

    def headers(self) -> dict[str, str]:
        """The headers every answer carries."""
        elapsed = time.monotonic() - self._arrived
        return {"x-request-id": f"req_{self.ident}", "openai-processing-ms": str(int(elapsed * 1000))}

    def record(self, status: int) -> None:
        """Keep what became of it; only the first word counts."""
        if self._recorded:
            return
        self._recorded = True
        self._recorder.note(self._call(status), self.raw)

    def abandon(self) -> None:
        """Record that the client left, or the server stopped, before there was an answer."""
        if not self._recorded:
            self.fault = None
            self.record(0)

    def leave(self) -> None:
        """Count it out, once; done before the last byte, so that whoever has the answer sees it gone."""
        if self._in_flight:
            self._in_flight = False
            self._recorder.leave()

    def _call(self, status: int) -> Call:
        headers = {name.lower(): value for name, value in self.request.headers.items()}
        headers.pop("authorization", None)
        return Call(
            index=self._index,
            at=self._arrived - self._started,
            method=self.request.method,
            path=self.request.path,
            model=self.model,
            status=status,
            fault=self.fault,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            charged_tokens=self.charged_tokens,
            body=None,
            headers=headers,
        )
