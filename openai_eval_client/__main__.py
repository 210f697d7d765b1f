"""`openai-eval-client` and `python -m openai_eval_client`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from openai_eval_client._cli import app  # an extra, which may not be there
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: pip install 'openai-eval-client[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
