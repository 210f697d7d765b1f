"""`openai-eval-client` and `python -m openai_eval_client`."""

from __future__ import annotations

import atexit
import signal
import sys

from openai_eval_client import _interrupts


def main() -> None:
    """Run the command line, or say what it needs."""
    _interrupts.handle(_interrupts.end)
    atexit.register(_interrupts.handle, signal.SIG_IGN)  # the last one: what is left is Python's own end
    try:
        from openai_eval_client._cli import app  # an extra, which may not be there
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: pip install 'openai-eval-client[cli]'")
    app()


if __name__ == "__main__":
    main()
