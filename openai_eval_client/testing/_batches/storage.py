"""The endpoints of files, batches and stored responses, and the faults of calls to them."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .._background import StoredResponses
from .._faults import ApiError, Faults
from .._options import AFTER, BEFORE, ENDPOINTS
from .batches import Batches
from .files import Files, Form, Query, StoredFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._endpoints import Count
    from .._exchange import Exchange
    from .._options import Options

Json = dict[str, Any]
PIECE = 256 * 1024
UNSAFE = re.compile(r"[^\w.-]", re.ASCII)


class Storage:
    """The files, batches and stored responses of a server, as its clients reach them."""

    def __init__(self, options: Options, count: Count, check_model: Callable[[str], None]) -> None:
        self._options = options
        self._files = Files(options.file_lag)
        self._batches = Batches(options, self._files, count, check_model)
        self.responses = StoredResponses(options)
        self._faults = {
            name: Faults(
                options.endpoint_faults.get(name, {}),
                options.endpoint_script.get(name, ()),
                f"{options.seed} {name}",
            )
            for name in ENDPOINTS
        }

    def batches(self) -> list[Json]:
        """Return the Batch objects as of now."""
        return self._batches.as_json()

    async def answer(
        self, exchange: Exchange, name: str, ident: str, sent: Form | bytes
    ) -> Json | web.StreamResponse:
        """Return what the endpoint of this name answers; raise ApiError if it refuses, or is told to fail."""
        given = exchange.parse(sent) if name == "create" and isinstance(sent, bytes) else sent
        wait = self._options.unavailable_retry_after
        fault = exchange.fault = self._faults[name].draw()
        if fault in BEFORE:
            await exchange.fail(str(fault), wait)
        done = await self._act(name, ident, given, exchange.request.query)
        if fault in AFTER:
            await exchange.fail(str(fault).removesuffix("_after"), wait)
        exchange.extra = self.responses.headers(done)
        return await self._download(exchange, done) if isinstance(done, StoredFile) else done

    async def _act(
        self, name: str, ident: str, given: Form | Json | bytes, query: Query
    ) -> Json | StoredFile:
        if name == "upload" and isinstance(given, Form):
            return self._files.upload(given).as_json()
        if name == "create" and isinstance(given, dict):
            return await self._batches.create(given)
        acts: dict[str, Callable[[], Json | StoredFile]] = {
            "list_files": lambda: self._files.list(query),
            "retrieve_file": lambda: self._files.get(ident).as_json(),
            "content": lambda: self._files.get(ident),
            "delete": lambda: self._files.delete(ident),
            "list": lambda: self._batches.list(query),
            "retrieve": lambda: self._batches.get(ident).as_json(),
            "cancel": lambda: self._batches.get(ident).cancel(),
            "retrieve_response": lambda: self.responses.get(ident).poll(),
            "cancel_response": lambda: self.responses.get(ident).cancel(),
            "delete_response": lambda: self.responses.delete(ident),
        }
        return acts[name]()

    async def _download(self, exchange: Exchange, file: StoredFile) -> web.StreamResponse:
        """Send a file, or a range of it; the fault "truncate" sends half of that and closes."""
        first, end = self._range(exchange.request, len(file.content))
        response = web.StreamResponse(status=200, headers=exchange.headers())
        response.content_type = "application/octet-stream"
        response.headers["content-disposition"] = f'attachment; filename="{UNSAFE.sub("_", file.filename)}"'
        response.content_length = end - first
        if self._options.ranges:
            response.headers["accept-ranges"] = "bytes"
        if (first, end) != (0, len(file.content)):
            response.set_status(206)
            response.headers["content-range"] = f"bytes {first}-{end - 1}/{len(file.content)}"
        exchange.record(response.status)
        await response.prepare(exchange.request)
        stop = first + (end - first) // 2 if exchange.fault == "truncate" else end
        content = memoryview(file.content)[first:stop]
        with suppress(ConnectionResetError):  # the client has left
            for start in range(0, len(content), PIECE):
                if start + PIECE >= len(content):
                    exchange.leave()
                await response.write(content[start : start + PIECE])
        if stop < end:
            await exchange.drop()
        return response

    def _range(self, request: web.BaseRequest, size: int) -> tuple[int, int]:
        """Return the first byte to send and the one after the last."""
        if not self._options.ranges or "range" not in request.headers:
            return 0, size
        try:
            wanted = request.http_range
        except ValueError:
            return 0, size
        first, end, _ = wanted.indices(size)
        if first >= end:
            beyond = {"content-range": f"bytes */{size}"}
            raise ApiError(416, "The range is beyond the end of the file.", headers=beyond)
        return first, end
