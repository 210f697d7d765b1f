"""What a batch was asked: whose request each line is, and at which temperature."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from openai_eval_client._batch_meta import index_in
from openai_eval_client._wire import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_NAME = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')  # in a line that is cut short


@dataclass(slots=True)
class Manifest:
    """What a batch was asked, as far as it is known.

    Attributes:
        indexes: The index of each line's request, in the order of the lines.
        by_name: The index of each custom_id; None where it ends with the index.
        temperatures: What each request asked, where they differ.
        temperature: What all of them asked; None: nothing.
        empty: The numbers of the empty lines between them, rising.
    """

    indexes: Any  # a sequence of int
    by_name: dict[str, int] | None = None
    temperatures: dict[int, float | None] | None = None
    temperature: float | None = None
    empty: Sequence[int] = ()

    def index_at(self, line: int) -> int | None:
        """Return whose request a line of the input file is, counted from 1; None where it is nobody's."""
        position = line - 1 - bisect_left(self.empty, line)
        known = 0 <= position < len(self.indexes) and line not in self.empty
        return int(self.indexes[position]) if known else None

    def index_of(self, custom_id: str | None) -> int | None:
        """Return whose result a line is; None where nobody's here."""
        if custom_id is None:
            return None
        return index_in(custom_id) if self.by_name is None else self.by_name.get(custom_id)

    def temperature_of(self, index: int) -> float | None:
        """Return what a request asked."""
        return self.temperature if self.temperatures is None else self.temperatures.get(index)


def read_manifest(lines: Iterable[bytes], *, numbered: bool, start: int) -> Manifest:
    """Read what a batch was asked from its input file.

    Args:
        lines: The file's lines.
        numbered: Whether each custom_id ends with the request's index.
        start: The index of the first line where it does not.

    Returns:
        The manifest.
    """
    indexes, by_name, temperatures = array("L"), dict[str, int](), dict[int, float | None]()
    empty = array("L")
    for number, raw in enumerate(lines, start=1):
        if raw.isspace():
            empty.append(number)
            continue
        line = parsed(raw) or {}
        name, body = str(line.get("custom_id")), line.get("body")
        known = index_in(name) if numbered else None
        index = start + len(indexes) if known is None else known
        indexes.append(index)
        by_name[name] = index
        temperatures[index] = body.get("temperature") if isinstance(body, dict) else None
    return Manifest(indexes, by_name, temperatures, empty=empty)


def guess_manifest(files: Iterable[IO[bytes]], *, numbered: bool, start: int, count: int) -> Manifest:
    """Make up the manifest of a batch whose input file is gone, from its results.

    Args:
        files: Its result files.
        numbered: Whether each custom_id ends with the request's index.
        start: The index of the first request where it does not: the order is then that of the results.
        count: How many requests it has.

    Returns:
        The manifest; where the custom_ids are numbered, without the requests that have no result.
    """
    names: dict[str, int] = {}
    for file in files:
        for raw in file:
            name = name_of(parsed(raw), raw)
            index = None if name is None else index_in(name) if numbered else start + len(names)
            if name is not None and index is not None:
                names.setdefault(name, index)
        file.seek(0)
    indexes = sorted(set(names.values())) if numbered else range(start, start + max(count, len(names)))
    return Manifest(indexes, names)


def read_bodies(lines: Iterable[bytes], wanted: Mapping[int, int]) -> dict[int, Any]:
    """Return the bodies of some requests of an input file.

    Args:
        lines: The file's lines.
        wanted: The index of each, by its position among all requests.

    Returns:
        The bodies, by index.
    """
    present = (raw for raw in lines if not raw.isspace())
    found = {wanted[position]: parsed(raw) for position, raw in enumerate(present) if position in wanted}
    return {
        index: line["body"] for index, line in found.items() if line and isinstance(line.get("body"), dict)
    }


def parsed(raw: bytes) -> dict[str, Any] | None:
    """Return a line as an object; None where it is none, or cut short."""
    try:
        line = read_json(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def name_of(line: dict[str, Any] | None, raw: bytes) -> str | None:
    """Return the custom_id of a line, also of one that is cut short."""
    if line is None:
        found = _NAME.search(raw)
        line = parsed(b'{"custom_id":%b}' % found[1]) or {} if found else {}
    name = line.get("custom_id")
    return name if isinstance(name, str) else None
