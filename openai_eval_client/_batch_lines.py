"""From requests to the input files of the Batch API: one line each, cut to what one file may hold."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
import threading
from array import array
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from openai_eval_client._checks import refuse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from openai_eval_client._requests import Parameters

ENDPOINTS = {"chat": "/v1/chat/completions", "responses": "/v1/responses"}
MOST_BYTES = 200_000_000  # of one input file: https://platform.openai.com/docs/guides/batch
MIXED = "mixed"  # the temperature of a part whose requests differ in it


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a job.

    Attributes:
        index: Its position in the caller's list.
        custom_id: Its name on the wire.
        parameters: What is asked, checked.
        prompt: The prompt, checked.
    """

    index: int
    custom_id: str
    parameters: Parameters
    prompt: str | Sequence[Any]


@dataclass(slots=True, eq=False)
class Part:
    """The requests of one input file, of one model.

    Attributes:
        file: Its lines; an unnamed file that goes when it is closed.
        model: The model of all of them.
        first: The position of its first line among all lines of the job.
        indexes: The position of each line's request in the caller's list.
        temperature: What all of them ask; None: nothing; "mixed": they differ.
        size: Bytes.
        numbered: Whether each custom_id ends with the request's index.
        digest: A hash of the lines.
        file_id: The uploaded file, once there is one.
    """

    file: IO[bytes]
    model: str
    temperature: float | str | None = None
    first: int = 0
    indexes: array[int] = field(default_factory=lambda: array("L"))
    size: int = 0
    numbered: bool = True
    digest: Any = field(default_factory=hashlib.sha256)
    file_id: str | None = None

    @property
    def count(self) -> int:
        """How many lines it has."""
        return len(self.indexes)

    @property
    def key(self) -> str:
        """What tells it from the other parts of its job."""
        return part_key(self.first, self.count)

    def add(self, line: bytes, index: int, temperature: float | None) -> None:
        """Append one line."""
        if not self.indexes:
            self.temperature = temperature
        elif self.temperature != temperature:
            self.temperature = MIXED
        self.file.write(line)
        self.digest.update(line)
        self.indexes.append(index)
        self.size += len(line)


def part_key(first: int, count: int) -> str:
    """Return what tells a part from the others of its job: its first line, and how many it has."""
    return f"{first}+{count}"


def number(index: int) -> str:
    """Return the custom_id of a request to which the caller gave none."""
    return f"request-{index}"


def line_of(item: Item) -> bytes:
    """Return a request as a line of an input file.

    Raises:
        ValidationError: It is larger than a file may be.
    """
    parameters = item.parameters
    line = {
        "custom_id": item.custom_id,
        "method": "POST",
        "url": ENDPOINTS[parameters.api],
        "body": parameters.with_prompt(item.prompt),
    }
    data = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    if len(data) > MOST_BYTES:
        why = f"{len(data):,} bytes as a line of a batch, whose file may have {MOST_BYTES:,}"
        refuse(f"requests[{item.index}]", item.prompt, why, field="prompt", index=item.index)
    return data


def write_parts(items: Iterable[Item], *, most_lines: int, most_bytes: int = MOST_BYTES) -> list[Part]:
    """Write all requests to files on disk: one or several of each model, in the order of the requests.

    Args:
        items: The requests.
        most_lines: Lines in one file at most.
        most_bytes: Bytes in one file at most.

    Returns:
        The parts; each file is to be closed by the caller.

    Raises:
        ValidationError: A request is too large; no file is left.
    """
    by_model: dict[str, list[Part]] = {}
    try:
        for item in items:
            line = line_of(item)
            parts = by_model.setdefault(item.parameters.model, [])
            if not parts or parts[-1].count >= most_lines or parts[-1].size + len(line) > most_bytes:
                parts.append(Part(_unnamed_file(), item.parameters.model))
            parts[-1].add(line, item.index, item.parameters.body.get("temperature"))
    except BaseException:
        close(part for parts in by_model.values() for part in parts)
        raise
    return _in_a_row([part for parts in by_model.values() for part in parts])


async def write_aside(items: Iterable[Item], *, most_lines: int) -> list[Part]:
    """Do `write_parts` in a thread; nobody is left with its files where the wait for it is cancelled."""
    written: list[Part] = []
    abandoned = threading.Event()

    def write() -> None:
        written.extend(write_parts(items, most_lines=most_lines))
        if abandoned.is_set():
            close(written)

    try:
        await asyncio.to_thread(write)
    except BaseException:
        abandoned.set()
        close(written)
        raise
    return written


def cut(part: Part, counts: Sequence[int]) -> list[Part]:
    """Cut a part into several with so many lines each, and close it."""
    part.file.seek(0)
    smaller: list[Part] = []
    first = 0
    for count in counts:
        piece = Part(_unnamed_file(), part.model, first=part.first + first, numbered=part.numbered)
        for position in range(first, first + count):
            piece.add(part.file.readline(), part.indexes[position], None)
        piece.temperature = part.temperature
        smaller.append(piece)
        first += count
    part.file.close()
    return smaller


def recut(parts: Iterable[Part], spans: Iterable[tuple[int, int]]) -> list[Part]:
    """Cut parts as they were cut before, by the first line and the count of each piece."""
    counts = dict(spans)
    pieces: list[Part] = []
    for part in parts:
        firsts = [first for first in counts if part.first <= first < part.first + part.count]
        exact = sum(counts[first] for first in firsts) == part.count
        pieces += (
            cut(part, [counts[first] for first in sorted(firsts)]) if len(firsts) > 1 and exact else [part]
        )
    return pieces


def even(count: int, pieces: int) -> list[int]:
    """Return `count` as a sum of so many whole numbers of about the same size, none of them 0."""
    pieces = max(1, min(pieces, count))
    return [count * (n + 1) // pieces - count * n // pieces for n in range(pieces)]


def close(parts: Iterable[Part]) -> None:
    """Delete the files."""
    for part in parts:
        part.file.close()


def _unnamed_file() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="openai_eval_client-")  # closed with its part


def _in_a_row(parts: list[Part]) -> list[Part]:
    first = 0
    for part in parts:
        part.first = first
        first += part.count
        part.file.flush()
    return parts


def naming(custom_ids: Sequence[str | None], *, several_models: bool) -> Iterator[str]:
    """Yield the custom_id of each request on the wire.

    The caller's own names stay as they are, but for jobs of several models: those are sorted into files by
    model, and an appended `#index` then keeps the order.

    Raises:
        ValidationError: Two are the same.
    """
    seen: dict[str, int] = {}
    named = any(name is not None for name in custom_ids)
    for index, own in enumerate(custom_ids):
        name = number(index) if own is None else own
        if named and seen.setdefault(name, index) != index:
            why = f"the same as that of requests[{seen[name]}]: each must be another"
            refuse(f"requests[{index}].custom_id", name, why, field="custom_id", index=index)
        yield f"{own}#{index}" if several_models and own is not None else name
