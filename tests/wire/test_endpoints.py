"""The table of endpoints: what runs a model, what is billed, what is input, what bounds the output."""

import pytest

from openai_eval_client._wire.requests import (
    BATCH_PATHS,
    INPUT_KEYS,
    PATHS,
    endpoint_of,
    max_output,
)


@pytest.mark.parametrize(
    ("path", "metered", "billed", "free"),
    [
        ("/v1/chat/completions", True, True, False),
        ("/v1/responses", True, True, False),
        ("/openai/deployments/x/chat/completions", True, True, False),
        ("/v1/embeddings", True, True, False),
        ("/v1/moderations", True, False, True),
        ("/v1/rerank", True, True, False),
        ("/v1/batches", False, True, False),
        ("/v1/threads/t/runs", False, True, False),
        ("/v1/files", False, False, False),
        ("/v1/batches/b/cancel", False, False, False),
    ],
)
def test_a_post_to_a_path(path, metered, billed, free):
    """A path that is not in the table runs a model and may cost money."""
    row = endpoint_of(path)
    assert (row.metered, row.billed, row.free) == (metered, billed, free)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files", "/v1/rerank"])
def test_any_other_method_runs_no_model(path):
    """It costs nothing, wherever it goes."""
    row = endpoint_of(path, "GET")
    assert (row.metered, row.billed, row.free) == (False, False, False)


def test_our_own_methods_ask_two_endpoints():
    """By the names that `api=` takes, for online prompts and the Batch API."""
    assert PATHS == {"chat": "/chat/completions", "responses": "/responses"}
    assert {api: f"/v1{path}" for api, path in PATHS.items()} == BATCH_PATHS


def test_the_input_is_named_once():
    """By the keys of all endpoints together."""
    assert set(INPUT_KEYS) == {"messages", "input", "instructions", "prompt"}


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("/chat/completions", {"max_tokens": 9}, 9),
        ("/chat/completions", {"max_tokens": 9, "max_completion_tokens": 7, "n": 3}, 21),
        ("/responses", {"max_output_tokens": 5, "max_tokens": 9}, 5),
        ("/completions", {"max_tokens": 4}, 4),
        ("/embeddings", {"max_tokens": 4}, 0),
        ("/rerank", {"max_output_tokens": 6}, 6),
        ("/chat/completions", {}, None),
    ],
)
def test_the_output_is_bounded_by_what_the_endpoint_takes(path, body, tokens):
    """None where nothing bounds it."""
    assert max_output(body, path) == tokens


def test_a_path_is_known_by_its_end():
    """Completions of a chat are not those of the older endpoint."""
    assert endpoint_of("/v1/chat/completions").inputs == ("messages",)
    assert endpoint_of("/v1/completions").inputs == ("prompt",)
