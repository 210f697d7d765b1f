"""The Files and Batches endpoints, and what happens to calls of them."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from aiohttp import web

from .._errors import ApiError
from .._faults import Faults, fault_error
from .._plans import AFTER, BEFORE, ENDPOINTS
from .._wire import drop, hang
from .batches import Batches
from .files import Files
from .upload import Form, upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._endpoints.answers import Count
    from .._exchange import Exchange
    from .._options import Options
    from .files import StoredFile

Json = dict[str, Any]
PIECE = 256 * 1024
UNSAFE = re.compile(r"[^\w.-]", re.ASCII)


class Storage:
    """The files and batches of a server, as its clients reach them."""

    def __init__(self, options: Options, count: Count, know: Callable[[str], None]) -> None:
        self._options = options
        self._files = Files(options.file_lag)
        self._batches = Batches(options, self._files, count, know)
        self._faults = {
            name: Faults(
                options.endpoint_faults.get(name, {}),
                options.endpoint_script.get(name, ()),
                f"{options.seed} {name}",
            )
            for name in ENDPOINTS
        }

    def batches(self) -> list[Json]:
        """All Batch objects, oldest first."""
        return self._batches.shown()

    async def answer(
        self, exchange: Exchange, name: str, ident: str, sent: Form | Json
    ) -> Json | web.StreamResponse:
        """What the endpoint of this name answers.

        Raises:
            ApiError: It refuses, or is told to fail.
        """
        fault = exchange.fault = self._faults[name].draw()
        if fault in BEFORE:
            await self._break(exchange, str(fault))
        done = await self._act(exchange, name, ident, sent)
        if fault in AFTER:
            await self._break(exchange, str(fault).removesuffix("_after"))
        return done if isinstance(done, dict) else await self._download(exchange, done)

    async def _act(  # noqa: PLR0911 - one for each endpoint
        self, exchange: Exchange, name: str, ident: str, sent: Form | Json
    ) -> Json | StoredFile:
        match name:
            case "upload" if isinstance(sent, Form):
                return upload(sent, self._files).shown()
            case "list_files":
                return self._files.list(exchange.request.query)
            case "retrieve_file":
                return self._files.get(ident).shown()
            case "content":
                return self._files.get(ident)
            case "delete":
                return self._files.delete(ident)
            case "list":
                return self._batches.list(exchange.request.query)
            case "retrieve":
                return self._batches.get(ident).shown()
            case "cancel":
                batch = self._batches.get(ident)
                batch.cancel()
                return batch.shown()
        if isinstance(sent, Form):
            raise AssertionError("only an upload is a form")  # noqa: TRY004
        return await self._batches.create(sent)

    async def _break(self, exchange: Exchange, fault: str) -> NoReturn:
        if fault == "drop":
            await drop(exchange)
        if fault == "hang":
            await hang(exchange)
        raise fault_error(fault, self._options.unavailable_retry_after)

    async def _download(self, exchange: Exchange, file: StoredFile) -> web.StreamResponse:
        """Send a file, or the rest of it; the fault "truncate" sends the half of that and closes."""
        first, end = self._wanted(exchange.request, len(file.content))
        whole = (first, end) == (0, len(file.content))
        response = web.StreamResponse(status=200 if whole else 206, headers=exchange.headers())
        response.content_type = "application/octet-stream"
        response.headers["content-disposition"] = f'attachment; filename="{UNSAFE.sub("_", file.filename)}"'
        response.content_length = end - first
        if self._options.ranges:
            response.headers["accept-ranges"] = "bytes"
        if not whole:
            response.headers["content-range"] = f"bytes {first}-{end - 1}/{len(file.content)}"
        exchange.record(response.status)
        await response.prepare(exchange.request)
        stop = first + (end - first) // 2 if exchange.fault == "truncate" else end
        content = memoryview(file.content)
        with suppress(ConnectionResetError):  # the client has left
            for start in range(first, stop, PIECE):
                if start + PIECE >= stop:
                    exchange.leave()
                await response.write(content[start : min(start + PIECE, stop)])
        if stop < end:
            await drop(exchange)
        return response

    def _wanted(self, request: web.BaseRequest, size: int) -> tuple[int, int]:
        """The first byte to send and the one after the last."""
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
