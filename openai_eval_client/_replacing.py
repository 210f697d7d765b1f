"""A file that is written whole or not at all: whoever reads it sees the old one or the new one."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def replacing(name: str) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when all is written: until then, what had the name keeps it.

    Args:
        name: The file; what is there and no regular file (a pipe, /dev/null) is written to as it is.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(name).resolve()
    is_special = path.exists() and not path.is_file()
    target = path if is_special else path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.part")
    try:
        file = target.open("wb" if is_special else "xb")
    except OSError as error:
        error.filename = name
        raise
    if is_special:
        with file:
            yield file
        return
    try:
        with file:
            yield file
        target.replace(path)
    finally:
        target.unlink(missing_ok=True)
