"""The report command: what a cache file holds, as a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from openai_eval_client._cli_common import BAD_INPUT, exit_codes, fail, say


def report(
    cache: Annotated[str, typer.Argument(help="The cache file of a run; it is only read.", metavar="CACHE")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The page; - for standard output; CACHE.html by default."),
    ] = None,
) -> None:
    """Write a page about the answers that a cache holds, also while a run adds to it."""
    from openai_eval_client._kept import read_kept  # some Pythons are built without SQLite
    from openai_eval_client._page import write
    from openai_eval_client._report_cache import cache_page, summary

    target = output or f"{Path(cache).name}.html"
    with exit_codes():
        if target != "-" and Path(target).exists() and Path(cache).exists() and Path(target).samefile(cache):
            fail(BAD_INPUT, f"--output {target} is the cache itself")
        kept = read_kept(cache)
        if target == "-":
            sys.stdout.write(cache_page(kept))
            return
        path = write(target, cache_page(kept))
    say(summary(kept))
    print(path)  # noqa: T201  # for who goes on with it
