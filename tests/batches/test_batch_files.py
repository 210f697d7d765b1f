"""From requests to input files: every line once, in order, within what one file may hold."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from typing import Any

import pytest
from batches import MODEL, asked, connect, patient
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import BatchRequest, ValidationError
from openai_eval_client._batches import files as _files
from openai_eval_client._batches.files import (
    InputFile,
    check_requests,
    close_files,
    custom_ids,
    cut_file,
    even_counts,
    recut,
    write_files,
)
from openai_eval_client.testing import SimulatedServer

pytestmark = pytest.mark.usefixtures("few_certificates")


def files_of(requests: list[BatchRequest], **limits: Any) -> list[InputFile]:
    given_limits = {"most_lines": 50_000, **limits}
    return write_files(check_requests(requests, api="chat", default_model=MODEL), **given_limits)


def lines_in(file: InputFile) -> list[dict[str, Any]]:
    file.file.seek(0)
    return [json.loads(line) for line in file.file]


def test_a_line_is_what_the_api_documents() -> None:
    """custom_id, method, url, body: https://platform.openai.com/docs/guides/batch."""
    (file,) = files_of([BatchRequest(prompt="naïve 🦄", temperature=0.5, custom_id="mine")])
    (line,) = lines_in(file)
    assert line == {
        "custom_id": "mine",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": MODEL,
            "temperature": 0.5,
            "messages": [{"role": "user", "content": "naïve 🦄"}],
        },
    }
    file.file.seek(0)
    assert "naïve 🦄".encode() in file.file.read()  # four bytes, not twelve
    close_files([file])


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda t: t.strip())
LINE = 400  # bytes that any of these lines has at most


@patient
@given(
    st.lists(st.tuples(texts, st.sampled_from("mno")), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(LINE, 3000),
)
def test_files_hold_every_request_once_within_the_limits(
    pairs: list[tuple[str, str]], most_lines: int, most_bytes: int
) -> None:
    """In order, one model each, and none that the one before had room for."""
    requests = [BatchRequest(prompt=text, model=model) for text, model in pairs]
    files = files_of(requests, most_lines=most_lines, most_bytes=most_bytes)
    seen: list[int] = []
    for file in files:
        lines = lines_in(file)
        assert len(lines) == file.count == len(file.indexes) <= most_lines
        assert file.size == file.file.seek(0, io.SEEK_END) <= most_bytes
        assert file.first == len(seen)
        for line, index in zip(lines, file.indexes, strict=True):
            assert line["body"]["messages"][0]["content"] == pairs[index][0]
            assert line["body"]["model"] == pairs[index][1] == file.model
        seen += file.indexes
    assert sorted(seen) == list(range(len(pairs)))
    for before, after in pairwise(files):
        after.file.seek(0)
        more = len(after.file.readline())
        full = before.count == most_lines or before.size + more > most_bytes
        assert full or before.model != after.model
    close_files(files)


async def test_a_line_larger_than_a_file_may_be_is_refused(monkeypatch) -> None:
    """With its index; nothing is sent, and no file is left open."""
    monkeypatch.setattr(_files, "MOST_BYTES", 1000)
    requests = [*asked(2), BatchRequest(prompt="x" * 1000), *asked(2)]
    with SimulatedServer() as server:
        async with connect(server) as client:
            with pytest.raises(ValidationError, match=r"requests\[2\].*1,000") as caught:
                await client.submit_batch_job(requests)
        assert server.calls == []
    assert (caught.value.field, caught.value.index) == ("prompt", 2)


@patient
@given(st.integers(1, 200), st.integers(-3, 300))
def test_an_even_cut_adds_up(count: int, pieces: int) -> None:
    sizes = even_counts(count, pieces)
    assert sum(sizes) == count
    assert len(sizes) == max(1, min(pieces, count))
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


@patient
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 6), st.integers(1, 12))
def test_a_file_that_is_cut_keeps_its_lines(count: int, pieces: int, again: int, most: int) -> None:
    """Their order and places; and a restarted program cuts in the same places."""
    requests = [BatchRequest(prompt=f"p{n}", temperature=n % 2) for n in range(count)]
    cut_up: list[InputFile] = []
    for file in files_of(requests, most_lines=most):
        for piece in cut_file(file, even_counts(file.count, pieces)):
            cut_up += cut_file(piece, even_counts(piece.count, again))
        assert file.file.closed
    spans = [(file.first, file.count) for file in cut_up]
    renewed = recut(files_of(requests, most_lines=most), spans)
    assert [(file.first, file.count) for file in renewed] == spans
    for one, other in zip(cut_up, renewed, strict=True):
        assert lines_in(one) == lines_in(other)
        assert [line["custom_id"] for line in lines_in(one)] == [f"request-{n}" for n in one.indexes]
        assert (one.indexes, one.size, one.key) == (other.indexes, other.size, other.key)
    assert [index for file in cut_up for index in file.indexes] == list(range(count))
    close_files([*cut_up, *renewed])


def test_spans_that_do_not_add_up_cut_nothing() -> None:
    """A record that does not add up leaves the files whole."""
    files = files_of(asked(10), most_lines=5)
    renewed = recut(files, [(0, 3), (3, 3), (5, 5), (40, 2)])
    assert [(file.first, file.count) for file in renewed] == [(0, 5), (5, 5)]
    close_files(renewed)


def test_custom_ids_on_the_wire() -> None:
    """Own ones, made ones; with several models an own one is followed by the index."""
    assert list(custom_ids([None, None], several_models=False)) == ["request-0", "request-1"]
    assert list(custom_ids(["a", None], several_models=False)) == ["a", "request-1"]
    assert list(custom_ids(["a", None, "b"], several_models=True)) == ["a#0", "request-1", "b#2"]


def test_a_file_has_fifty_thousand_lines() -> None:
    """The API's limits are the defaults: https://platform.openai.com/docs/guides/batch."""
    files = files_of([BatchRequest(prompt="x")] * 50_001)
    assert [(file.first, file.count) for file in files] == [(0, 50_000), (50_000, 1)]
    assert _files.MOST_BYTES == 200_000_000
    close_files(files)
