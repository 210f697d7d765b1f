"""The batch commands, run as a user runs them: in processes of their own, against the simulated server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openai_eval_client import BatchJobStatus, ModelResponse
from openai_eval_client.testing import SimulatedServer

COMMAND = [sys.executable, "-W", "error::ResourceWarning", "-m", "openai_eval_client", "batch"]
KEY = "sk-right-0123456789"
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def environment(server, key=KEY):
    """What a user has set."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return {**known, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": key, "COLUMNS": "100"}


def batch(server, *arguments, given="", key=KEY):
    """Run one command to its end."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=environment(server, key),
        input=given,
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert KEY not in done.stderr + done.stdout
    return done


@contextlib.contextmanager
def started(server, *arguments):
    """Start one command whose standard input is empty; it does not outlive the test."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(server),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def submitted(server, *prompts):
    """Submit prompts and return the job's id."""
    done = batch(server, "submit", "-", given="".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ended(server):
    """Wait until the server has no batch under way."""
    terminal = {"completed", "failed", "expired", "cancelled"}
    while not all(made["status"] in terminal for made in server.batches):
        time.sleep(0.01)


def rows(text):
    """The lines of a results file."""
    return [json.loads(line) for line in text.splitlines()]


# --- what each command does -------------------------------------------------------------------------------


def test_a_job_from_submit_to_its_results(tmp_path):
    """Standard output holds the id, the status, the results, each alone; the rest goes to standard error."""
    (tmp_path / "prompts.jsonl").write_text(
        '"one é"\n\n{"prompt": "two", "temperature": 0}\n'
        '{"messages": [{"role": "user", "content": "three"}], "custom_id": "third"}\n',
        encoding="utf-8",
    )
    with SimulatedServer(api_key=KEY) as server:
        done = batch(
            server, "submit", str(tmp_path / "prompts.jsonl"), "--model", "gpt-4o-mini", "--metadata", "a=b=c"
        )
        job = done.stdout.removesuffix("\n")
        (made,) = server.batches
        assert (done.returncode, job) == (0, made["id"])
        assert made["metadata"]["a"] == "b=c"
        assert "3" in done.stderr
        assert "24h" in done.stderr

        done = batch(server, "status", job, "--wait", "--interval", "0.05", "--json")
        status = BatchJobStatus.model_validate_json(done.stdout)
        assert (done.returncode, status.status, status.completed_count) == (0, "completed", 3)

        table = batch(server, "status", job)
        assert table.returncode == 0
        assert {job, "completed", "3"} <= set(table.stdout.split())

        shown = batch(server, "results", job)
        assert shown.returncode == 0
        found = rows(shown.stdout)
        assert [(row["index"], row.get("custom_id")) for row in found] == [(0, None), (1, None), (2, "third")]
        responses = [ModelResponse.model_validate(row["response"]) for row in found]
        assert [response.content for response in responses] == ["echo: one é", "echo: two", "echo: three"]
        assert [response.temperature for response in responses] == [1.0, 0.0, 1.0]
        assert "USD" in shown.stderr

        written = batch(server, "results", job, "--output", str(tmp_path / "results.jsonl"))
        assert (written.returncode, written.stdout) == (0, "")
        assert (tmp_path / "results.jsonl").read_text(encoding="utf-8") == shown.stdout
        assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "results.jsonl"]


def test_the_readmes_commands_run_as_they_stand(tmp_path):
    """Piped together by a shell, as the README shows them."""
    (block,) = re.findall(r"<!-- batch -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    (lines,) = re.findall(r"<!-- prompts.jsonl -->\n```json\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "prompts.jsonl").write_text(lines, encoding="utf-8")
    command = f'openai-eval-client() {{ "{sys.executable}" -m openai_eval_client "$@"; }}\n'
    with SimulatedServer(api_key=KEY) as server:
        paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command + block],  # noqa: S607
            env={**environment(server), **paths},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    answers = rows((tmp_path / "results.jsonl").read_text("utf-8"))
    assert len(answers) == len(lines.splitlines())
    assert all("response" in row for row in answers)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_options_are_for_lines_that_say_nothing_of_it(api):
    """A line's own model, temperature, length and system prompt win."""
    limit = "max_tokens" if api == "chat" else "max_output_tokens"
    lines = [
        {"prompt": "bare", "temperature": None},
        {"prompt": "own", "temperature": 0.5, "max_tokens": 9, "system": "mine", "model": "own-model"},
        {"prompt": "long", limit: 8},
        {"messages": [{"role": "developer", "content": "given"}, {"role": "user", "content": "hello"}]},
    ]
    options = [
        "--model", "m", "--temperature", "0.25", "--max-tokens", "5", "--system", "be brief", "--api", api
    ]  # fmt: skip
    sent = []
    with SimulatedServer(api_key=KEY, answer=lambda body: sent.append(body) or "done") as server:
        done = batch(server, "submit", "-", *options, given="\n".join(map(json.dumps, lines)))
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.strip().split("+")) == 2  # a batch for each model
        ended(server)
    texts = [json.dumps(body.get("messages", body.get("input"))) for body in sent]
    bare, own, long, given = (
        next(body for body, text in zip(sent, texts, strict=True) if word in text)
        for word in ("bare", "own", "long", "given")
    )
    assert [(body["model"], body["temperature"], body[limit]) for body in (bare, own, long, given)] == [
        ("m", 0.25, 5), ("own-model", 0.5, 9), ("m", 0.25, 8), ("m", 0.25, 5),
    ]  # fmt: skip
    systems = [("be brief" in json.dumps(body), "mine" in json.dumps(body)) for body in (bare, own, given)]
    assert systems == [(True, False), (False, True), (False, False)]


def test_a_running_job_is_cancelled():
    """What was answered stays; what was not is a row that says so."""
    plan = {"status": "in_progress", "done": 0.5}
    with SimulatedServer(api_key=KEY, batch_plans=[plan]) as server:
        job = submitted(server, "a", "b")
        while not server.batches[0]["request_counts"]["completed"]:
            time.sleep(0.01)
        done = batch(server, "cancel", job)
        assert done.returncode == 0
        assert "cancell" in done.stdout
        ended(server)
        again = batch(server, "cancel", job, "--json")
        assert (again.returncode, json.loads(again.stdout)["status"]) == (0, "cancelled")
        assert batch(server, "status", job, "--wait").returncode == 1
        found = rows(batch(server, "results", job).stdout)
    assert sorted(row.get("error", {"code": ""})["code"] for row in found) == ["", "batch_cancelled"]


def test_jobs_are_listed_the_newest_first():
    """As many as asked for; batches that others made are not listed."""
    with SimulatedServer(api_key=KEY) as server:
        jobs = [submitted(server, "a"), submitted(server, "b", "c")]
        done = batch(server, "list", "--json")
        found = [BatchJobStatus.model_validate(job) for job in json.loads(done.stdout)]
        assert done.returncode == 0
        assert [(job.job_id, job.request_count) for job in found] == [(jobs[1], 2), (jobs[0], 1)]
        table = batch(server, "list", "--limit", "1").stdout
        assert jobs[1] in table
        assert jobs[0] not in table


def test_waiting_outlives_an_outage():
    """Once the job was seen, a server that does not answer is asked again."""
    script = {"retrieve": ["ok", *["500"] * 4]}
    plans = [{"status": "in_progress"}]
    with SimulatedServer(api_key=KEY, batch_plans=plans, endpoint_script=script) as server:
        job = submitted(server, "a")
        with started(server, "status", job, "--wait", "--interval", "0.05", "--json") as waiting:
            while "again in" not in waiting.stderr.readline():
                assert waiting.poll() is None
            batch(server, "cancel", job)
            shown, _ = waiting.communicate(timeout=30)
    assert json.loads(shown)["status"] == "cancelled"


# --- the exit codes ---------------------------------------------------------------------------------------


def test_some_failed():
    """1, and a row for each request: the answer, or type, message and code of its error."""
    plan = {"lines": ["400", "ok", "expired", "timeout"]}
    with SimulatedServer(api_key=KEY, batch_plans=[plan]) as server:
        job = submitted(server, *"abcd")
        ended(server)
        assert batch(server, "status", job, "--wait").returncode == 1
        done = batch(server, "results", job)
    assert done.returncode == 1
    assert "3 of 4" in done.stderr
    found = rows(done.stdout)
    assert [row["index"] for row in found] == [0, 1, 2, 3]
    assert found[1]["response"]["content"] == "echo: b"
    errors = [found[n]["error"] for n in (0, 2, 3)]
    assert all(set(error) == {"type", "message", "code"} for error in errors)
    assert [error["type"] for error in errors] == ["BadRequestError", "BatchError", "BatchError"]
    assert [error["code"] for error in errors[1:]] == ["batch_expired", "request_timeout"]


def test_not_finished_yet(tmp_path):
    """1, with the status, and what has the output's name keeps it."""
    (tmp_path / "results.jsonl").write_text("of yesterday")
    with SimulatedServer(api_key=KEY, batch_plans=[{"status": "in_progress"}]) as server:
        job = submitted(server, "a")
        done = batch(server, "results", job, "-o", str(tmp_path / "results.jsonl"))
        assert batch(server, "status", job).returncode == 0
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search("validating|in_progress", done.stderr)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("results.jsonl", "of yesterday")
    ]


def test_not_one_request_was_run():
    """4, with the reason and the request it is about."""
    error = {"code": "model_not_found", "message": "no such model", "line": 2, "param": "body.model"}
    with SimulatedServer(api_key=KEY, batch_plans=[{"status": "failed", "errors": [error]}]) as server:
        job = submitted(server, "a", "b")
        ended(server)
        waited, done = batch(server, "status", job, "--wait"), batch(server, "results", job)
    assert (waited.returncode, done.returncode, done.stdout) == (4, 4, "")
    assert "request 1: model_not_found: no such model" in waited.stdout
    assert "no such model" in done.stderr


def test_the_queue_is_full():
    """4, and the job's id names what was made of it."""
    options = {"enqueued_tokens": 5, "enqueued_refusal": "create"}
    with SimulatedServer(api_key=KEY, **options) as server:
        done = batch(server, "submit", "-", given='"a prompt of many more tokens than five, it seems"')
    assert (done.returncode, done.stdout) == (4, "")
    assert "nqueued" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["submit", "-"], ["status", "batch_1", "--wait"], ["results", "batch_1"], ["list"]]
)
def test_a_wrong_key(arguments):
    """4 and a sentence, which does not show the key."""
    with SimulatedServer(api_key="sk-another-0123456789") as server:
        done = batch(server, *arguments, given='"a"')
    assert (done.returncode, done.stdout) == (4, "")
    assert "Incorrect API key" in done.stderr


def test_no_such_job():
    """4: the server knows none of that name, or not with this key."""
    with SimulatedServer(api_key=KEY) as server:
        done = batch(server, "cancel", "batch_never_made")
    assert done.returncode == 4
    assert "batch_never_made" in done.stderr


def test_no_server_at_the_address():
    """4, and a sentence."""
    with SimulatedServer() as server:
        gone = environment(server)
    done = subprocess.run([*COMMAND, "list"], env=gone, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "connect" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    {
        "a key that the API does not have": (
            ["submit", "-"],
            '"a"\n\n{"prompt": "b", "temprature": 1}',
            "line 3: temprature=1: not a parameter; did you mean temperature?",
        ),
        "two of one name": (
            ["submit", "-"],
            '\n{"prompt": "a", "custom_id": "x"}\n{"prompt": "b", "custom_id": "x"}',
            "line 3: custom_id='x': line 2 has the same: each custom_id must be unique",
        ),
        "not JSON": (["submit", "-"], "what is it?", "line 1: not JSON"),
        "nothing": (["submit", "-"], "\n", "empty"),
        "no file": (["submit", "/nowhere/prompts.jsonl"], "", "No such file"),
        "no pair": (["submit", "-", "--metadata", "a"], '"a"', "KEY=VALUE"),
        "a key twice": (["submit", "-", "--metadata", "a=1", "--metadata", "a=2"], '"a"', "given before"),
        "a window": (["submit", "-", "--window", "7d"], '"a"', "completion_window='7d': the server refuses"),
        "no key to send": (["submit", "-", "--model", " "], '"a"', "default_model=' '"),
        "no job": (["status", ""], "", "job_id=''"),
        "no time at all": (["status", "batch_1", "--wait", "--interval", "0"], "", "interval=0"),
        "no folder": (["results", "batch_1", "-o", "/nowhere/results.jsonl"], "", "/nowhere/results.jsonl"),
        "no command": (["sumbit"], "", "sumbit"),
    }.values(),
)
def test_bad_input(arguments, given, message):
    """2, and a sentence that names it; nothing was created."""
    with SimulatedServer(api_key=KEY) as server:
        done = batch(server, *arguments, given=given)
        assert server.batches == []
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_no_key():
    """2: what is missing is named."""
    with SimulatedServer() as server:
        done = batch(server, "list", key="")
    assert done.returncode == 2
    assert "OPENAI_API_KEY" in done.stderr


@pytest.mark.parametrize("arguments", [["status", "JOB", "--wait"], ["submit", "PROMPTS"]], ids=" ".join)
def test_interrupting(tmp_path, arguments):
    """Ctrl-C ends with 130 and a sentence, and the job goes on."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"b"')
    options = {"batch_plans": [{"status": "in_progress"}], "endpoint_script": {"upload": ["ok", "hang"]}}
    with SimulatedServer(api_key=KEY, **options) as server:
        names = {"JOB": submitted(server, "a"), "PROMPTS": str(prompts)}
        calls = len(server.calls)
        with started(server, *(names.get(word, word) for word in arguments)) as running:
            while len(server.calls) == calls:
                assert running.poll() is None
            running.send_signal(signal.SIGINT)
            shown, message = running.communicate(timeout=30)
        assert [made["status"] in {"validating", "in_progress"} for made in server.batches] == [True]
    assert (running.returncode, shown) == (130, "")
    assert "interrupted" in message
    assert "Traceback" not in message


def test_a_reader_that_leaves_is_no_fault_of_ours():
    """`results JOB | head -n 0` ends without a word about pipes."""
    with SimulatedServer(api_key=KEY) as server:
        job = submitted(server, "a")
        ended(server)
        with started(server, "results", job) as reading:
            reading.stdout.close()
            message = reading.stderr.read()
    assert "Error" not in message
    assert "Exception" not in message


def test_every_command_explains_itself():
    """--help of each names what it takes."""
    with SimulatedServer() as server:
        shown = batch(server, "--help").stdout
    assert all(word in shown for word in ("submit", "status", "results", "cancel", "list", "130"))
