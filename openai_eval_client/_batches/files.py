"""The input files of batches: checked requests, one line each, cut to the size that the API takes."""

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
from typing import IO, TYPE_CHECKING, Any

from openai_eval_client._validation import check_text, reject_input
from openai_eval_client._wire import check_parameters, check_prompt, read_json
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import BatchRequest

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    from openai_eval_client._wire import Parameters


ENDPOINTS = {"chat": "/v1/chat/completions", "responses": "/v1/responses"}
MOST_BYTES = 200_000_000  # of one input file: https://platform.openai.com/docs/guides/batch
MIXED = "mixed"  # the temperature of a part whose requests differ in it


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a job."""

    index: int  # its position in the caller's list
    custom_id: str  # its name on the wire
    parameters: Parameters  # what is asked, checked
    prompt: str | Sequence[Any]  # the prompt, checked


@dataclass(slots=True, eq=False)
class InputFile:
    """The requests of one input file, of one model."""

    file: IO[bytes]  # its lines; an unnamed file that goes when it is closed
    model: str  # the model of all of them
    temperature: float | str | None = None  # what all of them ask; None: nothing; "mixed": they differ
    first: int = 0  # the position of its first line among all lines of the job
    # the position of each line's request in the caller's list
    indexes: array[int] = field(default_factory=lambda: array("L"))
    size: int = 0  # bytes
    numbered: bool = True  # whether each custom_id ends with the request's index
    digest: Any = field(default_factory=hashlib.sha256)  # A hash of the lines
    file_id: str | None = None  # the uploaded file, once there is one

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


def line_of(item: BatchLine) -> bytes:
    """Return a request as a line of an input file."""
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
        reject_input(f"requests[{item.index}]", item.prompt, why, field="prompt", index=item.index)
    return data


def write_parts(
    items: Iterable[BatchLine], *, most_lines: int, most_bytes: int = MOST_BYTES
) -> list[InputFile]:
    """Write all requests to files on disk: one or several of each model, in the order of the requests."""
    by_model: dict[str, list[InputFile]] = {}
    try:
        for item in items:
            line = line_of(item)
            parts = by_model.setdefault(item.parameters.model, [])
            if not parts or parts[-1].count >= most_lines or parts[-1].size + len(line) > most_bytes:
                parts.append(InputFile(_unnamed_file(), item.parameters.model))
            parts[-1].add(line, item.index, item.parameters.body.get("temperature"))
    except BaseException:
        close_files(part for parts in by_model.values() for part in parts)
        raise
    return _in_a_row([part for parts in by_model.values() for part in parts])


async def write_aside(items: Iterable[BatchLine], *, most_lines: int) -> list[InputFile]:
    """Do `write_parts` in a thread; nobody is left with its files where the wait for it is cancelled."""
    written: list[InputFile] = []
    abandoned = threading.Event()

    def write() -> None:
        written.extend(write_parts(items, most_lines=most_lines))
        if abandoned.is_set():
            close_files(written)

    try:
        await asyncio.to_thread(write)
    except BaseException:
        abandoned.set()
        close_files(written)
        raise
    return written


def cut_lines(part: InputFile, counts: Sequence[int]) -> list[InputFile]:
    """Cut a part into several with so many lines each, and close it."""
    part.file.seek(0)
    smaller: list[InputFile] = []
    first = 0
    for count in counts:
        piece = InputFile(_unnamed_file(), part.model, first=part.first + first, numbered=part.numbered)
        for position in range(first, first + count):
            piece.add(part.file.readline(), part.indexes[position], None)
        piece.temperature = part.temperature
        smaller.append(piece)
        first += count
    part.file.close()
    return smaller


def recut(parts: Iterable[InputFile], spans: Iterable[tuple[int, int]]) -> list[InputFile]:
    """Cut parts as they were cut before, by the first line and the count of each piece."""
    counts = dict(spans)
    pieces: list[InputFile] = []
    for part in parts:
        firsts = [first for first in counts if part.first <= first < part.first + part.count]
        exact = sum(counts[first] for first in firsts) == part.count
        pieces += (
            cut_lines(part, [counts[first] for first in sorted(firsts)])
            if len(firsts) > 1 and exact
            else [part]
        )
    return pieces


def even_parts(count: int, pieces: int) -> list[int]:
    """Return `count` as a sum of so many whole numbers of about the same size, none of them 0."""
    pieces = max(1, min(pieces, count))
    return [count * (n + 1) // pieces - count * n // pieces for n in range(pieces)]


def close_files(parts: Iterable[InputFile]) -> None:
    """Delete the files."""
    for part in parts:
        part.file.close()


def _unnamed_file() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="openai_eval_client-")  # closed with its part


def _in_a_row(parts: list[InputFile]) -> list[InputFile]:
    first = 0
    for part in parts:
        part.first = first
        first += part.count
        part.file.flush()
    return parts


def naming(custom_ids: Sequence[str | None], *, several_models: bool) -> Iterator[str]:
    """Yield the custom_id of each request on the wire."""
    # The caller's own names stay as they are, but for jobs of several models: those are sorted into files by
    # model, and an appended `#index` then keeps the order.
    seen: dict[str, int] = {}
    named = any(name is not None for name in custom_ids)
    for index, own in enumerate(custom_ids):
        name = number(index) if own is None else own
        if named and seen.setdefault(name, index) != index:
            why = f"the same as that of requests[{seen[name]}]: each must be another"
            reject_input(f"requests[{index}].custom_id", name, why, field="custom_id", index=index)
        yield f"{own}#{index}" if several_models and own is not None else name


_NAME = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')  # in a line that is cut short


@dataclass(slots=True)
class RequestIndex:
    """What a batch was asked, as far as it is known."""

    indexes: Any  # a sequence of int
    by_name: dict[str, int] | None = None  # the index of each custom_id; None where it ends with the index
    temperatures: dict[int, float | None] | None = None  # what each request asked, where they differ
    temperature: float | None = None  # what all of them asked; None: nothing
    empty: Sequence[int] = ()  # the numbers of the empty lines between them, rising

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


def read_manifest(lines: Iterable[bytes], *, numbered: bool, start: int) -> RequestIndex:
    """Read what a batch was asked from its input file."""
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
    return RequestIndex(indexes, by_name, temperatures, empty=empty)


def guess_manifest(files: Iterable[IO[bytes]], *, numbered: bool, start: int, count: int) -> RequestIndex:
    """Make up the manifest of a batch whose input file is gone, from its results."""
    names: dict[str, int] = {}
    for file in files:
        for raw in file:
            name = name_of(parsed(raw), raw)
            index = None if name is None else index_in(name) if numbered else start + len(names)
            if name is not None and index is not None:
                names.setdefault(name, index)
        file.seek(0)
    indexes = sorted(set(names.values())) if numbered else range(start, start + max(count, len(names)))
    return RequestIndex(indexes, names)


def read_bodies(lines: Iterable[bytes], wanted: Mapping[int, int]) -> dict[int, Any]:
    """Return the bodies of some requests of an input file."""
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


_ONLINE_ONLY = ("extra_headers", "extra_query", "timeout")
_TIERS = frozenset({None, "auto", "default"})  # a batch is a tier of its own


def endpoint_of(api: object) -> str:
    """Return the endpoint of an api, "chat" or "responses"."""
    if not isinstance(api, str) or api not in ENDPOINTS:
        reject_input("api", api, "must be 'chat' or 'responses'")
    return ENDPOINTS[api]


def listed(requests: object) -> list[BatchRequest]:
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


def checked(requests: Sequence[BatchRequest], *, api: str, default_model: str) -> Iterator[BatchLine]:
    """Yield each request, checked, by the name it has on the wire."""
    for index, request in enumerate(requests):
        if request.custom_id is not None:
            name = f"requests[{index}].custom_id"
            check_text(request.custom_id, name, field="custom_id", index=index)
    models = {_model_of(request) or default_model for request in requests}
    names = naming([request.custom_id for request in requests], several_models=len(models) > 1)
    known: dict[Hashable, Parameters] = {}
    for index, (request, name) in enumerate(zip(requests, names, strict=True)):
        try:
            key = _key(request)
            parameters = known.get(key)
            if parameters is None:
                parameters = known[key] = _parameters(request, api, default_model)
            prompt = _prompt_of(request)
            check_prompt(prompt)
        except ValidationError as error:
            message = f"requests[{index}]: {error}"
            raise ValidationError(message, field=error.field, index=index) from None
        yield BatchLine(index, name, parameters, prompt)


def is_numbered(requests: Sequence[BatchRequest], *, default_model: str) -> bool:
    """Return whether every custom_id on the wire ends with the request's index."""
    several = len({_model_of(request) or default_model for request in requests}) > 1
    return several or all(request.custom_id is None for request in requests)


def refuse_online_only(params: Mapping[str, Any]) -> None:
    """Refuse parameters that no line of a batch can carry."""
    for name in _ONLINE_ONLY:
        if params.get(name) is not None:
            reject_input(name, params[name], "a request in a batch has none of its own")
    if params.get("service_tier") not in _TIERS:
        reject_input("service_tier", params["service_tier"], "a batch is a tier of its own")


def _model_of(request: BatchRequest) -> str | None:
    """Return the model that a request names."""
    extra = (request.model_extra or {}).get("extra_body")
    named = extra.get("model") if isinstance(extra, dict) else None
    given = named if isinstance(named, str) else request.model
    return given if isinstance(given, str) else None  # refused by and by


def _prompt_of(request: BatchRequest) -> Any:
    """Return its prompt or messages; a request may have been changed since it was made."""
    if request.prompt is not None and request.messages is not None:
        reject_input("messages", request.messages, "give either prompt or messages")
    return request.messages if request.prompt is None else request.prompt


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


def _key(request: BatchRequest) -> Hashable:
    """Return what tells the parameters of two requests apart; most of a job share theirs."""
    named = (request.model, request.temperature, type(request.temperature), request.max_tokens)
    extra = request.model_extra
    try:
        hash(named)
    except TypeError:  # refused by and by
        return id(request)
    return (*named, _frozen(extra)) if extra else named


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_frozen, value))
    try:
        hash(value)
    except TypeError:
        return id(value)  # alive as long as its request
    return type(value), value


_DIGITS = 19  # more than any index has


def index_in(custom_id: str) -> int | None:
    """Return the index at the end of a custom_id of a numbered batch; None for any other custom_id."""
    name = custom_id.rstrip("0123456789")
    digits = custom_id[len(name) :]
    ours = name == "request-" or name.endswith("#")
    return int(digits) if ours and 0 < len(digits) < _DIGITS else None
