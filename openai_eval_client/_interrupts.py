"""What Ctrl-C and SIGTERM do to a command where its work does not handle them: end it with 130, no traceback.

Imported before everything else, so it imports nothing that takes time, not even `typing` or `contextlib`.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

INTERRUPTED = 130
_NOT_OURS = (signal.SIG_IGN, None)  # as a shell has it for what runs in the background; not from Python
_PACKAGE, _PROGRAM = "openai_eval_client", "openai-eval-client"


def is_command() -> bool:
    """Return whether this process is one of our commands, not a program that imports the package."""
    program = str((getattr(sys, "argv", None) or [""])[0])
    if program == "-m":  # Python imports the package before it knows the module that it is to run
        flags = [word for word in sys.orig_argv[1:-1] if word.startswith("-") and word.endswith("m")]
        named = sys.orig_argv[sys.orig_argv.index(flags[0]) + 1] if flags else ""
        return named.partition(".")[0] == _PACKAGE
    return os.path.basename(program).partition(".")[0] == _PROGRAM  # noqa: PTH119


def handle(handler: Callable[..., object] | signal.Handlers) -> list[tuple[int, Any]]:
    """Have the signals handled, unless they are ignored; return the handlers before."""
    ours = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) not in _NOT_OURS]
    try:
        return [(number, signal.signal(number, handler)) for number in ours]
    except ValueError:  # not in the main thread, the only one that handles signals
        return []


def end(*_: object) -> None:
    """End the process at once, as a handler: an exception could be lost, or shown, by what it meets."""
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED)
