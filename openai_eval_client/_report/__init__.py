"""A run as one page, as progress while it goes, and as tables in a notebook."""

from __future__ import annotations

from openai_eval_client._report.drawing import remarks
from openai_eval_client._report.page import write_report  # its imports register what a notebook shows
from openai_eval_client._report.progress import (
    NO_LIMITS,
    Display,
    Progress,
    ProgressSnapshot,
    bar_is_open,
    write_above,
)
from openai_eval_client._report.rows import outcomes_of, row_of, to_pandas

__all__ = [
    "NO_LIMITS",
    "Display",
    "Progress",
    "ProgressSnapshot",
    "bar_is_open",
    "outcomes_of",
    "remarks",
    "row_of",
    "to_pandas",
    "write_above",
    "write_report",
]
