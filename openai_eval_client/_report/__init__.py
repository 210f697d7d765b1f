"""A run as one page, as progress while it goes, and as tables in a notebook."""

from openai_eval_client._report import html  # registers what a notebook shows
from openai_eval_client._report.page import meaning, write_report
from openai_eval_client._report.progress import (
    Display,
    Guarded,
    Progress,
    Reading,
    bar_is_open,
    both,
    clock,
    report,
    write_above,
)
from openai_eval_client._report.rows import outcomes_of, row_of, to_pandas

__all__ = [
    "Display",
    "Guarded",
    "Progress",
    "Reading",
    "bar_is_open",
    "both",
    "clock",
    "html",
    "meaning",
    "outcomes_of",
    "report",
    "row_of",
    "to_pandas",
    "write_above",
    "write_report",
]
