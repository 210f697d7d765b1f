"""Everything a simulated server can be told, checked once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from ._faults import check_faults, check_script
from ._plans import (
    OUTCOMES,
    check_endpoint_faults,
    check_endpoint_script,
    check_plans,
    check_probabilities,
    window_seconds,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CALLABLES = ("answer", "count_tokens")
POSITIVE = ("rpm", "tpm", "window")
NOT_NEGATIVE = (
    "port", "default_output", "quota_exhausted_after", "latency", "latency_sigma", "unavailable_retry_after",
    "output_tokens", "cached_tokens", "record", "batch_seconds", "enqueued_tokens", "file_lag",
)  # fmt: skip
WHEN = ("create", "later")
CHOICES = {
    "charge": ("upfront", "actual"),
    "stamp": ("answer", "admission"),
    "enqueued_refusal": WHEN,
    "unknown_file": WHEN,
}


_LAST_PORT = 65_535


@dataclass(kw_only=True, eq=False)
class Options:
    """Options of a simulated server; `SimulatedServer` documents them."""

    port: int = 0
    api_key: str | None = field(default=None, repr=False)
    models: Collection[str] | None = None
    rpm: float | None = None
    tpm: float | None = None
    window: float = 60.0
    charge: Literal["upfront", "actual"] = "upfront"
    default_output: int = 16
    headers: bool = True
    retry_after: bool = True
    stamp: Literal["answer", "admission"] = "answer"
    quota_exhausted_after: int | None = None
    latency: float = 0.0
    latency_sigma: float = 0.25
    faults: Mapping[str, float] = field(default_factory=dict)
    script: Sequence[str] | None = None
    unavailable_retry_after: float | None = None
    seed: int = 0
    answer: Callable[[dict[str, Any]], str] | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    count_tokens: Callable[[str], int] | None = None
    record: int = 100_000
    batch_seconds: float = 0.2
    batch_plans: Sequence[Mapping[str, Any]] = ()
    batch_faults: Mapping[str, float] = field(default_factory=dict)
    completion_windows: Collection[str] = ("24h",)
    enqueued_tokens: int | None = None
    enqueued_refusal: Literal["create", "later"] = "later"
    unknown_file: Literal["create", "later"] = "create"
    file_lag: float = 0.0
    endpoint_script: Mapping[str, Sequence[str]] = field(default_factory=dict)
    endpoint_faults: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ranges: bool = True

    def __post_init__(self) -> None:
        for name in POSITIVE:
            check_positive(name, getattr(self, name))
        for name in NOT_NEGATIVE:
            self._check_not_negative(name)
        for name, allowed in CHOICES.items():
            self._check_choice(name, allowed)
        if self.port > _LAST_PORT:
            raise ValueError(f"port must be {_LAST_PORT} at most, not {self.port!r}")
        if isinstance(self.models, str):
            raise ValueError(f"models must be several names, not {self.models!r}")  # noqa: TRY004
        check_faults(self.faults)
        check_script(self.script or ())
        self._check_batches()

    def _check_batches(self) -> None:
        check_plans(self.batch_plans)
        check_probabilities("batch_faults", self.batch_faults, OUTCOMES[1:])
        check_endpoint_script(self.endpoint_script)
        check_endpoint_faults(self.endpoint_faults)
        if isinstance(self.completion_windows, str):
            raise ValueError(f"completion_windows must be several, not {self.completion_windows!r}")  # noqa: TRY004
        for window in self.completion_windows:
            window_seconds(window)

    def _check_not_negative(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must not be negative, not {value!r}")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")


def check_positive(name: str, value: float | None) -> None:
    """Raise ValueError for a limit that could never admit anything."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive or None, not {value!r}")


def as_json(options: Options) -> dict[str, Any]:
    """The options another process can be given, the two functions left out."""
    values = {f.name: getattr(options, f.name) for f in fields(Options) if f.name not in CALLABLES}
    values["models"] = None if options.models is None else sorted(options.models)
    plain: dict[str, Any] = _plain(values)
    return plain


def _plain(value: Any) -> Any:
    """The same in dicts and lists."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Collection) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
