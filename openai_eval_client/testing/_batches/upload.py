"""Reads an upload, a multipart form, straight from the socket."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import BodyPartReader, MultipartReader

from .._errors import ApiError, missing_parameter

if TYPE_CHECKING:
    from aiohttp import web

    from .files import Files, StoredFile

MOST_BYTES = 200 * 1024 * 1024
CHUNK = 1024 * 1024
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")


@dataclass(slots=True)
class Form:
    """What was sent.

    Attributes:
        fields: The texts by name.
        filename: The file's name.
        content: The file; None where there was none.
        refusal: Why the form cannot be taken.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = "upload"
    content: bytes | None = None
    refusal: ApiError | None = None


async def read_form(request: web.BaseRequest) -> Form:
    """Read all of a request, whatever it is, so that its connection can go on."""
    form = Form()
    try:
        async for part in await request.multipart():
            await _take(form, part)
    except Exception:  # noqa: BLE001 - the reader has many ways to say that this is no form
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
    """One part, of which no more is kept than the API takes."""
    kept = io.BytesIO()  # which gives away what it holds without a copy
    while chunk := await part.read_chunk(CHUNK):
        if kept.tell() + len(chunk) <= MOST_BYTES:
            kept.write(chunk)
        else:
            form.refusal = ApiError(413, "The data value transmitted exceeds the capacity limit.")
    return kept.getvalue()


def upload(form: Form, files: Files) -> StoredFile:
    """Keep the file of a form.

    Raises:
        ApiError: 400 for a form without what the API needs, 413 for too large a file.
    """
    if form.refusal:
        raise form.refusal
    purpose = form.fields.get("purpose")
    if form.content is None:
        raise missing_parameter("file")
    if purpose is None:
        raise missing_parameter("purpose")
    if purpose not in PURPOSES:
        known = ", ".join(f"'{name}'" for name in PURPOSES)
        message = f"Invalid value: '{purpose}'. Supported values are: {known}."
        raise ApiError(400, message, param="purpose", code="invalid_value")
    return files.upload(form.content, form.filename, purpose, _kept_for(form))


def _kept_for(form: Form) -> int | None:
    seconds = form.fields.get("expires_after[seconds]", "")
    return int(seconds) if re.fullmatch(r"\d{1,9}", seconds) else None
