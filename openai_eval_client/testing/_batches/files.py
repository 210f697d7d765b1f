"""Files: read from an upload, kept, and listed page by page."""

from __future__ import annotations

import io
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import BodyPartReader, MultipartReader

from .._faults import ApiError, missing_parameter, out_of_bounds, wrong_type, wrong_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

Json = dict[str, Any]
Query = Mapping[str, str]
MONTH = 30 * 86_400  # seconds
LONGEST_LIST = 10_000
MOST_BYTES = 200 * 1024 * 1024
CHUNK = 1024 * 1024
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")


@dataclass(slots=True)
class Form:
    fields: dict[str, str] = field(default_factory=dict)
    filename: str = "upload"
    content: bytes | None = None
    refusal: ApiError | None = None  # why it cannot be taken


async def read_form(request: web.BaseRequest) -> Form:
    """Read the whole body, whatever it is, so that its connection can be used again."""
    form = Form()
    try:
        async for part in await request.multipart():
            await _take(form, part)
    except Exception:  # noqa: BLE001 - the reader raises many errors for what is not a form
        form.refusal = ApiError(400, "Could not parse multipart form")
    async for _ in request.content.iter_chunked(CHUNK):
        pass
    return form


async def _take(form: Form, part: BodyPartReader | MultipartReader | None) -> None:
    if not isinstance(part, BodyPartReader):
        raise ValueError("a form within a form")  # noqa: TRY004
    content = await _content(form, part)
    if part.name == "file":
        form.filename, form.content = part.filename or form.filename, content
    else:
        form.fields[part.name or ""] = content.decode("utf-8", "replace")


async def _content(form: Form, part: BodyPartReader) -> bytes:
    """Return one part, of which no more is kept than the API takes."""
    kept = io.BytesIO()  # getvalue() makes no copy
    while chunk := await part.read_chunk(CHUNK):
        if kept.tell() + len(chunk) <= MOST_BYTES:
            kept.write(chunk)
        else:
            form.refusal = ApiError(413, "The data value transmitted exceeds the capacity limit.")
    return kept.getvalue()


@dataclass(frozen=True, slots=True)
class StoredFile:
    content: bytes
    filename: str
    purpose: str
    expires_after: int | None  # seconds; only shown, as nothing expires; None: never
    ready: float  # when it can be found, on the store's clock
    ident: str = field(default_factory=lambda: f"file-{uuid.uuid4().hex}")
    created_at: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> Json:
        after = self.expires_after
        return {
            "object": "file",
            "id": self.ident,
            "purpose": self.purpose,
            "filename": self.filename,
            "bytes": len(self.content),
            "created_at": self.created_at,
            "expires_at": None if after is None else self.created_at + after,
            "status": "processed",
            "status_details": None,
        }


class Files:
    """All files; one just uploaded cannot be found until `lag` seconds have passed."""

    def __init__(self, lag: float = 0.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lag, self._clock = lag, clock
        self._files: dict[str, StoredFile] = {}

    def upload(self, form: Form) -> StoredFile:
        """Keep the file of a form; raise a 400 if the form lacks something, a 413 if it is too large."""
        if form.refusal:
            raise form.refusal
        if form.content is None:
            raise missing_parameter("file")
        purpose = form.fields.get("purpose")
        if purpose is None:
            raise missing_parameter("purpose")
        if purpose not in PURPOSES:
            raise wrong_value("purpose", purpose, PURPOSES)
        seconds = form.fields.get("expires_after[seconds]", "")
        after = MONTH if purpose == "batch" else None
        if re.fullmatch(r"\d{1,9}", seconds):
            after = int(seconds)
        ready = self._clock() + self._lag
        return self._keep(StoredFile(form.content, form.filename, purpose, after, ready))

    def write(self, content: bytes, filename: str, expires_after: int | None = None) -> StoredFile:
        return self._keep(StoredFile(content, filename, "batch_output", expires_after, self._clock()))

    def _keep(self, file: StoredFile) -> StoredFile:
        self._files[file.ident] = file
        return file

    def find(self, ident: Any) -> StoredFile | None:
        """Return a file, or None if it is unknown or too new."""
        found = self._files.get(ident) if isinstance(ident, str) else None
        return found if found and found.ready <= self._clock() else None

    def get(self, ident: str) -> StoredFile:
        """Return a file; raise a 404 if it is unknown or too new."""
        if found := self.find(ident):
            return found
        raise unknown_file(404, ident, "id")

    def delete(self, ident: str) -> Json:
        self.forget(self.get(ident).ident)
        return {"object": "file", "id": ident, "deleted": True}

    def forget(self, ident: str) -> None:
        self._files.pop(ident, None)

    def list(self, query: Query) -> Json:
        """Return the page of files asked for, newest first unless `order` is "asc"."""
        now, purpose = self._clock(), query.get("purpose")
        ready = [file for file in self._files.values() if file.ready <= now]
        found = [file.as_json() for file in ready if purpose in (None, file.purpose)]
        if query.get("order") != "asc":
            found.reverse()
        return page(found, query, default=LONGEST_LIST, most=LONGEST_LIST)


def unknown_file(status: int, ident: Any, param: str) -> ApiError:
    """Return the error for a file that does not exist: a 404, or a 400 if it is a parameter."""
    return ApiError(status, f"No such File object: {ident}", param=param)


def page(items: list[Json], query: Query, *, default: int, most: int) -> Json:
    """Return the page of `items` that `limit` and `after` ask for; raise a 400 if they ask for none."""
    limit, start = _limit(query.get("limit"), default, most), _start(items, query.get("after"))
    data = items[start : start + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": start + limit < len(items),
    }


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    try:
        limit = int(text)
    except ValueError:
        raise wrong_type("limit", "an integer") from None
    if refusal := out_of_bounds("limit", limit, 1, most):
        raise refusal
    return limit


def _start(items: list[Json], after: str | None) -> int:
    if after is None:
        return 0
    for index, item in enumerate(items):
        if item["id"] == after:
            return index + 1
    raise ApiError(400, f"Invalid 'after': no object with id '{after}'.", param="after", code="invalid_value")
