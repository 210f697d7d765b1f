"""Rows in and out: JSON lines and tables read, outcomes appended as JSON lines."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import hashlib
import itertools
import json
import os
import stat
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

from openai_eval_client._format import plain, printable_json, to_json
from openai_eval_client._report import row_of
from openai_eval_client._runtime import replacing
from openai_eval_client._validation import shown
from openai_eval_client._wire import check_prompt
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

T = TypeVar("T")

# --- in ---------------------------------------------------------------------------------------------------

_PROMPT_KEYS = ("prompt", "messages")
_READ_AHEAD = 100  # rows of a pipe
_LONGEST_FIELD = 2**30  # characters of a CSV field


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input."""

    index: int  # its position, from 0, blank lines not counted
    line: int  # its line, from 1
    data: dict[str, Any]  # all of it
    prompt: str | list[Any]  # what is asked


class Source:
    """A file of rows, or standard input."""

    def __init__(
        self, name: str, *, column: str | None = None, form: str | None = None, limit: int | None = None
    ) -> None:
        self.name = "standard input" if name == "-" else name
        self.path = None if name == "-" else Path(name).expanduser()
        self._column = column
        self._limit = limit
        ending = Path(name).suffix.lower().removeprefix(".")
        self._form = form or (ending if ending in {"csv", "tsv"} else "jsonl")
        mode = stat.S_IFIFO if self.path is None else self.path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        self.is_stream = not stat.S_ISREG(mode)

    def rows(self) -> Iterator[Row]:
        """Yield the rows, each with its prompt."""
        for index, (line, data) in enumerate(itertools.islice(self.objects(), self._limit)):
            yield Row(index, line, data, self._prompt(data, index, line))

    def objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row as an object, with its line; a text is an object with a prompt."""
        path = self.path
        with open(sys.stdin.fileno(), "rb", closefd=False) if path is None else path.open("rb") as file:
            yield from self._of_json(file) if self._form == "jsonl" else self._of_table(file)

    def reject_input(self, line: int, why: str) -> NoReturn:
        """Raise the error of a line."""
        raise ValidationError(f"{self.name}, line {line}: {why}", field="input")

    def _of_json(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(file, start=1):
            text = self._decoded(number, line)
            if text.strip():
                yield number, self._object(text, number)

    def _decoded(self, number: int, line: bytes) -> str:
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            self.reject_input(number, f"not UTF-8: {error.reason} at byte {error.start}")

    def _object(self, text: str, line: int) -> dict[str, Any]:
        try:
            value = json.loads(text, parse_constant=_reject_constant)
        except (ValueError, RecursionError) as error:
            text = text.strip()
            hint = "" if text.startswith(("{", "[", '"')) else '; a text stands in JSON quotes: "..."'
            self.reject_input(line, f"not JSON: {error}: {shown(text)}{hint}")
        if isinstance(value, str):
            return {self._column or "prompt": value}
        if not isinstance(value, dict):
            self.reject_input(line, f"{shown(value)}: must be a text, or an object that has the prompt")
        return value

    def _of_table(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(_LONGEST_FIELD)
        texts = itertools.starmap(self._decoded, enumerate(file, start=1))
        reader = csv.reader(texts, delimiter="\t" if self._form == "tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            for name, times in Counter(header).items():
                if times > 1:
                    self.reject_input(1, f"the column {name!r} is there twice")
            for fields in filter(None, reader):
                if len(fields) != len(header):
                    counts = f"{len(fields)} fields, but the header has {len(header)}"
                    self.reject_input(reader.line_num, counts)
                yield reader.line_num, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            self.reject_input(reader.line_num, f"not CSV: {error}")

    def _prompt(self, data: dict[str, Any], index: int, line: int) -> str | list[Any]:
        keys = [self._column] if self._column else [key for key in _PROMPT_KEYS if data.get(key) is not None]
        if len(keys) > 1:
            self.reject_input(line, 'has "prompt" and "messages": give one of them')
        if not keys or keys[0] not in data:
            wanted = f'no "{self._column}"' if self._column else 'no "prompt" and no "messages"'
            other = "" if self._column else "; --prompt-column names another"
            self.reject_input(line, f"{wanted}, but {shown(sorted(data))}{other}")
        prompt: Any = data[keys[0]]
        try:
            check_prompt(prompt, index)
        except ValidationError as error:
            self.reject_input(line, str(error).replace(f"prompts[{index}]", keys[0], 1))
        return prompt  # type: ignore[no-any-return]


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


async def read_in_thread(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield what a thread reads: a pipe may bring nothing for hours."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[T | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(_READ_AHEAD)

    def put(item: T | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits for it any more
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def read() -> None:
        try:
            for item in items:
                room.acquire()
                put(item)
            put(None)
        except BaseException as error:  # noqa: BLE001  # raised where the rows are taken
            put(error)

    threading.Thread(target=read, name="input", daemon=True).start()
    while (item := await queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        room.release()
        yield item


# --- out --------------------------------------------------------------------------------------------------

_OURS = ("index", "response", "error")


def carried(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return an input row as it stands in the output: a key of its own that is ours there is renamed."""
    renamed: dict[str, Any] = {}
    for key, value in data.items():
        name = key
        while name in _OURS or (name != key and name in data):
            name = f"input_{name}"
        renamed[name] = value
    return renamed


def fingerprint(row: Mapping[str, Any]) -> bytes:
    """Return a hash of a row's input, as it stands in the output."""
    given = {key: plain(value) for key, value in row.items() if key not in _OURS}
    text = json.dumps(given, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def line_of(
    head: Mapping[str, Any], outcome: ModelResponse | Exception | None, *, only_ascii: bool = False
) -> bytes:
    """Return a row as a line of JSON: what it begins with, and then the outcome."""
    line = to_json(head, only_ascii=only_ascii)[:-1]
    for name, value in row_of(outcome).items():
        is_response = isinstance(value, ModelResponse)
        text = value.model_dump_json().encode() if is_response else to_json(value, only_ascii=only_ascii)
        line += b',"' + name.encode() + b'":' + text
    return line + b"}\n"


class Output:
    """A file that rows are appended to, or standard output."""

    def __init__(self, name: str) -> None:
        self.path = None if name == "-" else Path(name).expanduser()
        self.failed = 0  # rows with an error, of those that `done` found
        self.models: Counter[str] = Counter()  # of the responses that `done` found
        self._is_new = self.path is not None and not self.path.exists()
        if self.path is None:
            self._file = sys.stdout.fileno()
        else:
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self.is_regular = self.path is not None and stat.S_ISREG(os.fstat(self._file).st_mode)
        if self.is_regular:
            self._lock()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it yet."""
        return not self.is_regular or not os.fstat(self._file).st_size

    def clear(self) -> None:
        """Forget what is in it."""
        os.ftruncate(self._file, 0)

    def write(self, line: bytes) -> None:
        """Append a line: all of it or nothing."""
        if self.path is None:
            line = printable_json(line.decode()).encode()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            if self.is_regular and written:
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(error.errno, error.strerror, str(self.path or "standard output")) from None

    def close(self) -> None:
        """Close it; a new file that holds nothing is removed."""
        if self.path is not None:
            if self._is_new and self.is_regular and self.is_empty:
                self.path.unlink(missing_ok=True)
            os.close(self._file)

    def done(self, *, without_errors: bool, only_look: bool = False) -> dict[int, bytes]:
        """Return the fingerprint of each row there is, by its index; remove a line that a crash tore."""
        rows: dict[int, bytes] = {}
        end, line = 0, b"\n"
        for number, line, row in self._rows():
            end += len(line)
            if row["index"] in rows:
                self._reject(number, f"index {row['index']} is there twice")
            self.failed += "error" in row
            if "response" in row or not without_errors:
                response = row.get("response")
                if isinstance(response, dict) and isinstance(response.get("model"), str):
                    self.models[response["model"]] += 1
                rows[row["index"]] = fingerprint(row)
        if not only_look:
            os.ftruncate(self._file, end)  # what follows was not written whole
            if not line.endswith(b"\n"):
                self.write(b"\n")
            if without_errors and self.failed:
                self._drop_errors()
        return rows

    def _rows(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Yield the number of each line, the line and its row, but for a last line that is no row."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                row = _parsed(line)
                if not row and not line.endswith(b"\n"):
                    return
                if not isinstance(row.get("index"), int) or ("response" in row) == ("error" in row):
                    self._reject(number, "not a row that this command has written")
                yield number, line, row

    def _drop_errors(self) -> None:
        """Replace the file by a copy without the rows that failed."""
        with replacing(str(self.path)) as copy:
            for _, line, row in self._rows():
                if "error" not in row:
                    copy.write(line)
        os.close(self._file)
        self._file = os.open(str(self.path), os.O_RDWR | os.O_APPEND)
        self._lock()
        self.failed = 0

    def _lock(self) -> None:
        """Keep other runs from the file, on systems that can."""
        try:
            import fcntl  # not everywhere

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValidationError(f"{self.path}: another run writes to it", field="output") from None
        except (ImportError, OSError):  # a file system without locks
            return

    def _reject(self, line: int, why: str) -> NoReturn:
        raise ValidationError(f"{self.path}, line {line}: {why}", field="output")


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the object in a line; an empty one if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
