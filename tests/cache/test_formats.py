"""A file of format 1, in whose keys metadata counted: what it holds is not paid for again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from batches import connect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openai_eval_client import CacheConfig
from openai_eval_client._batches.submission import Journal
from openai_eval_client._cache import cache as cache_module
from openai_eval_client._cache import store as store_module
from openai_eval_client._cache.cache import Cache
from openai_eval_client._cache.store import Store
from openai_eval_client._wire.requests import check_parameters
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("few_certificates")

PROMPTS = ["a", "b", "a", "c", "a"]
EIGHT = [f"p{n}" for n in range(8)]


@contextlib.contextmanager
def version_1() -> Iterator[None]:
    """Have the package make files and keys as it did before; its key is held by a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "_VERSION", 1)
        patch.setattr(store_module, "_FORMAT", 1)
        patch.setattr(Store, "has_version_1", False)
        yield


def numbered():
    """An answer that is never the same twice, and says what it answers."""
    count = itertools.count()
    return lambda body: f"{body['messages'][-1]['content']} {next(count)}"


async def run(server: SimulatedServer, cache: Any, prompts: list[str], **params: Any) -> list[str]:
    """Run one program, and return what it was answered."""
    async with connect(server, cache=cache) as client:
        return [response.content for response in await client.batch_generate(prompts, **params)]


def rows_of(path: Path, query: str = "SELECT * FROM answers ORDER BY key") -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"metadata": {"run": "1"}}], ids=str)
async def test_a_run_goes_on_with_a_file_of_format_1(path: Path, params) -> None:
    """What it holds is found in its place, only the rest is sent; the entries stay as they are."""
    with SimulatedServer(answer=numbered()) as server:
        with version_1():
            first = await run(server, path, PROMPTS, **params)
        held, sent = rows_of(path), len(server.calls)
        longer = await run(server, path, [*PROMPTS, "a", "d"], **params)
        assert longer[: len(first)] == first
        assert len(server.calls) == sent + len(set(longer) - set(first))
        assert set(held) < set(rows_of(path))
        assert await run(server, path, [*PROMPTS, "a", "d"], **params) == longer
    assert rows_of(path, "PRAGMA user_version") == [(1,)]


async def test_a_file_of_format_1_may_be_read_only(path: Path) -> None:
    """write=False: the same, and not a byte changes."""
    with SimulatedServer(answer=numbered()) as server:
        with version_1():
            first = await run(server, path, PROMPTS)
        before = path.read_bytes()
        assert await run(server, CacheConfig(path=path, write=False), PROMPTS) == first
        assert len(server.calls) == len(PROMPTS)
    assert path.read_bytes() == before


async def test_the_name_of_a_run_in_the_metadata_costs_nothing(path: Path) -> None:
    """Another one in each run: everything is found; in one run, the same prompt again is another sample."""
    with SimulatedServer(answer=numbered()) as server:
        first = await run(server, path, ["a", "b"], metadata={"run": "1"}, user="x", service_tier="flex")
        assert await run(server, path, ["a", "b"], metadata={"run": "2"}) == first
        async with connect(server, cache=path) as client:
            samples = [await client.generate_response("a", metadata={"run": name}) for name in "34"]
        assert [sample.cached for sample in samples] == [True, False]
        assert samples[0].content == first[0]
        assert await run(server, path, ["a", "a"]) == [sample.content for sample in samples]
        assert len(server.calls) == 3


async def test_both_versions_use_one_file(path: Path) -> None:
    """While a client has a file of format 1 open, another version adds to it; neither disturbs the other."""
    with SimulatedServer(answer=numbered()) as server:
        with version_1():
            former = connect(server, cache=path)
        async with former, connect(server, cache=path) as client:
            with version_1():
                first = await former.generate_response("a")
            assert (await client.generate_response("a")).content == first.content
            await client.generate_response("b")
            with version_1():
                await former.generate_response("c")
            assert (await client.generate_response("c")).cached
        assert len(server.calls) == 3


async def test_a_new_file_needs_one_look_for_each_answer(path: Path, monkeypatch) -> None:
    """It cannot hold keys of version 1; in a file of format 1, a second look follows a miss."""
    looks: list[bytes] = []
    get = Store.get

    async def counted(self: Store, key: bytes, **since: float) -> bytes | None:
        looks.append(key)
        return await get(self, key, **since)

    monkeypatch.setattr(Store, "get", counted)
    former = path.with_name("former.sqlite")
    with SimulatedServer() as server:
        with version_1():
            await run(server, former, ["a"])
        for file, expected in ((path, 2), (path, 2), (former, 4), (former, 3)):
            looks.clear()
            await run(server, file, ["a", "b"])
            assert len(set(looks)) == len(looks) == expected


# --- samples ----------------------------------------------------------------------------------------------

REQUESTS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([None, "1", "2"])), max_size=6)


class Program:
    """Asks as a program does, with a dict in place of answers in a file."""

    def __init__(self, path: Path, answers: dict[bytes, int]) -> None:
        self._cache = Cache(CacheConfig(path=path), "http://host/v1", None, None)  # type: ignore[arg-type]
        self._answers = answers

    def ask(self, prompt: str, run_id: str | None) -> int:
        """Return the number of the answer."""
        params = {} if run_id is None else {"metadata": {"run": run_id}}
        named = {"model": "m", "timeout": 5.0, "temperature": None, "max_tokens": None, "system": None}
        asked = check_parameters(**named, api="chat", params=params)
        keys = self._cache.take(asked.with_prompt(prompt), asked).keys
        found = next((self._answers[key] for key in keys if key in self._answers), None)
        return self._answers.setdefault(keys[0], len(self._answers)) if found is None else found


@pytest.fixture(scope="module")
def former_file():
    with tempfile.TemporaryDirectory() as folder:
        with version_1():
            Store(Path(folder) / "runs.sqlite").close()
        yield Path(folder) / "runs.sqlite"


@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(former=st.lists(REQUESTS, max_size=3), later=st.lists(REQUESTS, max_size=3))
def test_no_answer_stands_for_two_samples_and_none_is_bought_twice(former_file, former, later) -> None:
    """Whatever programs of both versions asked, under whatever metadata, in one file."""
    answers: dict[bytes, int] = {}
    with version_1():
        for requests in former:
            program = Program(former_file, answers)
            given = [program.ask(*request) for request in requests]
            assert len(set(given)) == len(given)
    for requests in [*former, *later, *former]:
        bought = len(answers)
        first, again = Program(former_file, answers), Program(former_file, answers)
        given = [first.ask(*request) for request in requests]
        assert len(set(given)) == len(given)
        assert requests not in former or len(answers) == bought
        assert [again.ask(*request) for request in requests] == given


# --- jobs -------------------------------------------------------------------------------------------------


async def interrupted(server: SimulatedServer, cache: Path, batches: int, **params: Any) -> None:
    """Start a run by batches of four and end it once so many are created and recorded."""
    async with connect(server, cache=cache, batch={"max_batch_size": 4}) as client:
        task = asyncio.create_task(client.batch_generate(EIGHT, use_batch_api=True, **params))
        while len(server.batches) < batches or len(recorded(cache)) < batches:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def recorded(path: Path) -> list[str]:
    """Return the ids of the batches in the journal."""
    found = [json.loads(value) for (value,) in rows_of(path, "SELECT value FROM journal")]
    return [made for entry in found for job in entry["jobs"] for made in job["made"].values()]


@pytest.mark.usefixtures("no_pauses")
async def test_a_job_recorded_in_a_file_of_format_1_goes_on(path: Path) -> None:
    """With its batches: none is created again, and none is recorded any more in the end."""
    with SimulatedServer(batch_seconds=0.3) as server:
        with version_1():
            await interrupted(server, path, 2)
        async with connect(server, cache=path, batch={"max_batch_size": 4}) as client:
            responses = await client.batch_generate(EIGHT, use_batch_api=True)
        assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in EIGHT]
        assert len(server.batches) == 2
    assert rows_of(path, "SELECT * FROM journal") == []


@pytest.mark.usefixtures("no_pauses")
async def test_a_job_goes_on_under_other_metadata(path: Path) -> None:
    """A run id there does not make another job of it."""
    with SimulatedServer(batch_seconds=0.3) as server:
        await interrupted(server, path, 2, metadata={"run": "1"})
        async with connect(server, cache=path, batch={"max_batch_size": 4}) as client:
            await client.batch_generate(EIGHT, use_batch_api=True, metadata={"run": "2"})
        assert len(server.batches) == 2


async def test_a_job_of_another_version_is_waited_for(path: Path) -> None:
    """It holds the name that version gives it; the records are written under the name they were found."""
    with version_1():
        Store(path).close()
    cache = Cache(CacheConfig(path=path), "http://host/v1", None, None)  # type: ignore[arg-type]
    journal = Journal(cache, "new", "former")
    async with cache.store.exclusive("former"):
        waiting = asyncio.create_task(journal.exclusive().__aenter__())
        await asyncio.wait([waiting], timeout=0.1)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
    await cache.store.journal_put("former", {"jobs": [{"n": 1}]})
    async with journal.exclusive():
        assert await journal.load() == [{"n": 1}]
        journal.later.append({"n": 2})
        await journal.save([])
        assert await cache.store.journal_get("former") == {"jobs": [{"n": 2}]}
        await journal.forget()
        assert await journal.load() == []
    await cache.close()
