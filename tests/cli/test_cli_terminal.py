"""What a terminal would obey reaches none, whoever wrote it: a server, a file, a name."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from types import SimpleNamespace

import pytest
from cli import KEY, rows_of
from wire_server import MODEL, Reply, chat, refusal, serving

from openai_eval_client._cli import common
from openai_eval_client._format import printable, printable_json

EVIL = "\x1b]52;c;aGk=\x07\x1b[2J\r\x08\x7f\x9b31m\u202etxt.exe\u2066"
OBEYED = set("\x1b\x07\r\x08\x7f\x9b\u202e\u2066")


@contextlib.contextmanager
def in_a_thread(script, batches=()):
    """A server of bare sockets, on an event loop of its own."""
    ready, found = threading.Event(), SimpleNamespace()

    async def serve():
        async with serving(script) as server:
            server.batches.update({batch["id"]: batch for batch in batches})
            found.base_url, found.loop, found.end = server.url, asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await found.end.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield found
    finally:
        found.loop.call_soon_threadsafe(found.end.set)
        thread.join(10)


def batch_of(number, **fields):
    """A batch that failed, all of whose texts are evil."""
    errors = {"data": [{"message": f"m {EVIL} {KEY}", "code": f"c{EVIL}", "param": EVIL, "line": 1}]}
    counts = {"total": 1, "completed": 0, "failed": 1}
    known = {"object": "batch", "endpoint": "/v1/chat/completions", "metadata": {EVIL: EVIL}}
    times = {"created_at": 1, "failed_at": 2, "completion_window": "24h", "request_counts": counts}
    return {"id": f"batch_{number}", "status": "failed", "errors": errors, **known, **times, **fields}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "INPUT", "--model", MODEL], 0),
        (["run", "INPUT", "--model", f"evil{EVIL}"], 4),
        (["run", f"no{EVIL}file"], 2),
        (["run", "BROKEN"], 2),
        (["limits", "--model", f"evil{EVIL}"], 4),
        (["batch", "status", "batch_1"], 0),
        (["batch", "status", "batch_1", "--json"], 0),
        (["batch", "results", "batch_1"], 4),
        (["estimate", "INPUT", "--model", f"evil{EVIL}", "--max-tokens", "5"], 0),
    ],
)  # fmt: skip
def test_no_command_writes_what_a_terminal_obeys(cli, tmp_path, arguments, code):
    """To standard output and standard error: answers, refusals, batches, names of models and files."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "good", "id": EVIL}) + "\n")
    (tmp_path / "broken.jsonl").write_text(f"{EVIL}\n")
    names = {"INPUT": str(tmp_path / "in.jsonl"), "BROKEN": str(tmp_path / "broken.jsonl")}
    script = {
        "evil": [refusal(f"no such model {EVIL} {KEY}", code="model_not_found", status=404)],
        "good": [Reply(chat(EVIL))],
    }
    with in_a_thread(script, [batch_of(1)]) as server:
        assert cli(*(names.get(each, each) for each in arguments), server=server) == code
    assert OBEYED & set(cli.out + cli.err) == set()
    assert cli.out + cli.err


def test_rows_on_a_terminal_are_the_same_rows(cli, tmp_path):
    """They are JSON, in which any character may be escaped."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "good", "id": EVIL}) + "\n")
    with in_a_thread({"good": [Reply(chat(EVIL))]}) as server:
        assert cli("run", tmp_path / "in.jsonl", "--model", MODEL, server=server) == 0
    (row,) = rows_of(cli.out)
    assert (row["id"], row["response"]["content"]) == (EVIL, EVIL)


def test_lines_of_the_log_and_tables_lose_it_too(capfd):
    """And brackets and colons are no markup."""
    common.say(f"a {EVIL} b\nc [red]:smile:")
    common.print_table([f"name{EVIL}"], [[f"cell{EVIL}"]])
    out, err = capfd.readouterr()
    assert OBEYED & set(out + err) == set()
    assert err == "a ]52;c;aGk=[2J31mtxt.exe b\nc [red]:smile:\n"


def test_what_is_left_of_a_text():
    """All that is no control: half a surrogate pair becomes valid, as standard output is strict."""
    assert printable("a\tb\nc ä 😀 \u200f \ud83d") == "a\tb\nc ä 😀 \u200f \ufffd"
    assert json.loads(printable_json(json.dumps(EVIL, ensure_ascii=False))) == EVIL
