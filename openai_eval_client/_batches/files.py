"""The input files of batches: requests checked, written one a line, cut to the size that the API takes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import tempfile
import threading
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal

from openai_eval_client._validation import check_text, reject_input
from openai_eval_client._wire import BATCH_PATHS, check_parameters, check_prompt, read_json
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import BatchRequest

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
    from decimal import Decimal

    from openai_eval_client._cost import Reservation
    from openai_eval_client._wire import Parameters

MOST_BYTES = 200_000_000  # of one input file: https://platform.openai.com/docs/guides/batch
MIXED: Literal["mixed"] = "mixed"
Temperature = float | Literal["mixed"] | None  # of all requests; None: none was given; "mixed": they differ


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a job, checked."""

    index: int  # its position in the caller's list
    custom_id: str  # its name on the wire
    parameters: Parameters
    prompt: str | Sequence[Any]
    numbered: bool = True  # whether each custom_id of the job ends with the request's index

    def to_bytes(self) -> bytes:
        """Return the line of an input file."""
        line = {
            "custom_id": self.custom_id,
            "method": "POST",
            "url": BATCH_PATHS[self.parameters.api],
            "body": self.parameters.with_prompt(self.prompt),
        }
        data = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if len(data) > MOST_BYTES:
            why = f"{len(data):,} bytes as a line of a batch, whose file may have {MOST_BYTES:,}"
            reject_input(f"requests[{self.index}]", self.prompt, why, field="prompt", index=self.index)
        return data


def temporary_file() -> IO[bytes]:
    """Return a new file on disk, which is deleted when it is closed."""
    return tempfile.TemporaryFile(prefix="openai_eval_client-")


@dataclass(slots=True, eq=False)
class InputFile:
    """The lines of one batch, all of one model, and what is known of them."""

    model: str
    first: int = 0  # the position of its first line among all lines of the job
    numbered: bool = True  # whether each custom_id ends with the request's index
    named: bool = False  # whether any has anything else in it
    temperature: Temperature = None
    indexes: array[int] = field(default_factory=lambda: array("L"))  # of each line's request, rising
    size: int = 0  # bytes
    digest: Any = field(default_factory=hashlib.sha256)
    file: IO[bytes] = field(default_factory=temporary_file)
    file_id: str | None = None  # once it is uploaded
    tokens: int | None = None  # once they are counted
    ended_at: float = 0.0  # when its batch was first seen to have ended, of the monotonic clock; 0: not yet
    done: int = 0  # how many of its requests have ended, when its batch was last looked at
    costs: Sequence[Decimal] = ()  # USD that each line can cost at most; empty where there is no budget
    reservation: Reservation | None = None  # of what all lines can cost

    @property
    def count(self) -> int:
        """How many lines it has."""
        return len(self.indexes)

    @property
    def key(self) -> str:
        """What tells it from the other files of its job."""
        return f"{self.first}+{self.count}"

    def add(self, line: bytes, index: int, temperature: Temperature) -> None:
        """Append one line."""
        if not self.indexes:
            self.temperature = temperature
        elif self.temperature != temperature:
            self.temperature = MIXED
        self.file.write(line)
        self.digest.update(line)
        self.indexes.append(index)
        self.size += len(line)

    def lines(self) -> IO[bytes]:
        """Return the file, at its start."""
        self.file.seek(0)
        return self.file


def write_files(
    lines: Iterable[BatchLine], *, most_lines: int, most_bytes: int = MOST_BYTES
) -> list[InputFile]:
    """Write all requests to files on disk: one or several of each model, in the order of the requests."""
    by_model: dict[str, list[InputFile]] = {}
    try:
        for line in lines:
            data, model = line.to_bytes(), line.parameters.model
            files = by_model.setdefault(model, [])
            if not files or files[-1].count >= most_lines or files[-1].size + len(data) > most_bytes:
                files.append(InputFile(model, numbered=line.numbered))
            files[-1].add(data, line.index, line.parameters.body.get("temperature"))
            files[-1].named |= line.custom_id != numbered_id(line.index)
    except BaseException:
        close_files(file for files in by_model.values() for file in files)
        raise
    first = 0
    written = [file for files in by_model.values() for file in files]
    for file in written:
        file.first = first
        first += file.count
    return written


async def write_in_thread(lines: Iterable[BatchLine], **options: Any) -> list[InputFile]:
    """Do `write_files` in a thread; where the wait for it is cancelled, no file stays open."""
    written: list[InputFile] = []
    abandoned = threading.Event()

    def write() -> None:
        written.extend(write_files(lines, **options))
        if abandoned.is_set():
            close_files(written)

    try:
        await asyncio.to_thread(write)
    except BaseException:
        abandoned.set()
        close_files(written)
        raise
    return written


def cut_file(file: InputFile, counts: Sequence[int]) -> list[InputFile]:
    """Cut a file into several with so many lines each, and close it."""
    lines = file.lines()
    pieces: list[InputFile] = []
    first = 0
    for count in counts:
        costs = file.costs[first : first + count]
        piece = InputFile(file.model, first=file.first + first, numbered=file.numbered, costs=costs)
        piece.named = file.named
        for index in file.indexes[first : first + count]:
            piece.add(lines.readline(), index, file.temperature)
        pieces.append(piece)
        first += count
    file.file.close()
    return pieces


def recut(files: Iterable[InputFile], spans: Iterable[tuple[int, int]]) -> list[InputFile]:
    """Cut files as they were cut before, by the first line and the count of each piece."""
    counts = dict(spans)
    pieces: list[InputFile] = []
    for file in files:
        sizes = [counts[first] for first in sorted(counts) if file.first <= first < file.first + file.count]
        is_cut = len(sizes) > 1 and sum(sizes) == file.count
        pieces += cut_file(file, sizes) if is_cut else [file]
    return pieces


def even_counts(count: int, pieces: int) -> list[int]:
    """Return `count` as a sum of so many whole numbers of about the same size, none of them 0."""
    pieces = max(1, min(pieces, count))
    return [count * (n + 1) // pieces - count * n // pieces for n in range(pieces)]


def close_files(files: Iterable[InputFile]) -> None:
    """Delete the files."""
    for file in files:
        file.file.close()


# --- custom_ids -------------------------------------------------------------------------------------------

_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')  # in a line that is cut short
_DIGITS = 19  # more than any index has


def numbered_id(index: int) -> str:
    """Return the custom_id of a request to which the caller gave none."""
    return f"request-{index}"


def index_in(custom_id: str, *, named: bool = True) -> int | None:
    """Return the index at the end of a custom_id of a numbered batch; None for any other custom_id."""
    name = custom_id.rstrip("0123456789")
    digits = custom_id[len(name) :]
    ours = name == "request-" or (named and len(name) > 1 and name.endswith("#"))
    is_number = ours and 0 < len(digits) < _DIGITS and digits == str(int(digits))
    return int(digits) if is_number else None


def custom_ids(given: Sequence[str | None], *, several_models: bool) -> Iterator[str]:
    """Yield the custom_id of each request on the wire; refuse one that is no text, or not unique."""
    # The caller's own stay as they are, but for jobs of several models: those are sorted into files by
    # model, and an appended `#index` then keeps the order.
    seen: dict[str, int] = {}
    named = any(name is not None for name in given)
    for index, own in enumerate(given):
        if own is not None:
            check_text(own, f"requests[{index}].custom_id", field="custom_id", index=index)
        name = numbered_id(index) if own is None else own
        if named and seen.setdefault(name, index) != index:
            why = f"requests[{seen[name]}] has the same: each custom_id must be unique"
            reject_input(f"requests[{index}].custom_id", name, why, field="custom_id", index=index)
        yield f"{own}#{index}" if several_models and own is not None else name


def custom_id_of(line: dict[str, Any] | None, raw: bytes) -> str | None:
    """Return the custom_id of a line, also of one that is cut short."""
    if line is None:
        found = _CUSTOM_ID.search(raw)
        line = parse_line(b'{"custom_id":%b}' % found[1]) or {} if found else {}
    name = line.get("custom_id")
    return name if isinstance(name, str) else None


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """Return a line as an object; None where it is none, or cut short."""
    try:
        line = read_json(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def first_line(file: IO[bytes]) -> dict[str, Any]:
    """Return the first line of a file that is an object, else an empty one; leave the file at its start."""
    found = next(filter(None, map(parse_line, file)), None)
    file.seek(0)
    return found or {}


# --- what a file asked ------------------------------------------------------------------------------------


@dataclass(slots=True)
class RequestIndex:
    """What a batch was asked, as far as it is known: which line and which custom_id is which request."""

    indexes: Any  # a sequence of int: of the request of each line that is not empty
    by_name: dict[str, int] | None = None  # the index of each custom_id; None: each is just numbered
    numbered: bool = False  # whether each custom_id of `by_name` ends with the index
    temperatures: dict[int, float | None] | None = None  # of each request, where they differ
    temperature: Temperature = None  # of all requests, unless they differ
    empty: Sequence[int] = ()  # the numbers of the empty lines, rising
    is_guess: bool = False  # whether there may be requests that it does not have

    def index_at(self, line: int) -> int | None:
        """Return the index of the request in a line of the file, counted from 1; None for no request."""
        position = line - 1 - bisect_left(self.empty, line)
        known = 0 <= position < len(self.indexes) and line not in self.empty
        return int(self.indexes[position]) if known else None

    def index_of(self, custom_id: str | None) -> int | None:
        """Return the index of the request with this custom_id; None for a custom_id that is not ours."""
        if custom_id is None:
            return None
        return index_in(custom_id, named=False) if self.by_name is None else self.by_name.get(custom_id)

    def temperature_of(self, index: int) -> float | None:
        """Return the temperature that a request asks; None where it asks none, or it is not known."""
        if self.temperatures is not None:
            return self.temperatures.get(index)
        return None if self.temperature == MIXED else self.temperature


def read_index(lines: Iterable[bytes], *, numbered: bool, start: int) -> RequestIndex:
    """Read what a batch was asked from its input file."""
    indexes, by_name, temperatures = array("L"), dict[str, int](), dict[int, float | None]()
    empty = array("L")
    for number, raw in enumerate(lines, start=1):
        if raw.isspace():
            empty.append(number)
            continue
        line = parse_line(raw) or {}
        name, body = str(line.get("custom_id")), line.get("body")
        known = index_in(name) if numbered else None
        index = start + len(indexes) if known is None else known
        indexes.append(index)
        by_name[name] = index
        temperatures[index] = body.get("temperature") if isinstance(body, dict) else None
    return RequestIndex(indexes, by_name, numbered, temperatures, empty=empty)


def guess_index(
    files: Iterable[IO[bytes]], *, numbered: bool, start: int, count: int, named: bool = True
) -> RequestIndex:
    """Guess what a batch was asked from its results: its input file is gone."""
    names: dict[str, int] = {}
    for file in files:
        for raw in file:
            name = custom_id_of(parse_line(raw), raw)
            index = None if name is None else index_in(name, named=named) if numbered else start + len(names)
            if name is not None and index is not None:
                names.setdefault(name, index)
        file.seek(0)
    indexes = sorted(set(names.values())) if numbered else range(start, start + max(count, len(names)))
    return RequestIndex(indexes, names, numbered, is_guess=True)


def read_bodies(lines: Iterable[bytes], wanted: Mapping[int, int]) -> dict[int, Any]:
    """Return the bodies of some requests of an input file, by index; `wanted` has the index of each line."""
    present = (raw for raw in lines if not raw.isspace())
    found = {wanted[position]: parse_line(raw) for position, raw in enumerate(present) if position in wanted}
    bodies = {index: line.get("body") for index, line in found.items() if line}
    return {index: body for index, body in bodies.items() if isinstance(body, dict)}


# --- requests checked -------------------------------------------------------------------------------------

_ONLINE_ONLY = ("extra_headers", "extra_query", "timeout", "background")
_TIERS = frozenset({None, "auto", "default"})


def list_requests(requests: object) -> list[BatchRequest]:
    """Return the requests as a list."""
    if isinstance(requests, str | bytes | dict) or not hasattr(requests, "__iter__"):
        reject_input("requests", requests, f"must be a list of BatchRequest, not {type(requests).__name__}")
    found = list(requests)
    if not found:
        reject_input("requests", found, "must hold at least one request")
    for index, request in enumerate(found):
        if not isinstance(request, BatchRequest):
            why = f"must be a BatchRequest, not {type(request).__name__}"
            reject_input(f"requests[{index}]", request, why, field="requests", index=index)
    return found


def check_requests(requests: Sequence[BatchRequest], *, api: str, default_model: str) -> Iterator[BatchLine]:
    """Yield each request, checked, as a line."""
    several = len({_model_of(request) or default_model for request in requests}) > 1
    given = [request.custom_id for request in requests]
    numbered = several or all(custom_id is None for custom_id in given)
    names = custom_ids(given, several_models=several)
    known: dict[Hashable, Parameters] = {}  # most requests of a job share theirs
    for index, (request, name) in enumerate(zip(requests, names, strict=True)):
        try:
            key = _parameters_key(request)
            parameters = known.get(key)
            if parameters is None:
                parameters = known[key] = _parameters(request, api, default_model)
            prompt: Any = request.messages if request.prompt is None else request.prompt
            both = request.prompt is not None and request.messages is not None
            if both:  # it was changed since it was made
                reject_input("messages", request.messages, "give either prompt or messages")
            check_prompt(prompt, api=api)
        except ValidationError as error:
            message = f"requests[{index}]: {error}"
            raise ValidationError(message, field=error.field, index=index) from None
        yield BatchLine(index, name, parameters, prompt, numbered)


def _model_of(request: BatchRequest) -> str | None:
    """Return the model that a request names."""
    extra = (request.model_extra or {}).get("extra_body")
    named = extra.get("model") if isinstance(extra, dict) else None
    model = named if isinstance(named, str) else request.model
    return model if isinstance(model, str) else None  # refused when its parameters are checked


def refuse_online_only(params: Mapping[str, Any]) -> None:
    """Refuse parameters that no line of a batch can carry."""
    for name in _ONLINE_ONLY:
        if params.get(name) is not None:
            reject_input(name, params[name], "not possible for a request in a batch: leave it out")
    if params.get("service_tier") not in _TIERS:
        why = "a batch is a service tier of its own: leave it out"
        reject_input("service_tier", params["service_tier"], why)


def _parameters(request: BatchRequest, api: str, default_model: str) -> Parameters:
    params = dict(request.model_extra or {})
    refuse_online_only(params)
    return check_parameters(
        model=default_model if request.model is None else request.model,
        timeout=1.0,  # of no meaning here
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        system=params.pop("system", None),
        api=api,
        params=params,
    )


def _parameters_key(request: BatchRequest) -> Hashable:
    """Return what tells the parameters of two requests apart, types included: 1 is not 1.0 on the wire."""
    named = (request.model, request.temperature, type(request.temperature), request.max_tokens)
    try:
        hash(named)
    except TypeError:  # refused when its parameters are checked
        return id(request)
    return (*named, _frozen(request.model_extra)) if request.model_extra else named


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_frozen, value))
    try:
        hash(value)
    except TypeError:
        return id(value)  # it lives as long as its request
    return type(value), value
