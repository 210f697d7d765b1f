"""What `run` writes: whole rows, appended one by one, so that the file is JSON lines at every instant."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openai_eval_client._cli_rows import error_of
from openai_eval_client._replacing import replacing
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from openai_eval_client._cli_input import Row

_OURS = ("index", "response", "error")


def carried(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return an input row as it stands in the output: a key of its own that is ours there is renamed."""
    if not any(key in data for key in _OURS):
        return dict(data)
    renamed: dict[str, Any] = {}
    for key, value in data.items():
        name = key
        while name in _OURS or (name != key and name in data):
            name = f"input_{name}"
        renamed[name] = value
    return renamed


def fingerprint(row: Mapping[str, Any]) -> bytes:
    """Return what tells an output row's input from another one."""
    text = json.dumps({key: value for key, value in row.items() if key not in _OURS}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def line_of(row: Row, outcome: ModelResponse | Exception) -> bytes:
    """Return the output line of a row."""
    head = _json({**carried(row.data), "index": row.index})[:-1]
    if isinstance(outcome, ModelResponse):
        return head + b',"response":' + outcome.model_dump_json().encode() + b"}\n"
    return head + b',"error":' + _json(error_of(outcome)) + b"}\n"


class Output:
    """A file that rows are appended to, or standard output.

    Args:
        name: The file; - is standard output. It is made where it is not there.

    Attributes:
        is_regular: Whether it is a file, and no pipe or device.
        failed: Rows in it that failed, as far as they were read.
        models: How many of its responses name which model, likewise.

    Raises:
        OSError: It cannot be written.
        ValidationError: Another run writes to it.
    """

    def __init__(self, name: str) -> None:
        self.path = None if name == "-" else Path(name).expanduser()
        self.failed = 0
        self.models: Counter[str] = Counter()
        self._is_new = self.path is not None and not self.path.exists()
        if self.path is None:
            self._file = sys.stdout.fileno()
        else:
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self.is_regular = self.path is not None and stat.S_ISREG(os.fstat(self._file).st_mode)
        if self.is_regular:
            self._claim()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it yet."""
        return not self.is_regular or not os.fstat(self._file).st_size

    def clear(self) -> None:
        """Forget what is in it."""
        os.ftruncate(self._file, 0)

    def write(self, line: bytes) -> None:
        """Append a line: all of it or nothing.

        Raises:
            OSError: The disk is full, or the reader of a pipe has left.
        """
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            if self.is_regular and written:
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(error.errno, error.strerror, str(self.path or "standard output")) from None

    def close(self) -> None:
        """Close it; one that was made and holds nothing is removed."""
        if self.path is not None:
            if self._is_new and self.is_regular and self.is_empty:
                self.path.unlink(missing_ok=True)
            os.close(self._file)

    def done(self, *, without_errors: bool, only_look: bool = False) -> dict[int, bytes]:
        """Return the fingerprint of each row that is there, by its index; a line torn by a crash is removed.

        Args:
            without_errors: Remove the rows that failed, too.
            only_look: Leave the file as it is: what would be removed is only left out.

        Raises:
            ValidationError: It holds what no run wrote.
        """
        if not only_look:
            self._mend()
        rows = {}
        self.failed = 0
        self.models.clear()
        for number, _, row in self._rows():
            if row["index"] in rows:
                self._refuse(number, f"index {row['index']} is there twice")
            if "error" in row:
                self.failed += 1
                if without_errors:
                    continue
            self.models.update(_model_of(row))
            rows[row["index"]] = fingerprint(row)
        if without_errors and self.failed and not only_look:
            self._drop_errors()
            self.failed = 0
        return rows

    def _rows(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                row = _read(line)
                if not line.endswith(b"\n") and not isinstance(row, dict):
                    return  # torn
                index = row.get("index") if isinstance(row, dict) else None
                if not isinstance(index, int) or ("response" in row) == ("error" in row):
                    self._refuse(number, "not a row of this program's output")
                yield number, line, row

    def _mend(self) -> None:
        """Take off a last line that was not written whole."""
        size = os.fstat(self._file).st_size
        with open(self._file, "rb", closefd=False) as file:
            end = _last_line(file, size)
            file.seek(end)
            torn = file.read()
        if torn and isinstance(_read(torn), dict):
            os.write(self._file, b"\n")
        elif torn:
            os.ftruncate(self._file, end)

    def _drop_errors(self) -> None:
        """Put a copy without the rows that failed in the file's place."""
        with replacing(str(self.path)) as copy:
            for _, line, row in self._rows():
                if "error" not in row:
                    copy.write(line)
        os.close(self._file)
        self._file = os.open(str(self.path), os.O_RDWR | os.O_APPEND)
        self._claim()

    def _claim(self) -> None:
        """Keep other runs from the file, where the system knows how."""
        with contextlib.suppress(ImportError):
            import fcntl  # not everywhere

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in {errno.EAGAIN, errno.EACCES}:
                    return  # a file system without locks
                raise ValidationError(f"{self.path}: another run writes to it", field="output") from None

    def _refuse(self, line: int, why: str) -> None:
        raise ValidationError(f"{self.path}, line {line}: {why}", field="output")


def _model_of(row: Mapping[str, Any]) -> list[str]:
    response = row.get("response")
    model = response.get("model") if isinstance(response, dict) else None
    return [model] if isinstance(model, str) else []


def _last_line(file: Any, size: int) -> int:
    """Return where what follows the last line break begins."""
    step, at = 65_536, size
    while at > 0:
        start = max(0, at - step)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        at = start
    return 0


def _read(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _json(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, separators=(",", ":")).encode()
