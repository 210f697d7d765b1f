"""What the metadata of a batch says: ours, from which a job is put together again, and the caller's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openai_eval_client._batch_lines import MIXED, part_key
from openai_eval_client._checks import check_mapping, check_text, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._batch_lines import Part

INTENT = "openai_eval_client_intent"
PART = "openai_eval_client_part"
_LONGEST_MODEL = 200  # characters: with the other values it fits in one of the metadata's
_PAIRS, _KEY, _VALUE = 16, 64, 512  # https://platform.openai.com/docs/api-reference/batch/create
_DIGITS = 19  # more than any index has


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the lines of a batch stand in their job.

    Attributes:
        intent: Names the job, before it has an id.
        total: Requests of the whole job.
        first: The position of the batch's first line among all lines of the job.
        count: How many lines it has.
        start: The index of its first request where the indexes are consecutive, else None.
        numbered: Whether each custom_id ends with the request's index.
        temperature: What all requests ask; None: nothing; "mixed": they differ.
        model: The model they ask.
    """

    intent: str
    total: int
    first: int
    count: int
    start: int | None
    numbered: bool
    temperature: float | str | None
    model: str = ""

    @classmethod
    def of(cls, part: Part, intent: str, total: int) -> Placement:
        """Say where a part stands."""
        low, high = part.indexes[0], part.indexes[-1]
        consecutive = high - low + 1 == part.count  # they rise
        return cls(
            intent=intent,
            total=total,
            first=part.first,
            count=part.count,
            start=low if consecutive else None,
            numbered=part.numbered,
            temperature=part.temperature,
            model=part.model if len(part.model) <= _LONGEST_MODEL else "",
        )

    @property
    def part_key(self) -> str:
        """The key of the part that it is of."""
        return part_key(self.first, self.count)

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from every other batch."""
        return self.intent, self.first, self.count

    def metadata(self) -> dict[str, str]:
        """Return our two pairs."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return {INTENT: self.intent, PART: json.dumps(values, separators=(",", ":"))}


_FIELDS = ("total", "first", "count", "start", "numbered", "temperature", "model")


def read_placement(metadata: object) -> Placement | None:
    """Return where a batch stands in its job; None where it is none of ours."""
    if not isinstance(metadata, dict):
        return None
    try:
        values = json.loads(metadata[PART])
        placement = Placement(intent=metadata[INTENT], **{name: values[name] for name in _FIELDS})
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return placement if _is_sound(placement) else None


def _is_sound(placement: Placement) -> bool:
    whole = (
        placement.total,
        placement.first,
        placement.count,
        0 if placement.start is None else placement.start,
    )
    temperature = placement.temperature
    return (
        all(type(number) is int and number >= 0 for number in whole)
        and isinstance(placement.intent, str)
        and isinstance(placement.numbered, bool)
        and isinstance(placement.model, str)
        and placement.first + placement.count <= placement.total
        and (temperature is None or temperature == MIXED or type(temperature) in {int, float})
    )


def index_in(custom_id: str) -> int | None:
    """Return the index at the end of a custom_id of a numbered batch; None for any other custom_id."""
    name = custom_id.rstrip("0123456789")
    digits = custom_id[len(name) :]
    ours = name == "request-" or name.endswith("#")
    return int(digits) if ours and 0 < len(digits) < _DIGITS else None


def check_metadata(metadata: object) -> dict[str, str]:
    """Return the caller's metadata, None as an empty dict.

    Raises:
        ValidationError: It is no dict of texts, or more than the API takes beside our two pairs.
    """
    if metadata is None:
        return {}
    check_mapping(metadata, "metadata")
    pairs: Mapping[str, Any] = metadata  # type: ignore[assignment]  # just checked
    if len(pairs) > _PAIRS - 2:
        refuse("metadata", metadata, f"has {len(pairs)} pairs; a batch takes {_PAIRS}, and two are ours")
    for key, value in pairs.items():
        _check_pair(key, value)
    return dict(pairs)


def _check_pair(key: str, value: object) -> None:
    name = f"metadata[{key!r}]"
    check_text(key, "metadata")
    if key in {INTENT, PART}:
        refuse(name, value, "this key is ours", field="metadata")
    if len(key) > _KEY:
        refuse(name, value, f"the key has {len(key)} characters; {_KEY} at most", field="metadata")
    if not isinstance(value, str):
        refuse(name, value, f"must be a str, not {type(value).__name__}", field="metadata")
    if not _is_unicode(value):
        refuse(name, value, "holds a lone surrogate: not valid Unicode", field="metadata")
    if len(value) > _VALUE:
        refuse(name, value, f"has {len(value)} characters; {_VALUE} at most", field="metadata")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
