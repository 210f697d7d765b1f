"""Rows in and out, without the runs."""

from __future__ import annotations

import asyncio
import json
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import BatchError, ModelResponse, TokenUsage, ValidationError
from openai_eval_client._cli.rows import Output, Row, Source, carried, fingerprint, line_of, read_in_thread

TEXTS = st.text()  # halves of surrogate pairs among them
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["prompt", "index", "response", "error", "input_index", "id"]) | TEXTS
USAGE = TokenUsage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
RESPONSE = ModelResponse(
    content="é\u2028\n", usage=USAGE, model="m", request_id="r", latency_ms=0, temperature=1, finish_reason=""
)


def source(path, text, *, column=None, form=None, limit=None):
    path.write_bytes(text)
    return Source(str(path), column=column, form=form, limit=limit)


# --- reading ----------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    """Blank lines count as lines, but have no index."""
    text = b'\xef\xbb\xbf"a"\r\n\n{"prompt": "b", "n": 1}\n{"messages": [{"role": "user", "content": "c"}]}'
    rows = list(source(tmp_path / "in.jsonl", text).rows())
    assert [(row.index, row.line) for row in rows] == [(0, 1), (1, 3), (2, 4)]
    assert [row.prompt for row in rows] == ["a", "b", [{"role": "user", "content": "c"}]]
    assert rows[1].data == {"prompt": "b", "n": 1}


@pytest.mark.parametrize(("name", "comma"), [("in.csv", ","), ("in.tsv", "\t"), ("in", ",")])
def test_tables(tmp_path, name, comma):
    """By the name's ending, or as said; fields may hold line breaks and a megabyte."""
    lines = [["question", "id"], ['"one\ntwo"', "a"], ["x" * 1_000_000, "é"]]
    text = "\r\n".join(map(comma.join, lines)).encode("utf-8-sig")
    found = source(tmp_path / name, text, column="question", form=None if "." in name else "csv")
    assert [(row.index, row.data["id"]) for row in found.rows()] == [(0, "a"), (1, "é")]
    assert [row.line for row in found.rows()] == [3, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("in.jsonl", b'"a"\n5', "line 2: 5: must be a text"),
        ("in.jsonl", b'{"prompt": "a", "x": NaN}', "line 1: not JSON: NaN"),
        ("in.jsonl", b'"\xff"', "line 1: not UTF-8"),
        ("in.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("in.jsonl", b'{"prompt": "a", "messages": []}', "line 1: has"),
        ("in.jsonl", b'{"question": "a"}', "--prompt-column names another"),
        ("in.jsonl", b'{"prompt": 5}', "line 1: prompt=5"),
        ("in.csv", b"prompt,id\na,1\nb", "line 3: 1 fields, but the header has 2"),
        ("in.csv", b"prompt,id,id\n", "line 1: the column 'id' is there twice"),
        ("in.csv", b'prompt\n"a', "not CSV"),
        ("in.csv", b"prompt\n\xff", "line 2: not UTF-8"),
        ("in.csv", b"question\na", 'line 2: no "prompt"'),
    ],
)
def test_what_is_no_row(tmp_path, name, text, message):
    """The file and the line are named."""
    with pytest.raises(ValidationError) as caught:
        list(source(tmp_path / name, text).rows())
    assert f"{name}, line" in str(caught.value)
    assert message in str(caught.value)


async def test_a_pipe_is_read_by_a_thread():
    """A row is there before the next one is; an error comes after the rows before it."""
    reading, writing = os.pipe()

    def rows():
        with open(reading, "rb") as file:  # noqa: PTH123
            for index, line in enumerate(file):
                yield Row(index, index + 1, {}, line.decode())
        raise ValidationError("bad")

    found = read_in_thread(rows())
    os.write(writing, b"one\n")
    assert (await anext(found)).prompt == "one\n"
    os.write(writing, b"two\n")
    os.close(writing)
    assert (await anext(found)).prompt == "two\n"
    with pytest.raises(ValidationError, match="bad"):
        await anext(found)


async def test_a_pipe_is_not_read_far_ahead():
    """However fast its writer is."""
    taken = []

    def rows():
        for index in range(10_000):
            taken.append(index)
            yield Row(index, index, {}, "x")

    found = read_in_thread(rows())
    assert (await anext(found)).index == 0
    await asyncio.sleep(0.05)
    assert len(taken) < 200
    await found.aclose()


# --- writing ----------------------------------------------------------------------------------------------


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_a_row_reads_back_as_it_was(data):
    """All that it carried is there, and its fingerprint tells it from what it is not."""
    for outcome in (RESPONSE, ValueError("x\ud800")):
        line = line_of({**carried(data), "index": 3}, outcome)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        row = json.loads(line)
        assert row["index"] == 3
        assert ("response" in row) != ("error" in row)
        assert fingerprint(row) == fingerprint(carried(data))
        assert len(row) == len(data) + 2
        assert fingerprint(carried({**data, "prompt": [data.get("prompt")]})) != fingerprint(row)


def test_a_row_of_each_kind():
    """A response reads back as it was; an error has its type, message and code."""
    line = line_of({"index": 3}, RESPONSE)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    row = json.loads(line)
    assert row["index"] == 3
    assert ModelResponse.model_validate(row["response"]) == RESPONSE
    expected = {"type": "BatchError", "message": "m\n", "code": "c"}
    assert json.loads(line_of({"index": 0}, BatchError("m\n", code="c"))) == {"index": 0, "error": expected}
    expected = {"type": "ValueError", "message": "v", "code": None}
    assert json.loads(line_of({"index": 0}, ValueError("v"))) == {"index": 0, "error": expected}


def test_a_row_is_json_for_every_parser(tmp_path):
    """Numbers too large for a float, and those that JSON does not have, are null; the row is found again."""
    (row,) = source(tmp_path / "in.jsonl", b'{"prompt": "a", "n": [1e999, 1], "m": {"x": -1e999}}').rows()
    odd = RESPONSE.model_copy(update={"logprobs": {"content": [{"logprob": float("-inf")}]}})
    line = line_of({**carried(row.data), "index": 0}, odd)
    written = json.loads(line, parse_constant=pytest.fail)
    assert (written["n"], written["m"]) == ([None, 1], {"x": None})
    assert written["response"]["logprobs"] == {"content": [{"logprob": None}]}
    assert fingerprint(written) == fingerprint(carried(row.data))
    assert [again.prompt for again in source(tmp_path / "again.jsonl", line).rows()] == ["a"]


def test_the_bytes_of_a_row():
    """`run` writes other scripts as they are, but for half a surrogate pair; `batch results` escapes them."""
    error = b'"error":{"type":"ValueError","message":"%s","code":null}}\n'
    assert line_of({"id": "é"}, ValueError("é")) == '{"id":"é",'.encode() + error % "é".encode()
    assert line_of({"id": "é"}, ValueError("é\ud800")) == '{"id":"é",'.encode() + error % rb"\u00e9\ud800"
    escaped = line_of({"id": "é"}, ValueError("é"), only_ascii=True)
    assert escaped == rb'{"id":"\u00e9",' + error % rb"\u00e9"


@given(st.integers(0, 400))
def test_a_torn_last_line_is_taken_off(tmp_path_factory, cut):
    """Wherever a crash has cut it: what was whole stays, and what follows is whole."""
    path = tmp_path_factory.mktemp("torn") / "out"
    lines = [line_of({"prompt": "é", "index": n}, RESPONSE if n else ValueError("v")) for n in range(3)]
    whole = b"".join(lines)
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    output = Output(str(path))
    done = output.done(without_errors=False)
    for index in range(3):
        if index not in done:
            output.write(lines[index])
    output.close()
    assert sorted(json.loads(line)["index"] for line in path.read_bytes().splitlines()) == [0, 1, 2]


def test_failed_rows_are_dropped(tmp_path):
    """And what is written then is in the file of that name."""
    output = Output(str(tmp_path / "out"))
    for index, outcome in enumerate([ValueError("v"), RESPONSE]):
        output.write(line_of({"prompt": "a", "index": index}, outcome))
    assert set(output.done(without_errors=False)) == {0, 1}
    assert output.failed == 1
    output.close()
    output = Output(str(tmp_path / "out"))
    assert set(output.done(without_errors=True)) == {1}
    output.write(line_of({"prompt": "a", "index": 0}, RESPONSE))
    output.close()
    assert [json.loads(line)["index"] for line in (tmp_path / "out").read_text().split("\n")[:-1]] == [1, 0]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize(
    "text", ["a\n", "{}\n", '{"index": 0}\n', '{"index": 0, "response": {}}\n{"index": 0, "error": {}}\n']
)
def test_what_no_run_wrote(tmp_path, text):
    """It is named, and stays as it is."""
    (tmp_path / "out").write_text(text)
    output = Output(str(tmp_path / "out"))
    with pytest.raises(ValidationError, match="out, line"):
        output.done(without_errors=False)
    output.close()
    assert (tmp_path / "out").read_text() == text


def test_two_runs_do_not_write_to_one_file(tmp_path):
    """The second is refused as long as the first has it open."""
    first = Output(str(tmp_path / "out"))
    with pytest.raises(ValidationError, match="another run"):
        Output(str(tmp_path / "out"))
    first.close()
    Output(str(tmp_path / "out")).close()


def test_half_a_row_is_not_left_behind(tmp_path):
    """Where the disk has room for a part of it only."""
    output = Output(str(tmp_path / "out"))
    output.write(b'{"index": 0}\n')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(OSError, match="out"):
            output.write(b'{"index": 1, "prompt": "long"}\n')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output.close()
    assert (tmp_path / "out").read_bytes() == b'{"index": 0}\n'
