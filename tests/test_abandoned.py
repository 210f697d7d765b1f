"""Requests that nobody will end: of event loops that were closed, and of the parent in a forked child."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from clients import KEY, connect, no_slot_is_taken
from virtual import VirtualLoop

from openai_eval_client import AsyncOpenAI, RateLimitConfig
from openai_eval_client._account import Account
from openai_eval_client._wire.failures import Outcome, refused
from openai_eval_client._wire.requests import Demand
from openai_eval_client._wire.usage import Usage
from openai_eval_client.testing import SimulatedServer

NARROW = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=4)
DEMAND = Demand("m", 100, 0)
OK = Outcome(200, {}, Usage(100, 0))


def close_at_once(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task]:
    """Close a loop as no program should: its tasks are neither cancelled nor awaited."""
    tasks = [*asyncio.all_tasks(loop)]
    for task in tasks:
        task._log_destroy_pending = False
    loop.close()
    return tasks


CELLS = """
import asyncio, gc, socket, sys, threading, warnings
from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from raw_server import whole

def serve(connection):
    data = b""
    seen.set()
    while b"answer me" not in data:  # all others are never answered
        data += connection.recv(65536)
    connection.sendall(whole())

def accept():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

seen = threading.Event()
listener = socket.create_server(("127.0.0.1", 0), backlog=500)
threading.Thread(target=accept, daemon=True).start()
config = OpenAIConfig(
    api_key="sk-1",
    base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1",
    default_model="gpt-4o-mini",
    max_cost=0.0001,
)
limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=600, max_concurrent=4)
client = OpenAIClient(config, rate_limit=limits)
kept = []
for cell in range(20):
    loop = asyncio.new_event_loop()
    kept += [loop.create_task(client.generate_response("hi", max_tokens=5)) for _ in range(10)]
    while not seen.is_set():
        loop.run_until_complete(asyncio.sleep(0.02))
    loop.run_until_complete(asyncio.sleep(0.02))
    loop.close()
answer = asyncio.run(asyncio.wait_for(client.generate_response("answer me", max_tokens=5), 15))
print(answer.content, client.stats.cost.unaccounted > 0, float(client.stats.budget["reserved"]))
print([queue.concurrency.in_flight for queue in client._account.limiter._queues.values()])
for task in kept:
    task._log_destroy_pending = False
"""


def run_script(script: str, *arguments: object) -> tuple[str, str]:
    path = os.pathsep.join(
        [str(Path(__file__).parent / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, env=environment)
    return done.stdout, done.stderr


def test_cells_that_are_stopped_hold_nothing_back() -> None:
    """Twenty loops in a row, each closed with requests in flight and waiting; the next one is answered."""
    assert run_script(CELLS) == ("yes True 0.0\n[0]\n", "")


def test_a_loop_that_closes_while_another_waits_gives_back() -> None:
    """The other asked before; nothing else happens until it looks again."""
    account = Account(NARROW.model_copy(update={"max_concurrent": 1}), max_cost=1.0)
    other = asyncio.new_event_loop()
    costly = DEMAND._replace(most_cost=Decimal(1))
    held = other.run_until_complete(account.attempt(costly).begin())

    async def wait(demand: Demand) -> None:
        asking = asyncio.ensure_future(account.attempt(demand).begin())
        await asyncio.sleep(0.05)
        close_at_once(other)
        (await asyncio.wait_for(asking, 10)).settle(OK)

    asyncio.run(wait(DEMAND))
    held.settle(OK)  # too late to count again
    assert account.stats.attempts == 2


@pytest.mark.parametrize("reading", [True, False])
def test_a_run_that_is_interrupted_in_the_middle_can_be_run_again(reading: bool) -> None:
    """`asyncio.run` cancels what is left: 20 of them in a row, and the last is answered."""
    with SimulatedServer(latency=0.05, process=True) as server:
        client = connect(server, NARROW)
        paced = AsyncOpenAI(base_url=server.base_url, api_key=KEY, rate_limit=NARROW)

        async def stopped() -> None:
            if reading:
                message = {"role": "user", "content": "hi"}
                stream = paced.chat.completions.create(model="m", messages=[message], stream=True)
                work = [asyncio.ensure_future(stream)]
            else:
                work = [asyncio.ensure_future(client.batch_generate([f"{n}" for n in range(20)]))]
            await asyncio.wait(work, timeout=0.03)
            raise KeyboardInterrupt

        for _ in range(20):
            with pytest.raises(KeyboardInterrupt):
                asyncio.run(stopped())
        answers = asyncio.run(asyncio.wait_for(client.batch_generate(["a", "b"]), 10))
        assert [answer.content for answer in answers] == ["echo: a", "echo: b"]
        assert no_slot_is_taken(client)


def test_one_endpoints_refusal_does_not_hold_up_another() -> None:
    """Listing models was refused for 30 s: files are uploaded meanwhile, and models are not asked for."""
    with SimulatedServer() as server:
        client = AsyncOpenAI(base_url=server.base_url, api_key=KEY, max_retries=0)
        asyncio.run(_after_a_refusal(client))


async def _after_a_refusal(client: AsyncOpenAI) -> None:
    account = client._account
    held = await account.attempt(Demand(None, route="GET /v1/models")).begin()
    held.settle(refused(429, {"retry-after": "30"}))
    await asyncio.wait_for(client.files.create(file=("a.jsonl", b"{}\n"), purpose="batch"), 5)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(client.models.list(), 0.2)


def test_a_queue_in_which_nothing_moves_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Once in `max_wait` seconds, with how many requests hold all slots."""
    loop = VirtualLoop()
    account = Account(NARROW.model_copy(update={"max_wait": 60.0}), clock=loop)

    async def scenario() -> None:
        held = [await account.attempt(DEMAND).begin() for _ in range(4)]
        waiting = asyncio.ensure_future(account.attempt(DEMAND).begin())
        await asyncio.sleep(150)
        held.pop().settle(OK)
        (await waiting).settle(OK)

    try:
        loop.run_until_complete(scenario())
    finally:
        loop.close()
    said = [record for record in caplog.records if record.event == "nothing_moves"]
    assert len(said) == 2
    assert "4 that are in flight" in said[0].message


FORKS = """
import asyncio, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
base_url, forks = sys.argv[1], int(sys.argv[2])
sys.setswitchinterval(1e-5)
config = OpenAIConfig(api_key="sk-1", base_url=base_url, default_model="gpt-4o-mini", max_cost=1.0)
limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=8)
client = OpenAIClient(config, rate_limit=limits, cache=sys.argv[3])
stop = threading.Event()

async def busy():
    count = 0
    while not stop.is_set():
        prompts = [f"{threading.get_ident()} {count} {n}" for n in range(20)]
        await client.batch_generate(prompts, max_tokens=5)
        client.stats, client.openai._account.limiter.stats
        count += 1

threads = [threading.Thread(target=asyncio.run, args=(busy(),)) for _ in range(2)]
for thread in threads:
    thread.start()
asyncio.run(client.generate_response("first", max_tokens=5))
hung = []
for n in range(forks):
    child = os.fork()
    if not child:
        signal.alarm(20)
        answer = asyncio.run(client.generate_response(f"child {n}", max_tokens=5))
        stats = client.stats
        queues = client._account.limiter._queues.values()
        held = stats.budget["reserved"], sum(queue.concurrency.in_flight for queue in queues)
        os._exit(0 if answer.content == f"echo: child {n}" and held == (0, 0) else 3)
    hung.append(child)
    if len(hung) == 4 or n == forks - 1:
        for child in hung:
            status = os.waitpid(child, 0)[1]
            if status:
                print("child", status, flush=True)
        hung.clear()
stop.set()
for thread in threads:
    thread.join()
print("done", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork")
def test_children_forked_in_the_middle_of_a_run_do_not_hang(tmp_path) -> None:
    """Nothing that the parent's threads held is held in a child, neither locks nor slots nor money."""
    with SimulatedServer(process=True) as server:
        assert run_script(FORKS, server.base_url, 12, tmp_path / "kept.sqlite") == ("done\n", "")
