"""The command line; it holds no logic of the library."""

from openai_eval_client._cli.app import app

__all__ = ["app"]
