"""The files uploaded and those that batches wrote."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._errors import ApiError
from .pages import Query, page

if TYPE_CHECKING:
    from collections.abc import Callable

Json = dict[str, Any]
MONTH = 30 * 86_400
LONGEST_LIST = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file kept.

    Attributes:
        ident: Its id.
        content: Its bytes.
        filename: Its name.
        purpose: What it is for.
        created_at: When it came, as a Unix time.
        expires_after: Seconds until it would expire; None never. Only shown: nothing expires.
        ready: When it can be found, on the store's clock.
    """

    ident: str
    content: bytes
    filename: str
    purpose: str
    created_at: int
    expires_after: int | None
    ready: float

    def shown(self) -> Json:
        """The File object."""
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
    """All files. Those uploaded cannot be found until `lag` seconds have passed."""

    def __init__(self, lag: float = 0.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lag, self._clock = lag, clock
        self._files: dict[str, StoredFile] = {}

    def upload(
        self, content: bytes, filename: str, purpose: str, expires_after: int | None = None
    ) -> StoredFile:
        """Keep a file of a client's."""
        if expires_after is None and purpose == "batch":
            expires_after = MONTH
        return self._keep(content, filename, purpose, expires_after, self._clock() + self._lag)

    def write(self, content: bytes, filename: str, expires_after: int | None = None) -> StoredFile:
        """Keep a file of a batch's."""
        return self._keep(content, filename, "batch_output", expires_after, self._clock())

    def _keep(
        self, content: bytes, filename: str, purpose: str, expires_after: int | None, ready: float
    ) -> StoredFile:
        kept = StoredFile(
            ident=f"file-{uuid.uuid4().hex}",
            content=content,
            filename=filename,
            purpose=purpose,
            created_at=int(time.time()),
            expires_after=expires_after,
            ready=ready,
        )
        self._files[kept.ident] = kept
        return kept

    def find(self, ident: Any) -> StoredFile | None:
        """A file, unless it is unknown or too new."""
        found = self._files.get(ident) if isinstance(ident, str) else None
        return found if found and found.ready <= self._clock() else None

    def get(self, ident: str) -> StoredFile:
        """A file.

        Raises:
            ApiError: 404 when it is unknown or too new.
        """
        if found := self.find(ident):
            return found
        raise unknown_file(404, ident, "id")

    def delete(self, ident: str) -> Json:
        """Forget a file, and say so."""
        self.forget(self.get(ident).ident)
        return {"object": "file", "id": ident, "deleted": True}

    def forget(self, ident: str) -> None:
        """Forget a file, if it is there."""
        self._files.pop(ident, None)

    def list(self, query: Query) -> Json:
        """The files as GET /files lists them: newest first, unless the query wants them otherwise."""
        now = self._clock()
        found = [
            file
            for file in self._files.values()
            if file.ready <= now and query.get("purpose") in (None, file.purpose)
        ]
        if query.get("order") != "asc":
            found.reverse()
        return page([file.shown() for file in found], query, default=LONGEST_LIST, most=LONGEST_LIST)


def unknown_file(status: int, ident: Any, param: str) -> ApiError:
    """404, or 400 where the file is a parameter: there is no such file."""
    return ApiError(status, f"No such File object: {ident}", param=param)
