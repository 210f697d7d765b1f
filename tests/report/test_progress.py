"""How far a run is: the numbers, the bar, the lines, and that none of it can end a run."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import pty
import sys

import pytest
from answers import answer
from virtual import VirtualLoop

from openai_eval_client import (
    OpenAIClient,
    OpenAIConfig,
    RateLimitConfig,
    TokenUsage,
    ValidationError,
)
from openai_eval_client._format import timer
from openai_eval_client._limits.queue import LimitStatus
from openai_eval_client._report.progress import (
    Bar,
    Display,
    Meter,
    ProgressSnapshot,
    bar_is_open,
    details,
    fitted,
    log_line,
    write_above,
)
from openai_eval_client.testing import SimulatedServer


def response(cost, **more):
    usage = TokenUsage(prompt_tokens=1, completion_tokens=1, total_tokens=2, estimated_cost=cost)
    return answer(usage=usage, **more)


def limits(requests=0, tokens=0, *, waiting=0, cause="concurrency", seconds=0.0, tpm=None):
    per_minute = {"requests": 600.0, "tokens": tpm}
    return LimitStatus({"requests": requests, "tokens": tokens}, per_minute, waiting, cause, seconds)


# --- the numbers ------------------------------------------------------------------------------------------


def test_outcomes_and_cost_are_counted():
    """A cached answer costs nothing, and one without a price is unpriced."""
    meter = Meter(10, ProgressSnapshot(limits(5), 0, 2, 1), 100.0)
    for outcome in (response(0.5), response(9.0, cached=True), response(None), ValueError()):
        meter.count(outcome)
    state = meter.read(ProgressSnapshot(limits(9, 70), 3, 4, 2), 102.0)
    assert (state.done, state.failed, state.unpriced) == (4, 1, 1)
    assert (state.cost, state.projected) == (0.5, 1.25)
    assert (state.rate, state.seconds, state.left) == (2.0, 2.0, 3.0)
    assert state.used == {"requests": 4, "tokens": 70}
    assert (state.rate_limited, state.retries, state.in_flight) == (2, 1, 3)


def test_rates_are_those_of_the_last_minute():
    """Earlier outcomes count neither for the rate nor for what is used of the limits."""
    meter = Meter(1000, ProgressSnapshot(limits(0)), 0.0)
    for second in range(1, 121):
        meter.count(response(0.0))
        if second > 60:
            meter.count(response(0.0))
        state = meter.read(ProgressSnapshot(limits(second * 3), 1), float(second))
    assert state.rate == pytest.approx(2.0)
    assert state.used["requests"] == 180


def test_a_burst_does_not_promise_too_much():
    """The time left is no less than the limits allow, and no more than all of a limit is used."""
    meter = Meter(1200, ProgressSnapshot(limits(0)), 0.0)
    for _ in range(600):
        meter.count(response(0.0))
    state = meter.read(ProgressSnapshot(limits(700), 1), 1.0)
    assert state.left == pytest.approx(70.0)  # 600 prompts, 7/6 requests each, 10 a second
    assert state.used["requests"] == 600


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (
            ProgressSnapshot(limits(waiting=1, cause="tokens", seconds=42.4), in_flight=0, total=5),
            "waiting 0:42 for TPM",
        ),
        (
            ProgressSnapshot(limits(waiting=1, cause="requests", seconds=0.1), in_flight=0, total=5),
            "waiting for RPM",
        ),
        (
            ProgressSnapshot(limits(waiting=3, cause="pause", seconds=75), in_flight=0),
            "paused by the server 1:15",
        ),
        (ProgressSnapshot(done=1, total=5), "1 (20%), 0/s, 0:00, waiting for the Batch API"),
        (ProgressSnapshot(done=1500, total=6000, rate=12.5, in_flight=9), "1,500/6,000 (25%), 12.5/s, 0:00"),
        (ProgressSnapshot(done=1500, total=6000, left=4000, in_flight=9), "1:06:40 left"),
        (ProgressSnapshot(cost=0.0123, projected=1.5, in_flight=0), "$0.012 of ~$1.50"),
        (ProgressSnapshot(unpriced=2, in_flight=0), "cost unknown"),
        (ProgressSnapshot(unpriced=2, cost=0.5, in_flight=0), "$0.50 + 2 unpriced"),
        (ProgressSnapshot(limits(tpm=2e6), in_flight=0, used={"tokens": 123_456.0}), "TPM 123k/2M"),
        (ProgressSnapshot(failed=2, rate_limited=1, retries=3), "2 failed, $0.00, 1 x 429, 3 retries"),
    ],
)  # fmt: skip
def test_a_line_says_how_far_the_run_is(state, shown):
    """It names what the run waits for, in numbers that can be read at a glance."""
    assert shown in log_line(state).replace("1/5", "1")


def test_what_does_not_fit_is_left_out():
    """Parts are left out whole, the least important first."""
    parts = details(ProgressSnapshot(used={"requests": 5.0}, in_flight=1, retries=2))
    assert fitted(parts, 18) == "RPM 5  1 in flight"
    assert fitted(parts, 5) == "RPM 5"
    assert timer(59.6) == "1:00"


# --- what shows them --------------------------------------------------------------------------------------


def display(seconds, *, probe=ProgressSnapshot, total=10):
    """What a display of so many virtual seconds writes to standard error, which is no terminal."""
    loop = VirtualLoop()

    async def run():
        with Display(total, probe) as display:
            display.count(response(0.1))
            await asyncio.sleep(seconds)

    try:
        loop.run_until_complete(run())
        assert loop.jump.slept <= seconds + 1
    finally:
        loop.close()


def test_a_line_every_ten_seconds(capsys):
    """One more is written at the end, of a short run as well."""
    display(35)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("openai_eval_client: 1/10 (10%), ") for line in lines)
    display(1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_breaks_a_run(caplog, monkeypatch):
    """An error of the display is logged once and the run goes on, also without standard error."""
    calls = []

    def probe():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("broken")
        return ProgressSnapshot()

    display(35, probe=probe)
    assert [record.message for record in caplog.records] == [
        "progress cannot be shown; the run goes on without it"
    ]
    monkeypatch.setattr(sys, "stderr", None)
    display(35)


class Screen:
    """A terminal of so many columns in place of standard error."""

    def __init__(self, monkeypatch, columns):
        import fcntl
        import struct
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        self.file = io.TextIOWrapper(open(slave, "wb", buffering=0), write_through=True)  # noqa: PTH123, SIM115
        monkeypatch.setattr(sys, "stderr", self.file)

    def text(self):
        self.file.close()
        output = b""
        try:
            while more := os.read(self.master, 65536):
                output += more
        except OSError:  # how a terminal says that its program has ended
            os.close(self.master)
        return output.decode()


@pytest.mark.parametrize(("columns", "widest"), [(120, 120), (80, 80), (40, 40), (0, 80)])
def test_two_lines_of_a_terminal(monkeypatch, columns, widest):
    """They are no wider than the terminal; one that does not know its width has 80 columns."""
    screen = Screen(monkeypatch, columns)
    painted = Bar(200)
    assert bar_is_open()
    painted.show(
        ProgressSnapshot(done=50, total=200, rate=3, left=50, in_flight=4, used={"requests": 5}, retries=2)
    )
    write_above("a line")
    painted.close()
    assert not bar_is_open()
    text = screen.text().replace("\x1b[A", "\n").replace("\r", "\n")
    assert " 25%|" in text
    assert "50/200" in text
    assert "RPM 5  4 in flight" in text
    assert "a line" in text
    assert max(map(len, text.split("\n"))) <= widest


def test_without_tqdm_there_are_lines(monkeypatch):
    """The first says what to install for a bar."""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    screen = Screen(monkeypatch, 80)
    display(1)
    text = screen.text()
    assert "pip install 'openai-eval-client[progress]'" in text
    assert "1/10 (10%)" in text


# --- in a run ---------------------------------------------------------------------------------------------


@pytest.fixture
async def client():
    with SimulatedServer(rpm=3000) as server:
        limits = RateLimitConfig(requests_per_minute=3000, max_concurrent=4)
        async with OpenAIClient(
            OpenAIConfig(api_key="k", base_url=server.base_url), rate_limit=limits
        ) as made:
            yield made


async def test_batch_generate_and_as_completed_show_progress(client, capsys):
    """Nothing is written unless it is asked for."""
    prompts = [f"n{n}" for n in range(20)]
    await client.batch_generate(prompts)
    assert capsys.readouterr().err == ""
    await client.batch_generate(prompts, progress=True)
    assert "20/20 (100%)" in capsys.readouterr().err
    async for _ in client.as_completed(prompts, progress=True):
        pass
    assert "20/20 (100%)" in capsys.readouterr().err
    async for _ in client.as_completed(iter(prompts), progress=True):
        pass
    assert "openai_eval_client: 20, " in capsys.readouterr().err


async def test_a_cancelled_run_ends_the_display(client, capsys):
    """One last line is written, and no timer is left."""
    task = asyncio.ensure_future(client.batch_generate(["a"] * 100_000, progress=True))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert capsys.readouterr().err.count("\n") == 1


async def test_prompts_after_the_stop_event_are_not_sent(client):
    """What is in flight is yielded, and the iterator ends."""
    stop, found = asyncio.Event(), []
    async for index, _ in client.as_completed((f"n{n}" for n in range(100_000)), stop_event=stop):
        found.append(index)
        if len(found) == 10:
            stop.set()
    assert 10 <= len(found) <= 20
    assert client.stats.requests == len(found)


async def test_a_stop_event_that_is_set_already_sends_nothing(client):
    """The iterator ends at once."""
    stop = asyncio.Event()
    stop.set()
    assert [each async for each in client.as_completed(["a", "b"], stop_event=stop)] == []
    assert client.stats.attempts == 0


@pytest.mark.parametrize("given", [{"progress": print}, {"stop_event": True}])
async def test_wrong_options_are_rejected(client, given):
    """The message names the option."""
    with pytest.raises(ValidationError, match=next(iter(given))):
        client.as_completed(["a"], **given)


async def test_a_callback_that_raises_is_logged_once(client, caplog):
    """It is not logged again with each prompt."""

    def broken(fraction):
        raise RuntimeError(f"{fraction}")

    with caplog.at_level(logging.ERROR, "openai_eval_client"):
        await client.batch_generate(["a"] * 10, progress_callback=broken)
    assert len(caplog.records) == 1
