"""The file of a cache, and the store in it."""

from pathlib import Path

import pytest

from openai_eval_client._cache.store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.sqlite"


@pytest.fixture
def store(path: Path):
    opened = Store(path)
    yield opened
    opened.close()
