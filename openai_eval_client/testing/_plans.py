"""What becomes of batches and of calls to the Files and Batches endpoints, as told; checked once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OUTCOMES = (
    "ok", "400", "429", "500", "expired", "cancelled", "missing", "duplicate", "duplicate_error",
    "unknown_id", "timeout", "status_0", "truncated", "null_body", "no_usage", "garbage",
)  # fmt: skip
TERMINAL = ("completed", "failed", "expired", "cancelled")
STATUSES = ("validating", "in_progress", "finalizing", "cancelling", *TERMINAL)
FILES = (True, False, "", "empty", "gone")
COUNTS = ("total", "completed", "failed")
CUT_SHORT = ("expired", "cancelled", "cancelling")

BEFORE = ("500", "503", "429", "drop", "hang")
AFTER = ("500_after", "drop_after", "hang_after")
ENDPOINTS = (
    "upload", "list_files", "retrieve_file", "delete", "content", "create", "list", "retrieve", "cancel",
)  # fmt: skip
UNITS = {"m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What becomes of one batch.

    Attributes:
        status: Where it ends, or the status before that at which it stays for ever.
        seconds: From creation to the terminal state; None is the server's own.
        done: Share of the lines that are run.
        lines: Outcomes of the first lines in input order; None draws them at random.
        output_file: Whether there is a file of answers, where there are answers. Instead, "" is shown as its
            id, "empty" is a file of nothing, and "gone" an id that leads nowhere.
        error_file: The same for the file of failures.
        counts: Counts shown in place of the true ones.
        errors: Errors shown in place of the true ones.
        input_gone: Whether the input file is deleted at the end.
    """

    status: str = "completed"
    seconds: float | None = None
    done: float | None = None
    lines: Sequence[str] | None = None
    output_file: bool | str = True
    error_file: bool | str = True
    counts: Mapping[str, int] = field(default_factory=dict)
    errors: Sequence[Mapping[str, Any]] | None = None
    input_gone: bool = False

    @property
    def share(self) -> float:
        """The share to run: half, where nothing is said and some must be left."""
        if self.done is not None:
            return self.done
        return 0.5 if self.status in CUT_SHORT and self.lines is None else 1.0

    @property
    def runs(self) -> bool:
        """Whether it gets beyond its validation: a failed one only if the plan speaks of its lines."""
        return self.status != "failed" or self.done is not None or self.lines is not None


def plan_of(told: Mapping[str, Any]) -> Plan:
    """A plan as told; errors alone mean that the batch fails."""
    return Plan(**{"status": "failed" if told.get("errors") else "completed", **told})


def check_plans(plans: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError naming the first thing in a plan that makes no sense."""
    if not _several(plans):
        raise ValueError(f"batch_plans must be several mappings, not {plans!r}")
    for number, told in enumerate(plans):
        if not isinstance(told, Mapping):
            raise ValueError(f"batch_plans[{number}] must be a mapping, not {told!r}")  # noqa: TRY004
        for name, value in told.items():
            if name not in CHECKS:
                raise ValueError(
                    f"batch_plans[{number}]: {name!r} is unknown; known are: {', '.join(CHECKS)}"
                )
            if not CHECKS[name](value):
                raise ValueError(f"batch_plans[{number}]: {name} must be {NEEDS[name]}, not {value!r}")


def _several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _number(value: Any, least: float = 0.0, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


CHECKS: dict[str, Callable[[Any], bool]] = {
    "status": lambda value: value in STATUSES,
    "seconds": _number,
    "done": lambda value: _number(value, 0, 1),
    "lines": lambda value: _several(value) and all(outcome in OUTCOMES for outcome in value),
    "output_file": lambda value: value in FILES,
    "error_file": lambda value: value in FILES,
    "counts": lambda value: (
        isinstance(value, Mapping)
        and set(value) <= {*COUNTS}
        and all(isinstance(count, int) for count in value.values())
    ),
    "errors": lambda value: _several(value) and all(isinstance(error, Mapping) for error in value),
    "input_gone": lambda value: isinstance(value, bool),
}
NEEDS = {
    "status": f"one of {', '.join(STATUSES)}",
    "seconds": "a number of seconds, not negative",
    "done": "a share from 0 to 1",
    "lines": f"outcomes, each one of {', '.join(OUTCOMES)}",
    "output_file": 'True, False, "", "empty" or "gone"',
    "error_file": 'True, False, "", "empty" or "gone"',
    "counts": f"integers by name: {', '.join(COUNTS)}",
    "errors": "mappings with code, message, param and line",
    "input_gone": "True or False",
}


def check_probabilities(option: str, given: Mapping[str, float], known: Sequence[str]) -> None:
    """Raise ValueError naming each event that is unknown or has an impossible probability."""
    wrong = [f"{name}={p!r}" for name, p in given.items() if name not in known or not 0 <= p <= 1]
    if wrong:
        raise ValueError(
            f"{option}: {', '.join(wrong)}; need a probability in [0, 1] for: {', '.join(known)}"
        )
    if math.fsum(given.values()) > 1:
        raise ValueError(f"{option}: the probabilities of {', '.join(given)} sum to more than 1")


def endpoint_events(endpoint: str) -> tuple[str, ...]:
    """What can happen to a call of an endpoint; only a download can break off in the middle."""
    return (*BEFORE, *AFTER, *(("truncate",) if endpoint == "content" else ()))


def check_endpoints(option: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError for an endpoint that is unknown."""
    if wrong := [repr(name) for name in given if name not in ENDPOINTS]:
        raise ValueError(f"{option}: {', '.join(wrong)}; known are: {', '.join(ENDPOINTS)}")


def check_endpoint_script(script: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError naming the entries of `endpoint_script` that are unknown."""
    check_endpoints("endpoint_script", script)
    for endpoint, events in script.items():
        known = ("ok", *endpoint_events(endpoint))
        if isinstance(events, str) or any(event not in known for event in events):
            raise ValueError(
                f"endpoint_script: {endpoint}: {events!r}; known are, in a list: {', '.join(known)}"
            )


def check_endpoint_faults(faults: Mapping[str, Mapping[str, float]]) -> None:
    """Raise ValueError naming the entries of `endpoint_faults` that make no sense."""
    check_endpoints("endpoint_faults", faults)
    for endpoint, given in faults.items():
        check_probabilities(f"endpoint_faults: {endpoint}", given, endpoint_events(endpoint))


def window_seconds(window: str) -> int:
    """The seconds of a completion window such as "24h" or "7d".

    Raises:
        ValueError: It is no such window.
    """
    found = re.fullmatch(r"(\d+)([mhd])", window) if isinstance(window, str) else None
    if not found:
        raise ValueError(f'completion_windows: {window!r} is not a number and m, h or d, such as "24h"')
    return int(found[1]) * UNITS[found[2]]
