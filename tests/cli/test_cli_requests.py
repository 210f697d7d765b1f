"""The requests of `batch submit`, read without the processes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import BatchRequest, ValidationError
from openai_eval_client._cli.batch import by_lines, read_requests
from openai_eval_client._cli.rows import Source

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
    ("line", "message"),
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
def test_what_no_request_is_made_of(read, line, message):
    """The line is named, and the key with its value."""
    with pytest.raises(ValidationError) as caught:
        read(b'"a"\n', line)
    assert "in.jsonl, " + message in str(caught.value)


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
    text = "\n".join(map(json.dumps, lines)).encode()
    requests, _ = read(text, max_tokens=5, system="be brief")
    assert [request.max_tokens for request in requests] == [5, None, 5, 5]
    assert [(request.model_extra or {}).get("system") for request in requests] == [
        "be brief", "be brief", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "index", "expected"),
    [
        ("requests[1]: n=0: must be", 1, "in, line 4: n=0: must be"),
        (
            "requests[1].custom_id='x': requests[0] has the same",
            1,
            "in, line 4: custom_id='x': line 2 has the same",
        ),
        ("completion_window='x': must be", None, "completion_window='x': must be"),
        ("requests[0]: prompt='requests[7]': must be", 0, "in, line 2: prompt='requests[7]': must be"),
    ],
)
def test_indexes_become_lines(message, index, expected):
    """A user of the command line sees lines, not lists."""
    assert by_lines(ValidationError(message, index=index), "in", [2, 4]) == expected
