"""Views of HTTP clients: each adds to a client and shares its whole state; the client stays as it is."""

from __future__ import annotations

import functools
from typing import Any


class View:
    """What a view adds to the class of the client that it views; the subclasses say what."""

    __slots__ = ()
    own: tuple[str, ...] = ()  # attributes of the view alone

    def __del__(self) -> None:
        """Leave closing to the client itself."""


def view_of(client: Any, kind: Any) -> Any:
    """Return a view of a client of either httpx family, of a kind of `View`.

    What is changed or closed on either is so on both.
    """
    view: Any = object.__new__(_class_of(kind, client.__class__))
    object.__setattr__(view, "__dict__", client.__dict__)
    return view


@functools.lru_cache(maxsize=64)
def _class_of(kind: Any, base: Any) -> Any:
    return type(f"{kind.__name__[1:]}{base.__name__}", (kind, base), {"__slots__": kind.own})
