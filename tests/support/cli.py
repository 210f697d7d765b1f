"""The command line inside the test's own process, where that is no different: an import costs a second."""

from __future__ import annotations

import json
import sys

import pytest

KEY = "sk-right-0123456789"


class Cli:
    """Runs commands, and keeps what they wrote."""

    def __init__(self, capfd, monkeypatch):
        self.capfd, self.monkeypatch = capfd, monkeypatch
        self.out = self.err = ""

    def __call__(self, *arguments, server=None, key=KEY):
        """Run one command and return its exit code."""
        from openai_eval_client._cli.app import app

        for name in ("OPENAI_ORG_ID", "OPENAI_API_KEY"):
            self.monkeypatch.delenv(name, raising=False)
        if key:
            self.monkeypatch.setenv("OPENAI_API_KEY", key)
        self.monkeypatch.setenv("OPENAI_BASE_URL", server.base_url if server else "http://127.0.0.1:9/v1")
        self.monkeypatch.setattr(sys, "argv", ["openai-eval-client", *map(str, arguments)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app()
        self.out, self.err = self.capfd.readouterr()
        assert "Traceback" not in self.err
        assert KEY not in self.out + self.err
        return ended.value.code or 0


def rows_of(text):
    """The rows of an output, every line of which must be JSON."""
    return [json.loads(line) for line in text.splitlines()]
