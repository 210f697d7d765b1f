"""Everything a simulated server can be told, plans of batches included, checked once."""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ._catalog import SPOILERS
from ._faults import FAULTS, Script

FUNCTIONS = ("answer", "count_tokens")
POSITIVE = ("rpm", "tpm", "window")
NOT_NEGATIVE = (
    "port", "default_output", "quota_exhausted_after", "latency", "latency_sigma", "unavailable_retry_after",
    "output_tokens", "cached_tokens", "record", "batch_seconds", "enqueued_tokens", "file_lag",
    "fault_wait", "background_polls", "background_seconds", "background_poll_after",
)  # fmt: skip
CHOICES = {
    "charge": ("upfront", "actual"),
    "stamp": ("answer", "admission"),
    "enqueued_refusal": ("create", "later"),
    "unknown_file": ("create", "later"),
}
LAST_PORT = 65_535

OUTCOMES = (  # of a line of a batch
    "ok", "400", "429", "500", "expired", "cancelled", "missing", "duplicate", "duplicate_error",
    "unknown_id", "timeout", "status_0", "truncated", "null_body", "garbage", "status_text", "body_text",
    *SPOILERS,
)  # fmt: skip
TERMINAL = ("completed", "failed", "expired", "cancelled")
STATUSES = ("validating", "in_progress", "finalizing", "cancelling", *TERMINAL)
COUNTS = ("total", "completed", "failed")

ENDPOINTS = (
    "upload", "list_files", "retrieve_file", "delete", "content", "create", "list", "retrieve", "cancel",
    "retrieve_response", "cancel_response", "delete_response",
)  # fmt: skip
BEFORE = ("500", "503", "429", "drop", "hang")  # faults without the effect of the call
AFTER = ("500_after", "drop_after", "hang_after")  # faults with its effect, but without its answer
UNITS = {"m": 60, "h": 3600, "d": 86_400}  # seconds


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
    script: Sequence[str | tuple[str, Any]] | None = None
    fault_wait: float = 1.0
    lenient: bool = False
    unavailable_retry_after: float | None = None
    seed: int = 0
    answer: Callable[[dict[str, Any]], str] | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    count_tokens: Callable[[str], int] | None = None
    record: int = 100_000
    background_polls: int = 1
    background_seconds: float | None = None
    background_poll_after: float | None = None
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
        self._check_values()
        _check_probabilities("faults", self.faults, FAULTS)
        _check_rules(self.script or ())
        _check_plans(self.batch_plans)
        _check_probabilities("batch_faults", self.batch_faults, OUTCOMES[1:])
        _check_endpoints("endpoint_script", self.endpoint_script, _check_script)
        _check_endpoints("endpoint_faults", self.endpoint_faults, _check_probabilities)
        for window in self.completion_windows:
            window_seconds(window)

    def _check_values(self) -> None:
        for name in POSITIVE:
            check_positive(name, getattr(self, name))
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, not {value!r}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.port > LAST_PORT:
            raise ValueError(f"port must be at most {LAST_PORT}, not {self.port!r}")
        for name in ("models", "completion_windows"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a collection of strings, not {getattr(self, name)!r}")  # noqa: TRY004


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one batch is to do."""

    status: str = "completed"  # its last status; it stays for ever at one that is not terminal
    seconds: float | None = None  # from its creation to its end; None: the server's `batch_seconds`
    done: float | None = None  # share of its lines that are run
    lines: Sequence[str] | None = None  # outcomes of its first lines; None: drawn at random
    output_file: bool | str = True  # "": an empty id, "empty": an empty file, "gone": an id without a file
    error_file: bool | str = True
    counts: Mapping[str, int] = field(default_factory=dict)  # shown instead of the true ones
    errors: Sequence[Mapping[str, Any]] | None = None  # shown instead of the true ones
    input_gone: bool = False  # whether its input file is deleted at the end

    @property
    def share(self) -> float:
        """The share of its lines to run: half of them if it does not say and some must be left."""
        if self.done is not None:
            return self.done
        cut_short = self.status in ("expired", "cancelled", "cancelling")
        return 0.5 if cut_short and self.lines is None else 1.0

    @property
    def runs(self) -> bool:
        """Whether it passes validation: a failed batch does only if the plan speaks of its lines."""
        return self.status != "failed" or self.done is not None or self.lines is not None


def plan_of(given: Mapping[str, Any]) -> Plan:
    """Return the plan a user gave; errors alone mean that the batch fails."""
    return Plan(**{"status": "failed" if given.get("errors") else "completed", **given})


def _several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _number(value: Any, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def _counts(value: Any) -> bool:
    known = isinstance(value, Mapping) and set(value) <= {*COUNTS}
    return known and all(isinstance(count, int) for count in value.values())


def _file(value: Any) -> bool:
    return value in (True, False, "", "empty", "gone")


PLAN: dict[str, tuple[Callable[[Any], bool], str]] = {  # key: whether a value is allowed, what it must be
    "status": (lambda value: value in STATUSES, f"one of {', '.join(STATUSES)}"),
    "seconds": (_number, "a number of seconds, not negative"),
    "done": (lambda value: _number(value, 1), "a share from 0 to 1"),
    "lines": (
        lambda value: _several(value) and all(outcome in OUTCOMES for outcome in value),
        f"a list of outcomes, each one of {', '.join(OUTCOMES)}",
    ),
    "output_file": (_file, 'True, False, "", "empty" or "gone"'),
    "error_file": (_file, 'True, False, "", "empty" or "gone"'),
    "counts": (_counts, f"a mapping of {', '.join(COUNTS)} to integers"),
    "errors": (
        lambda value: _several(value) and all(isinstance(error, Mapping) for error in value),
        "a list of mappings with code, message, param and line",
    ),
    "input_gone": (lambda value: isinstance(value, bool), "True or False"),
}


def _check_plans(plans: Sequence[Mapping[str, Any]]) -> None:
    if not _several(plans):
        raise ValueError(f"batch_plans must be a list of mappings, not {plans!r}")
    for number, plan in enumerate(plans):
        if not isinstance(plan, Mapping):
            raise ValueError(f"batch_plans[{number}] must be a mapping, not {plan!r}")  # noqa: TRY004
        for name, value in plan.items():
            if name not in PLAN:
                raise ValueError(f"batch_plans[{number}]: {name!r} is unknown; use any of {', '.join(PLAN)}")
            allowed, needs = PLAN[name]
            if not allowed(value):
                raise ValueError(f"batch_plans[{number}]: {name} must be {needs}, not {value!r}")


def check_positive(name: str, value: float | None) -> None:
    """Raise ValueError for a limit that could never admit anything."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, not {value!r}")


def _check_probabilities(option: str, given: Mapping[str, float], known: Sequence[str]) -> None:
    wrong = [f"{name}={p!r}" for name, p in given.items() if name not in known or not 0 <= p <= 1]
    if wrong:
        raise ValueError(
            f"{option}: {', '.join(wrong)}; give a probability from 0 to 1 for any of {', '.join(known)}"
        )
    if math.fsum(given.values()) > 1:
        raise ValueError(f"{option}: the probabilities of {', '.join(given)} sum to more than 1")


def _check_script(option: str, script: Sequence[str], known: Sequence[str]) -> None:
    wrong = [script] if isinstance(script, str) else [name for name in script if name not in ("ok", *known)]
    if wrong:
        names = ", ".join(map(repr, wrong))
        raise ValueError(f"{option}: {names}; give a list of any of ok, {', '.join(known)}")


def _check_rules(script: Sequence[Any]) -> None:
    """Raise ValueError for a name that is no fault, and for what is neither that nor a pattern's outcome."""
    names, rules = script_parts(script)
    _check_script("script", script if isinstance(script, str) else names, FAULTS)
    try:
        Script(rules)
    except (TypeError, ValueError, re.error) as problem:
        needs = "pairs: a regular expression, and a fault, a text, bytes, a mapping, or a list of these"
        raise ValueError(f"script: {problem}; give names of faults, or {needs}") from None


def script_parts(script: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """Return the names in a script, for the first generations in order, and its pairs, for patterns."""
    names = [entry for entry in script if isinstance(entry, str)]
    return names, [entry for entry in script if not isinstance(entry, str)]


def _check_endpoints(option: str, given: Mapping[str, Any], check: Callable[[str, Any, Any], None]) -> None:
    """Raise ValueError for an unknown endpoint, or for a wrong script or probability of a known one."""
    if wrong := [repr(name) for name in given if name not in ENDPOINTS]:
        raise ValueError(f"{option}: {', '.join(wrong)}; use any of {', '.join(ENDPOINTS)}")
    for endpoint, events in given.items():
        check(f"{option}: {endpoint}", events, endpoint_events(endpoint))


def endpoint_events(endpoint: str) -> tuple[str, ...]:
    """Return what can happen to a call of an endpoint; only a download can end in the middle."""
    return (*BEFORE, *AFTER, *(("truncate",) if endpoint == "content" else ()))


def window_seconds(window: str) -> int:
    """Return the seconds of a completion window such as "24h" or "7d"; raise ValueError for another text."""
    found = re.fullmatch(r"(\d+)([mhd])", window) if isinstance(window, str) else None
    if not found:
        raise ValueError(f'completion_windows: {window!r}; give minutes, hours or days as "30m", "24h", "7d"')
    return int(found[1]) * UNITS[found[2]]


def as_json(options: Options) -> dict[str, Any]:
    """Return the options that another process can be given: all but the functions."""
    values = {f.name: getattr(options, f.name) for f in fields(Options) if f.name not in FUNCTIONS}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=_plain))
    return plain


def _plain(value: Collection[Any]) -> Any:
    if isinstance(value, bytes):
        return {"base64": b64encode(value).decode()}
    return dict(value) if isinstance(value, Mapping) else list(value)
