"""What the batch commands read and write, without the processes."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import BatchError, BatchRequest, ModelResponse, TokenUsage, ValidationError
from openai_eval_client._cli.batch import by_lines, read_requests
from openai_eval_client._cli.rows import Source, line_of
from openai_eval_client._runtime.files import replacing

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Reads requests from lines."""
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"

    def from_lines(*lines, **defaults):
        path.write_bytes(b"".join(lines))
        return read_requests(Source(str(path), form="jsonl"), defaults)

    return from_lines


@given(st.lists(TEXTS, min_size=1), st.booleans())
def test_a_text_a_line(read, texts, raw):
    """Every text comes out as it went in, whatever line breaks of Unicode it holds."""
    lines = [json.dumps(text, ensure_ascii=not raw).encode() + b"\n" for text in texts]
    requests, numbers = read(*lines)
    assert requests == [BatchRequest(prompt=text) for text in texts]
    assert numbers == list(range(1, len(texts) + 1))


@given(st.lists(st.sampled_from([b"\n", b"  \r\n", b'"a"\r\n']), max_size=20))
def test_lines_keep_their_numbers(read, lines):
    """Blank ones hold no request, but count."""
    assert read(b'\xef\xbb\xbf"first"\n', *lines)[1] == [
        1,
        *(number for number, line in enumerate(lines, start=2) if line.strip()),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"5", "line 2: 5: must be a text, or an object"),
        (b"[1]", "line 2: [1]: must be a text, or an object"),
        (b"{", "line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b"Hi", "line 2: not JSON: Expecting value: line 1 column 1 (char 0): 'Hi'; a text stands in JSON"),
        (b"9" * 10_000, "line 2: "),
        (b'"\xff"', "line 2: not UTF-8"),
        (b"{}", "line 2: give prompt or messages"),
        (b'{"prompt": "a", "messages": []}', "line 2: give either prompt or messages"),
        (b'{"prompt": 5}', "line 2: prompt=5: "),
        (b'{"prompt": "a", "temperature": "0.5"}', "line 2: temperature='0.5': "),
        (b'{"prompt": "a", "max_tokens": true}', "line 2: max_tokens=True: "),
        (b'{"prompt": "a", "custom_id": 7}', "line 2: custom_id=7: "),
    ],
    ids=lambda value: value[:20],
)
def test_what_no_request_is_made_of(read, line, said):
    """The line is named, and the key with its value."""
    with pytest.raises(ValidationError) as caught:
        read(b'"a"\n', line)
    assert "in.jsonl, " + said in str(caught.value)


def test_nothing_to_ask(read):
    """An input of blank lines holds no request."""
    with pytest.raises(ValidationError, match="empty"):
        read(b"\n", b"")


def test_defaults_fill_what_a_line_leaves_out(read):
    """A parameter under its other name, or a system message of its own, is not left out; null is."""
    lines = [
        {"prompt": "a", "max_tokens": None},
        {"prompt": "a", "max_completion_tokens": 7},
        {"prompt": [{"role": "system", "content": "s"}]},
        {"prompt": "a", "instructions": "i"},
    ]
    requests, _ = read(*(json.dumps(line).encode() + b"\n" for line in lines), max_tokens=5, system="be brief")
    assert [request.max_tokens for request in requests] == [5, None, 5, 5]
    assert [(request.model_extra or {}).get("system") for request in requests] == [
        "be brief", "be brief", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "index", "expected"),
    [
        ("requests[1]: n=0: must be", 1, "in, line 4: n=0: must be"),
        ("requests[1].custom_id='x': as that of requests[0]", 1, "in, line 4: custom_id='x': as that of line 2"),
        ("completion_window='x': must be", None, "completion_window='x': must be"),
        ("requests[0]: prompt='requests[7]': must be", 0, "in, line 2: prompt='requests[7]': must be"),
    ],
)
def test_indexes_become_lines(message, index, expected):
    """A user of the command line sees lines, not lists."""
    assert by_lines(ValidationError(message, index=index), "in", [2, 4]) == expected


def test_a_row_of_each_kind():
    """A response reads back as it was; an error has its type, message and code."""
    usage = TokenUsage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    response = ModelResponse(
        content="é\u2028\n",
        usage=usage,
        model="m",
        request_id="r",
        latency_ms=0,
        temperature=1,
        finish_reason="",
    )
    line = line_of({"index": 3}, response, only_ascii=True)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    row = json.loads(line)
    assert row["index"] == 3
    assert ModelResponse.model_validate(row["response"]) == response
    expected = {"type": "BatchError", "message": "m\n", "code": "c"}
    assert json.loads(line_of({"index": 0}, BatchError("m\n", code="c"))) == {"index": 0, "error": expected}
    expected = {"type": "ValueError", "message": "v", "code": None}
    assert json.loads(line_of({"index": 0}, ValueError("v"))) == {"index": 0, "error": expected}


# --- the output -------------------------------------------------------------------------------------------


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    """Until then what had the name keeps it; afterwards nothing else is there."""
    path = tmp_path / "out"
    path.write_bytes(b"before")
    with replacing(str(path)) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask():
    """The process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_half_a_file_has_no_name(tmp_path, error):
    """Whatever stops the writing, what was there stays."""
    path = tmp_path / "out"
    path.write_bytes(b"before")
    with pytest.raises(error), replacing(str(path)) as file:  # noqa: PT012  # it fails half way
        file.write(b"half")
        raise error
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("out", b"before")]


def test_a_link_goes_on_pointing(tmp_path):
    """The file behind it is replaced, not the link."""
    (tmp_path / "real").write_bytes(b"before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing(str(tmp_path / "link")) as file:
        file.write(b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"after"


def test_a_pipe_is_written_to(tmp_path):
    """What is no regular file stays what it is."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read_back = []
    reader = threading.Thread(target=lambda: read_back.append(path.read_bytes()))
    reader.start()
    with replacing(str(path)) as file:
        file.write(b"through")
    reader.join(timeout=10)
    assert read_back == [b"through"]
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("name", ["missing/out", "file/out", "."])
def test_a_name_that_cannot_be_written(tmp_path, monkeypatch, name):
    """The error names it as the user did."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, replacing(name):  # noqa: PT011  # any of its subclasses
        pass
    assert caught.value.filename == name
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
