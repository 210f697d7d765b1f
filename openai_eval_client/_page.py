"""A page that stands alone: no script, nothing loaded from anywhere; written whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from openai_eval_client._html import Markup, clock, escape
from openai_eval_client._replacing import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser itself sees to it


def _style() -> str:
    return Path(__file__).with_name("_report.css").read_text(encoding="utf-8")


def page(title: str, about: str, summary: object, sections: Iterable[str]) -> Markup:
    """Return a page.

    Args:
        title: Its heading.
        about: Where the figures come from.
        summary: All of it in a line.
        sections: The rest, as HTML.
    """
    made = clock(time.time())
    return Markup(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main>\n"
        f'<header><h1>{escape(title)}</h1><p class="meta">{escape(about)}; written {made}</p>'
        f'<p class="summary">{escape(summary)}</p></header>\n{"".join(sections)}</main></body></html>\n'
    )


def section(heading: str, content: str, *, note: str = "") -> Markup:
    """Return a part of a page under its heading; `note` says how to read it."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return Markup(f"<section><h2>{escape(heading)}</h2>{said}{content}</section>\n")


def tiles(figures: Mapping[str, object]) -> Markup:
    """Return the figures that matter most, side by side."""
    each = (
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in figures.items()
    )
    return Markup(f'<dl class="tiles">{"".join(each)}</dl>\n')


def card(content: object, *, kind: str = "") -> Markup:
    """Return something in a frame, which scrolls where it is too wide."""
    return Markup(f'<div class="card {kind}"><div class="scroll">{escape(content)}</div></div>')


def figure(heading: object, drawn: str, keys: Mapping[str, str], *, kind: str = "") -> Markup:
    """Return a picture under its heading, with its keys: the class of each colour and what it stands for."""
    swatches = "".join(
        f'<span class="key"><span class="swatch {style}"></span>{escape(label)}</span>'
        for style, label in keys.items()
    )
    caption = f"<figcaption>{swatches}</figcaption>" if keys else ""
    return Markup(f'<figure class="card {kind}"><h3>{escape(heading)}</h3>{drawn}{caption}</figure>')


def figures(drawn: Iterable[str]) -> Markup:
    """Return pictures side by side, where there is room."""
    return Markup(f'<div class="figures">{"".join(drawn)}</div>')


def part(share: float, said: object) -> Markup:
    """Return a value with a bar beside it that shows its share (0 to 1) of the largest."""
    bar = f'<span class="part" style="width:{100 * min(share, 1.0):.1f}%"></span>' if share > 0 else ""
    return Markup(f'<span class="track">{bar}</span><span class="amount">{escape(said)}</span>')


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page, in place of what was there, as `replacing` does.

    Returns:
        The path, as it was given.

    Raises:
        OSError: It cannot be written there.
    """
    try:
        with replacing(os.fspath(path)) as file:
            file.write(text.encode())
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None  # the name that the caller knows
        raise
    return Path(path)
