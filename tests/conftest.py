"""What all tests share: tiktoken's vocabularies without a network."""

import logging
from pathlib import Path

import certifi
import pytest
from cli import Cli
from local_redis import started_redis
from vocabularies import unpack_vocabularies


@pytest.fixture(scope="session", autouse=True)
def vocabularies(tmp_path_factory):
    """Unpacks both vocabularies, which bpe-openai carries, to where tiktoken looks for what it downloaded."""
    folder = tmp_path_factory.mktemp("vocabularies")
    unpack_vocabularies(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def few_certificates(tmp_path_factory):
    """One root certificate instead of a hundred and fifty: parsing them is half the time of a short test."""
    end = "-----END CERTIFICATE-----\n"
    first = Path(certifi.where()).read_text("ascii").partition(end)[0]
    path = tmp_path_factory.mktemp("certificates") / "one.pem"
    path.write_text(first + end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(path))
        yield


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    """What a batch should have and has not is looked for again for a moment, not for minutes."""
    from openai_eval_client._batches import jobs as _batch_jobs
    from openai_eval_client._batches import results as _batch_results
    from openai_eval_client._batches import run as _batch_run

    monkeypatch.setattr(_batch_jobs, "PATIENCE", 0.3)
    monkeypatch.setattr(_batch_run, "_UNSEEN", 0.5)
    monkeypatch.setattr(_batch_results, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def no_pauses(monkeypatch):
    """Retries follow at once: their waits have tests of their own."""
    from openai_eval_client._batches import api as _batch_api
    from openai_eval_client._sdk import attempts as _retry

    monkeypatch.setattr(_retry, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(_retry, "_LONGEST_DELAY", 0.01)
    monkeypatch.setattr(_batch_api, "_LATE", 0.01)


@pytest.fixture
def empty_vocabularies(tmp_path, monkeypatch):
    """A process that has loaded no vocabulary, has none on disk, and cannot reach the network."""
    import tiktoken.registry

    from openai_eval_client._tokens import counter as _tokens

    folder = tmp_path / "vocabularies"
    folder.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing listens there
    for direct in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(direct, raising=False)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(_tokens, "_VOCABULARIES", _tokens._Vocabularies())
    return folder


@pytest.fixture
def cli(capfd, monkeypatch):
    """The command line; what it does to the library's log is undone."""
    logger = logging.getLogger("openai_eval_client")
    before = logger.handlers[:], logger.level, logger.propagate
    monkeypatch.setenv("COLUMNS", "100")
    yield Cli(capfd, monkeypatch)
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def redis_server():
    """One for all tests that leave it running."""
    with started_redis() as server:
        yield server


@pytest.fixture
def redis_with_password():
    """One that asks for a password."""
    with started_redis(password="open-sesame") as server:
        yield server
