"""What servers really send: the raw SDK beside this package, a line for each row of the tests' tables.

    python tests/benchmarks/world.py                          # every row: two minutes
    python tests/benchmarks/world.py --rows "choices" --json figures.json

One prompt is sent to a server of bare sockets that answers as the row says: by `openai.AsyncOpenAI` with
`max_retries=3`, and by this package with as many. Printed are the HTTP calls, what came out, and the seconds,
waits included. Exit code 1 if a row came out of this package otherwise than the table has it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "world"))

import openai
from wire_rows import KEY, Row, check, connect, prompt, script
from wire_server import MODEL, WireServer, serving

from openai_eval_client import ModelResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

TABLES = ("answers", "streams", "quota", "refusals", "waits", "bodies", "money")
AT_ONCE = 16
RETRIES = 3
MAX_WAIT = 600.0  # seconds; the default
BARE = ("AttributeError", "IndexError", "KeyError", "TypeError", "ValueError", "JSONDecodeError")
SECONDS = 60  # after which a row counts as hanging


@dataclass
class Figures:
    """What one client made of one row."""

    calls: int
    outcome: str
    seconds: float
    right: bool | None  # as the table has it; None: an error of no kind that it knows
    false_answer: bool  # handed out as an answer, though it is none


def rows() -> list[Row]:
    """Return the rows of all tables that are prompts of their own."""
    tables = {name: importlib.import_module(f"test_world_{name}").ROWS for name in TABLES}
    found = {f"{name}: {row.name}": row for name, table in tables.items() for row in table}
    return [replace(row, name=name) for name, row in found.items()]


@contextlib.asynccontextmanager
async def raw(server: WireServer, row: Row) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield the call of the SDK, which returns a text."""
    async with openai.AsyncOpenAI(api_key=KEY, base_url=server.url, max_retries=RETRIES) as client:

        async def call() -> Any:
            if row.api == "responses":
                return (await client.responses.create(model=MODEL, input=prompt(row))).output_text
            messages: Any = [{"role": "user", "content": prompt(row)}]
            answer = await client.chat.completions.create(model=MODEL, messages=messages)
            return answer.choices[0].message.content

        yield call


@contextlib.asynccontextmanager
async def ours(server: WireServer, row: Row) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield the call of this package."""
    max_wait = MAX_WAIT if row.max_wait >= 1 else row.max_wait  # less: the row is of waits beyond it
    async with connect(server, max_wait=max_wait, max_retries=RETRIES) as client:
        yield lambda: client.generate_response(prompt(row), api=row.api)


def shown(outcome: Any) -> str:
    """Return an outcome in a word or two."""
    if isinstance(outcome, Exception):
        return type(outcome).__name__
    text = outcome.content if isinstance(outcome, ModelResponse) else outcome
    return repr(text)[:22]


async def measure(client: Any, row: Row) -> Figures:
    """Send the prompt of a row by one client."""
    async with serving(script(row)) as server, client(server, row) as call:
        began = time.perf_counter()
        try:
            outcome = await asyncio.wait_for(call(), SECONDS)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what came out
            outcome = error
        seconds = round(time.perf_counter() - began, 2)
        is_false = row.error is not None and not row.or_answer and not isinstance(outcome, Exception)
        return Figures(server.calls, shown(outcome), seconds, is_right(row, outcome), is_false)


def is_right(row: Row, outcome: Any) -> bool | None:
    """Return whether an outcome is what the table has; None for what is not ours."""
    if not isinstance(outcome, ModelResponse | openai.OpenAIError):
        return None
    try:
        check(row, outcome)
    except AssertionError:
        return False
    return True


async def compare(chosen: list[Row]) -> list[tuple[str, Figures, Figures]]:
    """Run every row by both, many at once: most of the time is waiting."""
    bound = asyncio.Semaphore(AT_ONCE)

    async def both(row: Row) -> tuple[str, Figures, Figures]:
        async with bound:
            return row.name, await measure(raw, row), await measure(ours, row)

    return await asyncio.gather(*map(both, chosen))


def report(compared: list[tuple[str, Figures, Figures]]) -> None:
    """Print the table, and what it comes to."""
    print(f"{'':54} {'raw SDK':>38} {'this package':>38}")
    for name, theirs, our in compared:
        columns = [f"{each.calls:3} {each.outcome:>27} {each.seconds:5.1f}s" for each in (theirs, our)]
        print(f"{name[:54]:54} {columns[0]:>38} {columns[1]:>38}{'' if our.right else '  <- not as wanted'}")
    for title, place in (("raw SDK", 1), ("this package", 2)):
        figures: Any = [each[place] for each in compared]
        calls, seconds = sum(f.calls for f in figures), sum(f.seconds for f in figures)
        answers, bare = sum(f.false_answer for f in figures), sum(f.outcome in BARE for f in figures)
        print(f"{title}: {calls} calls, {seconds:.0f} s in all")
        print(f"    {answers} handed out as answers that are none, {bare} errors that are none of the SDK's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only rows whose names hold this text")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    asyncio.run(compare(rows()[:1]))  # what is imported late
    compared = asyncio.run(compare([row for row in rows() if options.rows in row.name]))
    report(compared)
    if options.json:
        figures = [{"row": name, "raw": asdict(a), "ours": asdict(b)} for name, a, b in compared]
        Path(options.json).write_text(json.dumps(figures, indent=1), "utf-8")
    sys.exit(0 if all(our.right for _, _, our in compared) else 1)


if __name__ == "__main__":
    main()
