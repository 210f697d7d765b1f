"""What the commands show: the status of a job, and of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openai_eval_client._headers import Quota
    from openai_eval_client.models import BatchJobStatus

_MOST_ERRORS = 10  # of a job's, in its table
_WIDE = 1000  # columns where no terminal says how many: a job's id stays on one line


def show(found: BatchJobStatus, *, as_json: bool) -> None:
    """Write a job's status to standard output."""
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        _print(_table(found))


def show_all(jobs: Sequence[BatchJobStatus], *, as_json: bool) -> None:
    """Write the status of several jobs to standard output."""
    if as_json:
        typer.echo(f"[{','.join(job.model_dump_json() for job in jobs)}]")
    else:
        _print(_table_of(jobs))


def show_limits(found: Mapping[str, Mapping[str, Quota]]) -> None:
    """Write the limits of several models to standard output."""
    table = Table(box=box.SIMPLE)
    table.add_column("model", overflow="fold")
    for name in ("RPM", "left", "full in", "TPM", "left", "full in"):
        table.add_column(name, justify="right")
    for model, quotas in found.items():
        cells = [cell for name in ("requests", "tokens") for cell in _cells(quotas.get(name))]
        table.add_row(Text(model), *cells)
    _print(table)


def _cells(quota: Quota | None) -> tuple[str, str, str]:
    if quota is None:
        return "", "", ""
    return f"{quota.limit:,}", f"{quota.remaining:,}", "" if quota.reset is None else f"{quota.reset:g} s"


def _print(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(table)


def _table(found: BatchJobStatus) -> Table:
    rows = {
        "job": found.job_id,
        "status": found.status,
        "created": f"{found.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "ended": f"{found.completed_at:%Y-%m-%d %H:%M:%S} UTC" if found.completed_at else "",
        "requests": f"{found.request_count:,}",
        "answered": f"{found.completed_count:,}",
        "failed": f"{found.failed_count:,}",
        "errors": _errors(found),
    }
    table = Table(show_header=False, box=box.SIMPLE)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _errors(found: BatchJobStatus) -> str:
    lines = [
        (f"request {error.index}: " if error.line else "")
        + (f"{error.code}: " if error.code else "")
        + error.message
        for error in found.errors[:_MOST_ERRORS]
    ]
    more = len(found.errors) - len(lines)
    return "\n".join([*lines, f"and {more} more"] if more else lines)


def _table_of(jobs: Sequence[BatchJobStatus]) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("created (UTC)", "status"):
        table.add_column(name)
    for name in ("requests", "answered", "failed"):
        table.add_column(name, justify="right")
    table.add_column("job", overflow="fold")
    for job in jobs:
        counts = (job.request_count, job.completed_count, job.failed_count)
        created = f"{job.created_at:%Y-%m-%d %H:%M}"
        table.add_row(created, job.status, *(f"{count:,}" for count in counts), Text(job.job_id))
    return table
