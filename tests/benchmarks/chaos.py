"""Everything that can go wrong, for ten minutes, at random: does anything get lost, stay behind or leak?

    python tests/benchmarks/chaos.py                        # needs redis-server
    python tests/benchmarks/chaos.py --seconds 120 --seed 7

Two workers, each a program or the command `run`, share a quota through Redis and answer row after row. They
are killed (-9), interrupted and started again; calls are cancelled, event loops close in the middle, the
process forks, streams are dropped half-read; the server fails and changes its limits; the cache file is
deleted, locked and damaged; Redis stops, hangs and comes back empty. In the end, what has to hold is checked:
every row once and with its own answer, nothing in flight or reserved, nobody hung or crashed, no key in any
file, and for each life of a program that was not killed: its bill is at most what the server served, and with
what is unaccounted at least that. Prints what it did and found; exit code 1 if it found anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import openai
from local_redis import LocalRedis

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig, ValidationError
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from openai_eval_client.testing import Call

MODEL, OUTPUT, IN_FLIGHT = "gpt-4o-mini", 20, 50
PRICES = 0.15e-6, 0.60e-6  # USD of an input and of an output token
LIMITS = [(3000, None), (1200, 200_000), (2400, 60_000), (600, None)]  # RPM, TPM of the server
FAULTS = {
    **dict.fromkeys(("500", "drop", "429", "truncate", "cut_json", "no_usage", "failed_half"), 0.01),
    **dict.fromkeys(("502", "503", "garbage", "error_beside", "json_done", "malformed_headers"), 0.005),
    **dict.fromkeys(("hang", "slow_drip", "guidelines", "overloaded", "529", "null_usage"), 0.003),
}
UNSAID = {"garbage", "no_usage", "null_usage"}  # only the server knows what it billed for these
CHUNK = 120  # rows that a program asks for at once
JOB = 150  # rows of an input file of the command
STARTING = 4.0  # seconds in which Python may start
HUNG = 60.0  # seconds without a sign of life after which a worker hangs


def prompt(slot: int, row: int) -> str:
    """Return the prompt of a row; its tokens are digits, which our count does not take for fewer."""
    return f"{slot}-{row} " + " ".join(str((row * factor) % 10) for factor in range(1, 30 + row % 50))


# --- a program that answers rows --------------------------------------------------------------------------


class Life:
    """One process of a program: from its start until it is killed, or told to come to an end."""

    def __init__(self, options: dict) -> None:
        self.folder, self.slot, self.name = Path(options["folder"]), options["slot"], options["name"]
        self.chance = random.Random(f"{options['seed']}/{self.name}")  # noqa: S311
        self.rows = self.folder / f"rows-{self.slot}.jsonl"
        self.cache = self.folder / f"cache-{self.slot}.sqlite"
        self.end = self.folder / f"end-{self.slot}"
        self.did: Counter[str] = Counter()
        self.forks = 0
        self.config = OpenAIConfig(
            api_key=os.environ["CHAOS_KEY"],
            base_url=options["url"],
            default_model=MODEL,
            max_retries=6,
            timeout=3.0,
            max_cost=100.0,
        )
        self.limits = RateLimitConfig(
            requests_per_minute=3000,
            tokens_per_minute=None,
            max_concurrent=IN_FLIGHT,
            burst_seconds=5.0,
            redis_url=options["redis"],
        )
        self.client = self.open()

    def open(self) -> OpenAIClient:
        """Return a client; a cache that was damaged is refused by name, and thrown away."""
        try:
            return OpenAIClient(self.config, rate_limit=self.limits, cache=self.cache)
        except ValidationError as error:
            assert error.field == "cache", error
        self.did["cache refused"] += 1
        delete(self.cache)
        return self.open()

    def done(self) -> set[int]:
        return {json.loads(line)["index"] for line in self.rows.read_bytes().splitlines()}

    async def answer(self, rows: list[int]) -> None:
        """Ask for rows, and write those that are answered."""
        prompts = (prompt(self.slot, row) for row in rows)
        stream = self.client.as_completed(prompts, max_tokens=OUTPUT, user=self.name)
        async with contextlib.aclosing(stream) as outcomes:
            async for position, outcome in outcomes:
                if isinstance(outcome, Exception):
                    self.note("failed", outcome)
                    continue
                line = {"index": rows[position], "content": outcome.content}
                with self.rows.open("ab", buffering=0) as file:
                    file.write(json.dumps(line).encode() + b"\n")

    # what happens to it

    async def run(self, rows: list[int]) -> None:
        """Answer them all."""
        await self.answer(rows)

    async def cancel(self, rows: list[int]) -> None:
        """Be cancelled at some moment."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.answer(rows), self.chance.uniform(0, 2))

    async def streams(self, rows: list[int]) -> None:
        """Read a few streams of the drop-in client, and drop them without closing."""

        async def read(row: int) -> None:
            messages = [{"role": "user", "content": prompt(self.slot, row)}]
            options = {"max_tokens": OUTPUT, "user": self.name, "stream": True}
            stream = await self.client.openai.chat.completions.create(
                model=MODEL, messages=messages, **options
            )
            left = row % 4
            async for _ in stream:
                left -= 1
                if left < 0:
                    break
            if row % 5 == 0:
                await asyncio.sleep(60)  # until it is cancelled

        tasks = [asyncio.create_task(read(row)) for row in rows[:20]]
        _, pending = await asyncio.wait(tasks, timeout=self.chance.uniform(0, 3))
        for task in pending:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, openai.OpenAIError | asyncio.CancelledError | None) for each in ended)

    async def fork(self, rows: list[int]) -> None:
        """Fork in a thread, while requests are in flight and waiting; each child asks for a row itself."""
        task = asyncio.create_task(self.answer(rows))
        await asyncio.sleep(self.chance.uniform(0, 1))
        await asyncio.gather(*(asyncio.to_thread(self.fork_one) for _ in range(2)))
        await task

    def fork_one(self) -> None:
        self.forks += 1
        name = f"{self.name}-fork-{self.forks}"
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            assert status == 0, f"the child {name} ended with {status}"
            return
        try:
            signal.alarm(45)  # ends a child that hangs
            faulthandler.dump_traceback_later(40)
            before = self.client.stats.cost
            with contextlib.suppress(openai.OpenAIError):
                asyncio.run(
                    self.client.generate_response(f"fork {name}", max_tokens=OUTPUT, user=name, max_cost=1)
                )
            after = self.client.stats.cost
            figures = {
                "total": float(after - before),
                "unaccounted": float(after.unaccounted_cost - before.unaccounted_cost),
            }
            (self.folder / f"life-{name}.json").write_text(json.dumps({**figures, **self.left()}))
            os._exit(0)
        except BaseException:  # noqa: BLE001
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)

    def close(self, rows: list[int]) -> None:
        """Have the event loop stop at some moment and be closed, as a notebook's kernel does."""
        loop = asyncio.new_event_loop()
        loop.create_task(self.answer(rows))  # noqa: RUF006
        loop.call_later(self.chance.uniform(0, 2), loop.stop)
        loop.run_forever()
        loop.close()

    def live(self) -> None:
        """Do one after the other until the end."""
        ways = [self.run, self.cancel, self.cancel, self.close, self.close, self.streams, self.fork]
        while not self.end.exists():
            way = self.chance.choice(ways)
            self.did[way.__name__] += 1
            rows = self.open_rows(CHUNK)
            if way == self.close:
                way(rows)
                continue
            self.carry_out(way(rows))
        self.come_to_an_end()

    def carry_out(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            asyncio.run(work)
        except openai.OpenAIError as error:  # one that ends a run, if it is the first: a page that is no API
            self.note("ended", error)

    def note(self, what: str, error: Exception) -> None:
        says = f" ({error})" if isinstance(error, ValidationError) else ""  # none was to be expected
        self.did[f"{what}: {type(error).__name__}{says}"] += 1
        logging.getLogger("chaos").info("%s: %r", what, error)

    def open_rows(self, count: int) -> list[int]:
        """Return the first rows without an answer."""
        done = self.done()
        return [row for row in range(len(done) + count) if row not in done][:count]

    def come_to_an_end(self) -> None:
        """Answer all rows that were begun, and report what is left behind."""
        until = max(self.done(), default=0) + 2  # one more: what a closed loop held is given to who asks next
        while rows := [row for row in range(until) if row not in self.done()]:
            self.carry_out(self.answer(rows))
        gc.collect()  # streams that were dropped are in the SDK's cycles
        cost, path = self.client.stats.cost, self.folder / f"life-{self.name}.json"
        figures = {"total": float(cost), "unaccounted": float(cost.unaccounted_cost), "did": self.did}
        figures |= {"unpriced": cost.unpriced, "attempts": self.client.stats.attempts}
        figures |= {"retried": cost.retried, "unaccounted attempts": cost.unaccounted}
        self.client.report(self.folder / f"report-{self.name}.html")
        path.write_text(json.dumps({**figures, **self.left()}))
        asyncio.run(self.client.close())

    def left(self) -> dict[str, float]:
        """Return what is in flight, waiting, not settled and reserved."""
        account = self.client._account
        queues = account.limiter._queues.values()
        limits = [limit for queue in queues for limit in queue._concurrency_limits]
        return {
            "in_flight": sum(limit.in_flight for limit in limits),
            "waiting": sum(len(limit.queue.waiting()) for limit in limits),
            "open": sum(map(len, account._open.values())),
            "reserved": float(self.client.stats.budget["reserved"]),
        }


def live(options: dict) -> None:
    """Be a program."""
    faulthandler.register(signal.SIGUSR1)
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("openai_eval_client").setLevel(logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks of loops that were closed
    Life(options).live()


# --- the workers, from outside ----------------------------------------------------------------------------


@dataclass
class Worker:
    """One of two that answer rows: life after life, as a program or as the command `run`."""

    slot: int
    folder: Path
    options: dict
    environment: dict[str, str]
    found: list[str]
    did: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    jobs: int = 0
    process: subprocess.Popen | None = None
    sent: signal.Signals | None = None
    moved_at: float = 0.0
    started_at: float = 0.0
    size: int = 0
    is_command: bool = False

    @property
    def name(self) -> str:
        return f"{self.slot}-{self.lives}"

    @property
    def output(self) -> Path:
        return self.folder / (f"job-{self.jobs}.jsonl" if self.is_command else f"rows-{self.slot}.jsonl")

    @property
    def end(self) -> Path:
        """The file that tells a program to come to its end."""
        return self.folder / f"end-{self.slot}"

    def start(self, *, as_command: bool, ending: bool = False) -> None:
        self.lives, self.is_command = self.lives + 1, as_command
        self.end.touch() if ending else self.end.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--life", json.dumps({**self.options, "name": self.name})]
        if as_command:
            command = [sys.executable, "-m", "openai_eval_client", "run", self.source(), "--json", "--resume"]
            command += ["-o", self.output, "--cache", f"cache-{self.slot}.sqlite", "--model", MODEL]
            command += ["--max-tokens", OUTPUT, "--param", f"user={self.name}", "--max-concurrent", IN_FLIGHT]
            command += [
                "--rpm",
                1500,
                "--tpm",
                0,
                "--timeout",
                3,
                "--report",
                f"report-{self.name}.html",
                "-v",
            ]
        with (
            (self.folder / f"{self.name}.out").open("wb") as out,
            (self.folder / f"{self.name}.err").open("wb") as err,
        ):
            self.process = subprocess.Popen(
                [str(word) for word in command], env=self.environment, cwd=self.folder, stdout=out, stderr=err
            )
        self.sent, self.moved_at, self.started_at = None, time.monotonic(), time.monotonic()

    def source(self) -> Path:
        """Return the input of the present job, made where it is not there."""
        path = self.folder / f"job-{self.jobs}.in.jsonl"
        if not path.exists():
            rows = ({"prompt": prompt(self.jobs + 10, row)} for row in range(JOB))
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; a program, which handles none, is told to come to its end instead."""
        if self.process is not None and self.process.poll() is None and self.sent is None:
            if time.monotonic() - self.started_at < STARTING:
                number = signal.SIGKILL  # the only one that Python handles while it starts
            elif not self.is_command and number != signal.SIGKILL:
                self.end.touch()
                return
            self.sent = number
            self.did[f"{number.name} to {'a command' if self.is_command else 'a program'}"] += 1
            self.process.send_signal(number)

    def look(self) -> bool:
        """Return whether it has ended; find out how."""
        code, output = self.process.poll(), self.output
        if code is None:
            size = sum(path.stat().st_size for path in (output, self.errors) if path.exists())
            if size != self.size:
                self.size, self.moved_at = size, time.monotonic()
            elif time.monotonic() - self.moved_at > HUNG:
                self.found.append(f"{self.name} hangs: see {self.errors}")
                self.process.send_signal(signal.SIGABRT if self.is_command else signal.SIGUSR1)
                time.sleep(1)
                self.process.kill()
                self.sent, self.moved_at = signal.SIGKILL, time.monotonic()
            return False
        expected = {0, 1} if self.is_command else {0}
        expected |= {None: set(), signal.SIGKILL: {-9}}.get(self.sent, {130})
        errors = self.errors.read_text(errors="replace")
        if code == 2 and self.is_command and "cache=" in errors:  # a damaged one, which is refused by name
            self.did["cache refused"] += 1
            delete(self.folder / f"cache-{self.slot}.sqlite")
        elif code not in expected or (self.is_command and "Traceback" in errors):
            self.found.append(f"{self.name} ended with {code}: see {self.errors}")
        if self.is_command and code in {0, 1}:
            self.jobs += 1
        return True

    @property
    def errors(self) -> Path:
        return self.folder / f"{self.name}.err"


def delete(cache: Path) -> None:
    """Delete a cache with all that SQLite keeps beside it."""
    for path in cache.parent.glob(f"{cache.name}*"):
        path.unlink(missing_ok=True)


@dataclass
class Chaos:
    """What goes wrong, at random."""

    chance: random.Random
    server: SimulatedServer
    redis: LocalRedis
    workers: list[Worker]
    did: Counter[str] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)

    def workers_end(self) -> None:
        worker = self.chance.choice(self.workers)
        worker.send(self.chance.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))

    def limits_change(self) -> None:
        rpm, tpm = self.chance.choice(LIMITS)
        self.server.set_limits(rpm=rpm, tpm=tpm)

    def redis_stops(self) -> None:
        self.redis.stop()
        self.ended.wait(self.chance.uniform(0, 4))
        self.redis.start()

    def redis_hangs(self) -> None:
        self.redis.hang()
        self.ended.wait(self.chance.uniform(0, 4))
        self.redis.go_on()

    def _cache(self) -> Path:
        worker = self.chance.choice(self.workers)
        return worker.folder / f"cache-{worker.slot}.sqlite"

    def cache_is_deleted(self) -> None:
        delete(self._cache())

    def cache_is_damaged(self) -> None:
        """A truncated copy takes its place, as from a backup made in the middle of a write."""
        cache = self._cache()
        if cache.exists():
            whole, copy = cache.read_bytes(), cache.with_suffix(".copy")
            copy.write_bytes(whole[: self.chance.randrange(len(whole) + 1)])
            copy.replace(cache)

    def cache_is_locked(self) -> None:
        cache = self._cache()
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(cache)) as other:
            if cache.exists() and cache.stat().st_size:
                other.execute("BEGIN EXCLUSIVE")
                self.ended.wait(self.chance.uniform(0, 4))
                other.rollback()

    def go_on(self) -> None:
        """Do one after the other until the end."""
        ends = [self.workers_end] * 3
        cache = [self.cache_is_deleted, self.cache_is_damaged, self.cache_is_locked]
        ways = [*ends, *cache, self.limits_change, self.redis_stops, self.redis_hangs]
        while not self.ended.wait(self.chance.uniform(0.2, 5)):
            way = self.chance.choice(ways)
            self.did[way.__name__] += 1
            way()


# --- what has to hold -------------------------------------------------------------------------------------


def served(calls: list[Call]) -> tuple[Counter[str], Counter[str]]:
    """Return the least and the most that the server billed, in USD, by the life that asked."""
    least: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for call in calls:
        if not call.served:
            continue
        asked, is_said = (call.body or {}).get("user", ""), call.fault not in UNSAID
        output = call.completion_tokens if is_said else OUTPUT
        least[asked] += is_said * call.prompt_tokens * PRICES[0] + is_said * output * PRICES[1]
        most[asked] += (1 if is_said else 3) * call.prompt_tokens * PRICES[0] + output * PRICES[1]
    return least, most


def check_bills(folder: Path, calls: list[Call]) -> list[str]:
    """Compare the bill of each life that came to an end with the server's, and see what it left behind."""
    found, (least, most) = [], served(calls)
    for path in sorted(folder.glob("life-*.json")):
        life = json.loads(path.read_text())
        name, total = path.stem.removeprefix("life-"), life["total"]
        with_open = total + life["unaccounted"]
        if total > most[name] + 1e-9 or with_open < least[name] - 1e-9:
            theirs = f"{least[name]:.6g} to {most[name]:.6g}"
            found.append(f"{name}: billed {total:.6g} to {with_open:.6g}, by the server {theirs}")
        left = {key: life[key] for key in ("in_flight", "waiting", "open", "reserved") if life[key]}
        if left or life.get("unpriced"):
            found.append(f"{name} left behind: {left}, unpriced: {life.get('unpriced')}")
    return found


def check_rows(path: Path, slot: int, count: int | None) -> list[str]:
    """See that every row is there once, with its own answer."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    indexes, found = Counter(row["index"] for row in rows), []
    expected = range(len(rows) if count is None else count)
    if indexes != Counter(expected):
        wrong = {index: indexes[index] for index in {*indexes, *expected} if indexes[index] != 1}
        found.append(f"{path.name}: rows that are not there once: {wrong}")
    for row in rows:
        content = row.get("content") or (row.get("response") or {}).get("content")
        right = f"echo: {prompt(slot, row['index'])}"
        if not row.get("error") and not (content and right.startswith(content)):
            found.append(f"{path.name}: row {row['index']} was answered with {content!r}")
    return found


def check_key(folder: Path, key: str) -> list[str]:
    """Look for the key in everything that was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [f"the key is in {path}" for path in files if key.encode() in path.read_bytes()]


@dataclass
class Verdict:
    """The result of the run."""

    seconds: float
    rows: int
    calls: int
    lives: int
    bills: int
    did: Counter[str]
    found: list[str]

    @property
    def clean(self) -> bool:
        return not self.found


def measure(seconds: float, seed: int, folder: Path, redis: LocalRedis) -> Verdict:
    """Let everything go wrong for that long, and check what has to hold."""
    chance, began = random.Random(seed), time.monotonic()  # noqa: S311
    key, found = f"sk-chaos-{chance.getrandbits(128):032x}", []
    options = {"rpm": 3000, "window": 5, "latency": 0.3, "faults": FAULTS, "seed": seed, "record": 1_000_000}
    with SimulatedServer(**options, api_key=key, process=True) as server:
        paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "OPENAI_BASE_URL": server.base_url}
        environment = {**os.environ, **paths, "CHAOS_KEY": key, "OPENAI_API_KEY": key}
        given = {"folder": str(folder), "url": server.base_url, "redis": redis.url, "seed": seed}
        workers = [
            Worker(slot, folder, {**given, "slot": slot}, environment, found, is_command=slot == 1)
            for slot in range(2)
        ]
        for worker in workers:
            (folder / f"rows-{worker.slot}.jsonl").touch()
            worker.start(as_command=worker.is_command)
        chaos = Chaos(chance, server, redis, workers)
        thread = threading.Thread(target=chaos.go_on)
        thread.start()
        try:
            while time.monotonic() - began < seconds and len(found) < 10:
                watch(workers, chance)
                time.sleep(0.1)
        finally:
            chaos.ended.set()
            thread.join()
        server.set_limits(rpm=3000, tpm=None)
        finish(workers)
        while server.connections and time.monotonic() - began < seconds + 300:
            time.sleep(0.1)
        found += [f"the server has {server.connections} connections"] if server.connections else []
        calls = server.calls
    asked = ("index", "at", "status", "fault", "served", "prompt_tokens", "completion_tokens", "body")
    (folder / "calls.jsonl").write_text(
        "".join(json.dumps({name: getattr(call, name) for name in asked}) + "\n" for call in calls)
    )
    rows = [(folder / f"rows-{worker.slot}.jsonl", worker.slot, None) for worker in workers]
    rows += [(folder / f"job-{n}.jsonl", n + 10, JOB) for worker in workers for n in range(worker.jobs)]
    for each in rows:
        found += check_rows(*each)
    found += [*check_bills(folder, calls), *check_key(folder, key)]
    lives = [json.loads(path.read_text()) for path in folder.glob("life-*.json")]
    did = sum((Counter(life.get("did", {})) for life in lives), chaos.did)
    return Verdict(
        seconds=round(time.monotonic() - began, 1),
        rows=sum(len(path.read_bytes().splitlines()) for path, *_ in rows),
        calls=len(calls),
        lives=sum(worker.lives for worker in workers),
        bills=len(lives),
        did=sum((worker.did for worker in workers), did),
        found=found,
    )


def watch(workers: list[Worker], chance: random.Random) -> None:
    """Start again what has ended; the second worker is now a program, now the command."""
    for worker in workers:
        if worker.look():
            unfinished = worker.is_command and worker.output.exists()
            worker.start(as_command=worker.slot == 1 and (unfinished or chance.random() < 0.7))


def finish(workers: list[Worker]) -> None:
    """Have every worker come to its end: the job of a command, and the rows of a program."""
    for worker in workers:
        worker.end.touch()
        while not worker.look() or worker.sent is not None:
            if worker.process.poll() is not None:
                worker.start(as_command=worker.is_command, ending=True)
            time.sleep(0.1)
        if worker.is_command:  # it may have been a program before
            worker.start(as_command=False, ending=True)
            while not worker.look():
                time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--life", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life:
        live(options.life)
        return
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with LocalRedis() as redis:
        verdict = measure(options.seconds, options.seed, folder, redis)
    print(f"{verdict.rows} rows, {verdict.calls} calls, {verdict.lives} lives, {verdict.bills} bills")
    print(*(f"{times:6} x {what}" for what, times in sorted(verdict.did.items())), sep="\n")
    print(*(verdict.found or ["nothing was found"]), sep="\n")
    if verdict.clean:
        shutil.rmtree(folder)
    sys.exit(0 if verdict.clean else 1)


if __name__ == "__main__":
    main()
