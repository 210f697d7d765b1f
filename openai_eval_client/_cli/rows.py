"""Rows in and out: prompts read from files, answers written to them."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import hashlib
import itertools
import json
import os
import re
import stat
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path  # typer reads the annotations
from typing import IO, TYPE_CHECKING, Any, NoReturn

import pydantic

from openai_eval_client._runtime import replacing
from openai_eval_client._validation import not_json, shown
from openai_eval_client._wire import check_prompt
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import BatchRequest, ModelResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence


_BOM = b"\xef\xbb\xbf"
_OTHER = re.compile(r"that of requests\[(\d+)\]")
_OWN = re.compile(r"\Arequests\[\d+\][.:]? ?")
# The names under which a line may say itself what an option is the default of.
_NAMES = {
    "temperature": {"temperature"},
    "max_tokens": {"max_tokens", "max_completion_tokens", "max_output_tokens"},
    "system": {"system", "instructions"},
}
_SYSTEM_ROLES = frozenset({"system", "developer"})


def read_requests(
    lines: Iterable[bytes],
    defaults: Mapping[str, Any],
) -> tuple[list[BatchRequest], list[int]]:
    """Read one request from each line that is not blank."""
    requests: list[BatchRequest] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(_BOM) if number == 1 else line
        if text.strip():
            requests.append(_request(_row(text, number), defaults, number))
            numbers.append(number)
    if not requests:
        raise ValidationError("the input is empty: give a request a line", field="requests")
    return requests, numbers


def by_lines(error: ValidationError, numbers: Sequence[int]) -> str:
    """Return an error's message with the lines of the input in place of the indexes of the requests."""
    message = str(error)
    if error.index is None:
        return message
    own = f"line {numbers[error.index]}: {_OWN.sub('', message)}"
    return _OTHER.sub(lambda found: f"that of line {numbers[int(found[1])]}", own)


def row_of(index: int, outcome: ModelResponse | Exception) -> bytes:
    """Return the line of one outcome."""
    head: dict[str, Any] = {"index": index}
    name = getattr(outcome, "custom_id", None)
    if name is not None:
        head["custom_id"] = name
    if isinstance(outcome, ModelResponse):
        start = json.dumps(head, separators=(",", ":"))[:-1]
        return f'{start},"response":{outcome.model_dump_json()}}}\n'.encode()
    return json.dumps({**head, "error": error_of(outcome)}, separators=(",", ":")).encode() + b"\n"


def error_of(error: Exception) -> dict[str, Any]:
    """Return how an error stands in a row."""
    return {
        "type": type(error).__name__,
        "message": getattr(error, "message", str(error)),
        "code": getattr(error, "code", None),
    }


def _row(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        _refuse(number, f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        _refuse(number, not_json(line.decode().strip(), error))
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, dict):
        _refuse(number, f'{shown(row)}: must be a text, or an object with "prompt" or "messages"')
    return {key: value for key, value in row.items() if value is not None}


def _request(row: dict[str, Any], defaults: Mapping[str, Any], number: int) -> BatchRequest:
    added = {name: value for name, value in defaults.items() if not _NAMES[name] & row.keys()}
    if _has_system_message(row):
        added.pop("system", None)
    try:
        return BatchRequest.model_validate({**added, **row}, strict=True)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        why = problem["msg"].removeprefix("Value error, ")
        _refuse(number, f"{problem['loc'][0]}={shown(problem['input'])}: {why}" if problem["loc"] else why)


def _has_system_message(row: Mapping[str, Any]) -> bool:
    messages = row.get("messages", row.get("prompt"))
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") in _SYSTEM_ROLES for message in messages
    )


def _refuse(number: int, why: str) -> NoReturn:
    raise ValidationError(f"line {number}: {why}", field="requests")


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
    """Where rows come from."""

    def __init__(self, name: str, *, column: str | None, form: str | None, limit: int | None) -> None:
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

    def is_file(self, name: str) -> bool:
        """Return whether another name is that of the same file."""
        other = Path(name).expanduser()
        return not self.is_stream and self.path is not None and other.exists() and other.samefile(self.path)

    def rows(self) -> Iterator[Row]:
        """Yield the rows."""
        with self._opened() as file:
            read = self._of_lines(file) if self._form == "jsonl" else self._of_table(file)
            for index, (line, data) in enumerate(itertools.islice(read, self._limit)):
                yield Row(index, line, data, self._prompt(data, index, line))

    def _opened(self) -> IO[bytes]:
        if self.path is None:
            return open(sys.stdin.fileno(), "rb", closefd=False)
        return self.path.open("rb")

    def _of_lines(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(file, start=1):
            text = self._text(line, number)
            if text.strip():
                yield number, self._object(text, number)

    def _object(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line, parse_constant=_no_json)
        except (ValueError, RecursionError) as error:
            self.reject_input(number, not_json(line.strip(), error))
        if isinstance(row, str):
            return {self._column or "prompt": row}
        if not isinstance(row, dict):
            self.reject_input(number, f"{shown(row)}: must be a text or an object, one a line")
        return row

    def _of_table(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(_LONGEST_FIELD)
        delimiter = "\t" if self._form == "tsv" else ","
        reader = csv.reader(self._texts(file), delimiter=delimiter, strict=True)
        try:
            yield from self._records(reader)
        except csv.Error as error:
            self.reject_input(reader.line_num, f"not CSV: {error}")

    def _texts(self, file: IO[bytes]) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            yield self._text(line, number)

    def _text(self, line: bytes, number: int) -> str:
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            self.reject_input(number, f"not UTF-8: {error.reason} at byte {error.start}")

    def _records(self, reader: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        header: list[str] = next(reader, [])
        twice = [name for name, times in Counter(header).items() if times > 1]
        if twice:
            self.reject_input(1, f"the column {twice[0]!r} is there twice")
        for fields in reader:
            if fields and len(fields) != len(header):
                self.reject_input(reader.line_num, f"{len(fields)} fields, but the header has {len(header)}")
            if fields:
                yield reader.line_num, dict(zip(header, fields, strict=True))

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

    def reject_input(self, line: int, why: str) -> NoReturn:
        """Raise the error of a line."""
        raise ValidationError(f"{self.name}, line {line}: {why}", field="input")


async def read_in_thread(rows: Iterable[Row]) -> AsyncIterator[Row]:
    """Yield what a thread of its own reads: a pipe may have nothing to say for hours."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Row | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(_READ_AHEAD)

    def put(item: Row | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def read() -> None:
        try:
            for row in rows:
                room.acquire()
                put(row)
            put(None)
        except BaseException as error:  # noqa: BLE001  # raised where the rows are taken
            put(error)

    threading.Thread(target=read, name="input", daemon=True).start()
    while (item := await queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        room.release()
        yield item


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


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
    """A file that rows are appended to, or standard output."""

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
        """Append a line: all of it or nothing."""
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
        """Return the fingerprint of each row there is, by its index; remove a line that a crash tore."""
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
