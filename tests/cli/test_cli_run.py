"""`run`, `estimate` and `limits` against the simulated server: what is written, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from cli import KEY, rows_of

from openai_eval_client import ModelResponse, OpenAIClient
from openai_eval_client.testing import SimulatedServer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("few_certificates", "no_pauses")


@pytest.fixture
def prompts(tmp_path):
    """Five rows, one of each kind and two more."""
    path = tmp_path / "prompts.jsonl"
    lines = [
        "one é",
        {"prompt": "two", "id": 7, "index": "mine"},
        {"messages": [{"role": "user", "content": "three"}], "nested": {"a": [1.5, None]}},
        "four",
        "five",
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def written(path):
    """The rows of an output file, by index."""
    found = rows_of(path.read_text("utf-8"))
    assert len({row["index"] for row in found}) == len(found)
    return {row["index"]: row for row in found}


# --- what is written --------------------------------------------------------------------------------------


def test_a_row_is_the_input_its_index_and_the_response(cli, prompts, tmp_path):
    """Keys are carried; one that would be ours is renamed; a summary is shown, and 0 is the exit code."""
    out = tmp_path / "out.jsonl"
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, "-o", out, "--model", "gpt-4o-mini", server=server) == 0
    rows = written(out)
    assert sorted(rows) == [0, 1, 2, 3, 4]
    responses = {index: ModelResponse.model_validate(row.pop("response")) for index, row in rows.items()}
    assert responses[1].content == "echo: two"
    assert rows[0] == {"prompt": "one é", "index": 0}
    assert rows[1] == {"prompt": "two", "id": 7, "input_index": "mine", "index": 1}
    assert rows[2]["nested"] == {"a": [1.5, None]}
    assert "5 of 5 answered" in cli.err
    assert cli.out == ""


def test_options_are_sent_with_every_row(cli, prompts, tmp_path):
    """The system prompt, the schema and any parameter reach the server; a default model is named."""
    schema = tmp_path / "city.json"
    schema.write_text('{"type": "object", "properties": {}}')
    bodies = []
    options = ["--system", "be brief", "--schema", schema, "--temperature", "0.5", "--max-tokens", "9"]
    options += ["--param", "seed=7", "--param", 'stop=["END"]', "--param", "user=me", "--limit", "1"]
    with SimulatedServer(api_key=KEY, answer=lambda body: bodies.append(body) or "{}") as server:
        assert cli("run", prompts, *options, server=server) == 0
    (body,) = bodies
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert body["response_format"]["json_schema"]["name"] == "city"
    assert (body["temperature"], body["max_tokens"], body["seed"], body["user"]) == (0.5, 9, 7, "me")
    assert body["stop"] == ["END"]
    assert "gpt-3.5-turbo, the default" in cli.err
    assert [row["index"] for row in rows_of(cli.out)] == [0]


def test_a_csv_file(cli, tmp_path):
    """The prompt is in a column, and the others are carried."""
    path = tmp_path / "prompts.csv"
    path.write_text('question,id\n"one\ntwo",a\nthree,b\n')
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", path, "--prompt-column", "question", "--quiet", server=server) == 0
    rows = sorted(rows_of(cli.out), key=lambda row: row["index"])
    assert [(row["question"], row["id"]) for row in rows] == [("one\ntwo", "a"), ("three", "b")]
    assert cli.err == ""


def test_the_summary_for_machines(cli, prompts, tmp_path):
    """On standard output, or on standard error where the rows have it."""
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, "-o", tmp_path / "out", "--json", "--no-progress", server=server) == 0
        summary = json.loads(cli.out)
        assert cli("run", prompts, "--json", server=server) == 0
    assert (summary["answered"], summary["failed"], summary["exit_code"]) == (5, 0, 0)
    assert json.loads(cli.err)["answered"] == 5
    assert len(rows_of(cli.out)) == 5


def test_what_is_odd_about_the_answers_is_said_in_the_end(cli, prompts, tmp_path):
    """Those that were cut off and those without a price; in the summary for machines too."""
    options = ["--model", "made-up", "--max-tokens", "1", "--no-progress", "-o", tmp_path / "out"]
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, *options, server=server) == 0
        said = cli.err
        assert cli("run", prompts, *options, "--overwrite", "--json", server=server) == 0
    assert "  5 answers cut off: longer than max_tokens or the model allows\n" in said
    assert "  5 answers unpriced: no price is known of 'made-up'\n" in said
    summary = json.loads(cli.out)
    assert (summary["finish_reasons"], summary["unpriced"]) == ({"length": 5}, 5)
    assert (summary["schema_misses"], summary["unsent_parameters"]) == (0, {})
    assert {row["response"]["finish_reason"] for row in written(tmp_path / "out").values()} == {"length"}


def test_progress_is_shown(cli, prompts, tmp_path):
    """In lines of standard error if there is no terminal; --no-progress shows none."""
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, "-o", tmp_path / "a", server=server) == 0
        assert "5/5 (100%)" in cli.err
        assert cli("run", prompts, "-o", tmp_path / "b", "--no-progress", server=server) == 0
        assert "5/5" not in cli.err


def test_a_key_from_a_file(cli, prompts, tmp_path):
    """It is read from there, and never shown."""
    (tmp_path / "key").write_text(f"{KEY}\n")
    with SimulatedServer(api_key=KEY) as server:
        given = ["--api-key-file", tmp_path / "key", "--base-url", server.base_url]
        assert cli("run", prompts, "-o", tmp_path / "out", *given, key=None) == 0


def test_by_batch(cli, prompts, tmp_path):
    """The same rows through the Batch API, in order, at its price."""
    with SimulatedServer(api_key=KEY) as server:
        options = ["-o", tmp_path / "out", "--batch", "--interval", "0.05"]
        assert cli("run", prompts, *options, server=server) == 0
        assert len(server.batches) == 1
    assert [row["index"] for row in rows_of((tmp_path / "out").read_text())] == [0, 1, 2, 3, 4]


def test_a_cache_answers_again(cli, prompts, tmp_path, monkeypatch):
    """With ~ for the home directory, which no shell expands after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with SimulatedServer(api_key=KEY) as server:
        for name in ("a", "b"):
            assert cli("run", prompts, "-o", tmp_path / name, "--cache=~/c.sqlite", server=server) == 0
        assert len(server.calls) == 5
    assert "5 from the cache" in cli.err
    assert (tmp_path / "c.sqlite").is_file()


# --- the report -------------------------------------------------------------------------------------------


def test_a_report_is_written_when_the_run_ends(cli, prompts, tmp_path):
    """It names the model, replaces an older page, and leaves input and output alone."""
    page = tmp_path / "run.html"
    page.write_text("of yesterday")
    with SimulatedServer(api_key=KEY) as server:
        options = ["-o", tmp_path / "out", "--model", "gpt-4o-mini", "--report", page]
        assert cli("run", prompts, *options, server=server) == 0
    assert "gpt-4o-mini" in page.read_text()
    assert f"report: {page}" in cli.err
    assert len(written(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("server_options", "options", "code"),
    [
        ({"script": ["500"]}, ["--max-retries", "0"], 1),
        ({"output_tokens": 50}, ["--max-tokens", "50", "--max-cost", "0.0001"], 3),
        ({"quota_exhausted_after": 1}, [], 4),
        ({}, ["--batch", "--interval", "0.05"], 0),
    ],
    ids=["some failed", "budget", "refused", "batch"],
)
def test_a_report_is_written_however_the_run_ends(cli, prompts, server_options, options, code):
    """The exit code is what it is without one."""
    folder = prompts.parent
    options = ["--model", "gpt-4o-mini", "--max-concurrent", "1", *options]
    for number, report in enumerate([[], ["--report", folder / "run.html"]]):
        with SimulatedServer(api_key=KEY, **server_options) as server:
            assert cli("run", prompts, "-o", folder / f"{number}", *options, *report, server=server) == code
    assert "gpt-4o-mini" in (folder / "run.html").read_text()


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("nowhere/run.html", "nowhere/run.html: No such file or directory"),
        ("prompts.jsonl/run.html", "prompts.jsonl/run.html: Not a directory"),
        (".", ": Is a directory"),
        ("prompts.jsonl", "prompts.jsonl: is the input as well"),
        ("sub/../out", "out: is the output as well"),
        ("cache.sqlite", "cache.sqlite: is the cache as well"),
    ],
)
def test_a_report_that_cannot_be_written(cli, prompts, tmp_path, report, message):
    """2, before anything is sent or lost."""
    out = tmp_path / "out"
    out.write_text("precious\n")
    (tmp_path / "sub").mkdir()
    before = prompts.read_bytes()
    options = ["-o", out, "--overwrite", "--cache", tmp_path / "cache.sqlite"]
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, *options, "--report", tmp_path / report, server=server) == 2
        assert server.calls == []
    assert "--report" in cli.err
    assert message in cli.err
    assert (out.read_text(), prompts.read_bytes()) == ("precious\n", before)


def test_a_dry_run_has_no_report(cli, prompts, tmp_path):
    """There was no run."""
    assert cli("run", prompts, "--dry-run", "--report", tmp_path / "run.html") == 0
    assert not (tmp_path / "run.html").exists()


def test_a_report_that_fails_in_the_end(cli, prompts, tmp_path, monkeypatch):
    """The rows are there; the error is shown, and 0 becomes 2."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OpenAIClient, "report", full)
    with SimulatedServer(api_key=KEY) as server:
        options = ["-o", tmp_path / "out", "--report", tmp_path / "run.html"]
        assert cli("run", prompts, *options, server=server) == 2
    assert "no report: " in cli.err
    assert "No space left on device" in cli.err
    assert len(written(tmp_path / "out")) == 5


# --- resuming ---------------------------------------------------------------------------------------------


def test_resuming_asks_for_the_rest(cli, prompts, tmp_path):
    """Rows that are there are not asked for again; a torn last line is."""
    out = tmp_path / "out"
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, "-o", out, "--limit", "3", server=server) == 0
        out.write_bytes(out.read_bytes()[:-20])
        assert cli("run", prompts, "-o", out, "--resume", server=server) == 0
        assert len(server.calls) == 6
        assert sorted(written(out)) == [0, 1, 2, 3, 4]
        assert "2 there before" in cli.err
        assert cli("run", prompts, "-o", out, "--resume", server=server) == 0
        assert len(server.calls) == 6


def test_a_changed_input_is_noticed(cli, prompts, tmp_path):
    """The line is named, and nothing is sent."""
    out = tmp_path / "out"
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, "-o", out, server=server) == 0
        prompts.write_text('"zero"\n' + prompts.read_text())
        assert cli("run", prompts, "-o", out, "--resume", server=server) == 2
        assert len(server.calls) == 5
    assert "prompts.jsonl, line 1: not what the output has at index 0" in cli.err


def test_what_failed_is_asked_again(cli, prompts, tmp_path):
    """Only when that is wanted; its row takes the place of the failed one."""
    out = tmp_path / "out"
    options = ["-o", out, "--max-retries", "0", "--max-concurrent", "1"]
    with SimulatedServer(api_key=KEY, script=["ok", "500"]) as server:
        assert cli("run", prompts, *options, server=server) == 1
        assert written(out)[1]["error"]["type"] == "InternalServerError"
        assert "--resume --retry-failed" in cli.err
        assert "1 x InternalServerError 500: the server failed" in cli.err
        assert cli("run", prompts, *options, "--resume", server=server) == 1
        assert len(server.calls) == 5
        assert cli("run", prompts, *options, "--resume", "--retry-failed", server=server) == 0
    assert all("response" in row for row in written(out).values())
    assert len(written(out)) == 5


def test_another_model_is_noticed(cli, prompts, tmp_path):
    """Before rows of two models stand in one file; a dated version of the model asked is that model."""
    options = ["-o", tmp_path / "out", "--resume"]
    with SimulatedServer(api_key=KEY) as server:
        assert (
            cli("run", prompts, *options, "--model", "gpt-4o-2024-08-06", "--limit", "2", server=server) == 0
        )
        assert cli("run", prompts, *options, "--model", "gpt-4o", "--limit", "3", server=server) == 0
        assert "this run asks" not in cli.err
        (tmp_path / "out").write_text((tmp_path / "out").read_text().replace('"gpt-4o', '"gpt-4o-mini'))
        assert cli("run", prompts, *options, "--model", "gpt-4o", server=server) == 0
    assert "the answers there (3) are of gpt-4o-mini" in cli.err
    assert "; this run asks gpt-4o" in cli.err


def test_a_dry_run_counts_what_is_left(cli, prompts, tmp_path):
    """It leaves the output as it is, a torn line and a failed row in it too."""
    out = tmp_path / "out"
    options = ["-o", out, "--max-retries", "0", "--max-concurrent", "1"]
    with SimulatedServer(api_key=KEY, script=["500"]) as server:
        assert cli("run", prompts, *options, "--limit", "3", server=server) == 1
    out.write_bytes(before := out.read_bytes()[:-20])
    dry = ["-o", out, "--resume", "--dry-run", "--json", "--cache", tmp_path / "cache"]
    assert cli("run", prompts, *dry) == 0
    assert json.loads(cli.out)["requests"] == 3
    assert "there already, and not estimated: 2" in cli.err
    assert "the cache is not looked at" in cli.err
    assert cli("run", prompts, *dry, "--retry-failed") == 0
    assert json.loads(cli.out)["requests"] == 4
    assert out.read_bytes() == before


def test_nothing_is_overwritten_unasked(cli, prompts, tmp_path):
    """An output with rows needs --resume or --overwrite."""
    out = tmp_path / "out"
    out.write_text("precious\n")
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, "-o", out, server=server) == 2
        assert "--overwrite" in cli.err
        assert cli("run", prompts, "-o", out, "--resume", server=server) == 2
        assert "out, line 1" in cli.err
        assert out.read_text() == "precious\n"
        assert cli("run", prompts, "-o", out, "--overwrite", server=server) == 0
    assert len(written(out)) == 5


# --- the other exit codes ---------------------------------------------------------------------------------


def test_the_input_is_not_the_output(cli, prompts):
    """Whatever name it has, and whatever is asked for."""
    before = prompts.read_bytes()
    assert cli("run", prompts, "-o", prompts.parent / "." / prompts.name, "--overwrite") == 2
    assert "is the input as well" in cli.err
    assert prompts.read_bytes() == before


def test_the_budget_is_reached(cli, prompts, tmp_path):
    """3, with the rows that were answered and how to go on; the row that did not fit has none."""
    out = tmp_path / "out"
    options = ["-o", out, "--model", "gpt-4o", "--max-tokens", "50", "--max-concurrent", "1"]
    with SimulatedServer(api_key=KEY, output_tokens=50) as server:
        assert cli("run", prompts, *options, "--max-cost", "0.002", server=server) == 3
    assert 0 < len(written(out)) < 5
    assert all("response" in row for row in written(out).values())
    assert "to go on: openai-eval-client run" in cli.err
    assert cli.err.rstrip().endswith("--resume")
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, *options, "--overwrite", "--max-cost", "0", server=server) == 3
    assert "nothing fits: raise --max-cost" in cli.err
    assert "--resume" not in cli.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": "sk-another-0123456789"}, ("Incorrect API key", "check OPENAI_API_KEY")),
        ({"models": ["another"]}, ("does not exist", "check --model")),
        ({"quota_exhausted_after": 0}, ("quota", "check the account's credit")),
    ],
    ids=["key", "model", "quota"],
)
def test_the_server_refuses_all(cli, prompts, tmp_path, options, message):
    """4, and no row: it is no row's fault. What to check is shown, not a command that would fail again."""
    with SimulatedServer(**{"api_key": KEY, **options}) as server:
        assert cli("run", prompts, "-o", tmp_path / "out", server=server) == 4
    assert message[0] in cli.err
    assert cli.err.splitlines()[-1].startswith(message[1])
    assert "--resume" not in cli.err
    assert not (tmp_path / "out").exists()


def test_an_address_without_its_path(cli, prompts):
    """The server's 404 names no model: it is the address that is wrong."""
    with SimulatedServer(api_key=KEY) as server:
        address = server.base_url.removesuffix("/v1")
        assert cli("run", prompts, "--base-url", address, server=server) == 4
    assert "it goes up to /v1" in cli.err.splitlines()[-1]


def test_the_cost_of_a_run_in_the_summary(cli, prompts, tmp_path):
    """A small one has two digits; a model without a price is not free."""
    with SimulatedServer(api_key=KEY) as server:
        for model, message in (("gpt-4o-mini", r" 0\.00000\d\d USD,"), ("no-such-model", " cost unknown,")):
            options = ["--model", model, "--limit", "1", "--no-progress"]
            assert cli("run", prompts, "-o", tmp_path / model, *options, server=server) == 0
            assert re.search(message, cli.err)


def test_no_server_at_the_address(cli, prompts, tmp_path):
    """4 as well: port 9 is that of no API."""
    assert cli("run", prompts, "-o", tmp_path / "out", "--max-retries", "0") == 4
    assert "connect" in cli.err.lower()
    assert "check --base-url" in cli.err.splitlines()[-1]
    assert "--resume" not in cli.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "lines", "message"),
    {
        "not JSON": ([], "{", "prompts.jsonl, line 3: not JSON"),
        "a bare text": ([], "What is it?", 'a text stands in JSON quotes: "..."'),
        "no prompt": ([], '{"question": "a"}', 'line 3: no "prompt"'),
        "an empty prompt": ([], '{"prompt": " "}', "line 3: prompt=' ': must not be empty"),
        "no such parameter": (["--param", "temprature=1"], "", "did you mean temperature"),
        "no pair": (["--param", "seed"], "", "not KEY=JSON"),
        "an option by another name": (["--param", "temperature=1"], "", "there is an option for it"),
        "a budget without a bound": (["--max-cost", "1"], "", "max_tokens"),
        "no schema": (["--schema", "/nowhere/schema.json"], "", "/nowhere/schema.json: No such file"),
        "no output": (["-o", "/nowhere/out"], "", "/nowhere/out: No such file"),
        "no reading back": (["--resume"], "", "--resume needs --output"),
        "a column": (["--prompt-column", "question"], "", 'line 2: no "question"'),
        "no key file": (["--api-key-file", "/nowhere/key"], "", "/nowhere/key: No such file"),
        "a folder": (["-o", "/"], "", "/: Is a directory"),
        "an address": (["--base-url", "nowhere"], "", "base_url='nowhere'"),
    }.values(),
)
def test_bad_input_and_usage(cli, tmp_path, options, lines, message):
    """2, and a sentence that names what is wrong; nothing was sent."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"one"\n{{"prompt": "two"}}\n{lines}')
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", path, *options, server=server) == 2
        assert server.calls == []
    assert message in cli.err
    assert cli.out == ""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"HTTPS_PROXY": "http://127.0.0.1:80a"},
            "the proxy that HTTPS_PROXY names cannot be used: Invalid port",
        ),
        ({"SSL_CERT_FILE": "/nowhere/all.pem"}, "SSL_CERT_FILE=/nowhere/all.pem: No such file or directory"),
    ],
)
def test_a_broken_environment(cli, prompts, tmp_path, monkeypatch, *, variables, message):
    """2, said once, whatever the command; a run that has not begun leaves no file."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    url = ["--base-url", "https://127.0.0.1:9/v1"]
    commands = [
        ("run", prompts, "-o", tmp_path / "out", "--model", "gpt-4o-mini"),
        ("run", prompts, "-o", tmp_path / "out", "--model", "gpt-4o-mini", "--batch"),
        ("limits",),
    ]
    for command in commands:
        assert cli(*command, *url) == 2
        assert cli.err == f"{message}\n"
        assert not (tmp_path / "out").exists()


def test_what_is_missing(cli, tmp_path):
    """No file, no key, no row: 2."""
    (tmp_path / "empty").write_text("\n")
    assert cli("run", tmp_path / "nowhere") == 2
    assert "nowhere: No such file" in cli.err
    assert cli("run", tmp_path) == 2
    assert f"{tmp_path.name}: Is a directory" in cli.err
    assert cli("run", tmp_path / "empty") == 2
    assert "no rows" in cli.err
    assert cli("run", tmp_path / "empty", key="") == 2
    assert "OPENAI_API_KEY" in cli.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
def test_a_full_disk(cli, prompts):
    """2, and a sentence."""
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", prompts, "-o", "/dev/full", server=server) == 2
    assert "/dev/full: No space left on device" in cli.err
    assert "answered" not in cli.err


def test_a_key_of_a_row_that_looks_like_a_parameter(cli, tmp_path):
    """It is copied to the output, and a warning says so."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "temperature": 0}')
    with SimulatedServer(api_key=KEY) as server:
        assert cli("run", path, server=server) == 0
    assert "not sent: temperature" in cli.err


# --- the other commands -----------------------------------------------------------------------------------


def test_an_estimate_sends_nothing(cli, prompts):
    """Neither does a dry run; no key is needed."""
    assert cli("estimate", prompts, "--model", "gpt-4o", "--max-tokens", "10", key="") == 0
    assert "5 requests to gpt-4o" in cli.out
    assert cli("run", prompts, "--model", "gpt-4o", "--max-tokens", "10", "--dry-run", "--json", key="") == 0
    assert json.loads(cli.out)["requests"] == 5


def test_the_readmes_commands_run_as_they_stand(cli, tmp_path, monkeypatch):
    """One after the other, in one folder."""
    (lines,) = re.findall(r"<!-- questions.jsonl -->\n```json\n(.*?)```", README, flags=re.DOTALL)
    (commands,) = re.findall(r"<!-- run -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "questions.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    with SimulatedServer(api_key=KEY) as server:
        for command in commands.splitlines():
            program, *arguments = shlex.split(command)
            assert (program, cli(*arguments, server=server)) == ("openai-eval-client", 0), cli.err
    assert len(written(tmp_path / "answers.jsonl")) == 3
    assert len(rows_of(cli.out)) == 2


def test_limits_are_asked_for(cli):
    """One request for each model, and what its headers say."""
    with SimulatedServer(api_key=KEY, rpm=500, tpm=30_000) as server:
        assert cli("limits", "--model", "a", "--model", "b", "--json", server=server) == 0
        assert len(server.calls) == 2
        found = json.loads(cli.out)
        assert (found["b"]["requests"]["limit"], found["a"]["tokens"]["limit"]) == (500, 30_000)
        assert cli("limits", "--model", "a", server=server) == 0
        assert {"a", "500", "30,000"} <= set(cli.out.split())


def test_limits_that_are_not_stated(cli):
    """A line says so; a wrong key is 4."""
    with SimulatedServer(api_key=KEY, headers=False) as server:
        assert cli("limits", server=server) == 0
        assert "states no limits" in cli.err
        assert cli("limits", server=server, key="sk-another-0123456789") == 4


@pytest.mark.parametrize("name", ["run", "estimate", "limits", "simulate", "batch", "demo"])
def test_every_command_explains_itself(cli, name):
    """--help of `run` has the exit codes."""
    assert cli(name, "--help") == 0
    assert name in cli.out
    assert name != "run" or "130 interrupted" in cli.out
