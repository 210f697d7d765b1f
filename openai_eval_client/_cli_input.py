"""What `run` and `estimate` read: rows with a prompt, from JSON lines or CSV, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import itertools
import json
import os
import stat
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from openai_eval_client._checks import not_json, shown
from openai_eval_client._requests import check_prompt
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

_PROMPT_KEYS = ("prompt", "messages")
_READ_AHEAD = 100  # rows of a pipe
_LONGEST_FIELD = 2**30  # characters of a CSV field


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the input.

    Attributes:
        index: Its position, from 0, blank lines not counted.
        line: Its line, from 1.
        data: All of it.
        prompt: What is asked.
    """

    index: int
    line: int
    data: dict[str, Any]
    prompt: str | list[Any]


class Source:
    """Where rows come from.

    Args:
        name: The file; - is standard input.
        column: The key or column that holds the prompt; None: "prompt", or "messages" in JSON lines.
        form: "jsonl", "csv" or "tsv"; None: by the name's ending, else "jsonl".
        limit: How many rows at most; None: all.

    Raises:
        OSError: It is not there.
    """

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
        """Yield the rows.

        Raises:
            ValidationError: One is wrong; it names the file and the line.
        """
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
            self.refuse(number, not_json(line.strip(), error))
        if isinstance(row, str):
            return {self._column or "prompt": row}
        if not isinstance(row, dict):
            self.refuse(number, f"{shown(row)}: must be a text or an object, one a line")
        return row

    def _of_table(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(_LONGEST_FIELD)
        delimiter = "\t" if self._form == "tsv" else ","
        reader = csv.reader(self._texts(file), delimiter=delimiter, strict=True)
        try:
            yield from self._records(reader)
        except csv.Error as error:
            self.refuse(reader.line_num, f"not CSV: {error}")

    def _texts(self, file: IO[bytes]) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            yield self._text(line, number)

    def _text(self, line: bytes, number: int) -> str:
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            self.refuse(number, f"not UTF-8: {error.reason} at byte {error.start}")

    def _records(self, reader: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        header: list[str] = next(reader, [])
        twice = [name for name, times in Counter(header).items() if times > 1]
        if twice:
            self.refuse(1, f"the column {twice[0]!r} is there twice")
        for fields in reader:
            if fields and len(fields) != len(header):
                self.refuse(reader.line_num, f"{len(fields)} fields, but the header has {len(header)}")
            if fields:
                yield reader.line_num, dict(zip(header, fields, strict=True))

    def _prompt(self, data: dict[str, Any], index: int, line: int) -> str | list[Any]:
        keys = [self._column] if self._column else [key for key in _PROMPT_KEYS if data.get(key) is not None]
        if len(keys) > 1:
            self.refuse(line, 'has "prompt" and "messages": give one of them')
        if not keys or keys[0] not in data:
            wanted = f'no "{self._column}"' if self._column else 'no "prompt" and no "messages"'
            other = "" if self._column else "; --prompt-column names another"
            self.refuse(line, f"{wanted}, but {shown(sorted(data))}{other}")
        prompt: Any = data[keys[0]]
        try:
            check_prompt(prompt, index)
        except ValidationError as error:
            self.refuse(line, str(error).replace(f"prompts[{index}]", keys[0], 1))
        return prompt  # type: ignore[no-any-return]

    def refuse(self, line: int, why: str) -> NoReturn:
        """Raise the error of a line."""
        raise ValidationError(f"{self.name}, line {line}: {why}", field="input")


async def aside(rows: Iterable[Row]) -> AsyncIterator[Row]:
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
