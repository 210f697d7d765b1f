"""A run as one page, as progress while it goes, and as tables in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openai_eval_client._report import html  # noqa: F401  # registers what a notebook shows
from openai_eval_client._report.progress import (
    Display,
    Guarded,
    Progress,
    ProgressSnapshot,
    bar_is_open,
    both,
    report,
    write_above,
)
from openai_eval_client._report.rows import outcomes_of, row_of, to_pandas

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from openai_eval_client._account import Account

__all__ = [
    "Display",
    "Guarded",
    "Progress",
    "ProgressSnapshot",
    "bar_is_open",
    "both",
    "outcomes_of",
    "report",
    "row_of",
    "to_pandas",
    "write_above",
    "write_report",
]


def write_report(path: str | os.PathLike[str], account: Account, base_url: str, title: str | None) -> Path:
    """Write the page about what a client did, and return its path."""
    from openai_eval_client._report import page  # not needed at the start

    return page.write_report(path, account, base_url, title)
