"""When a run ends early."""

import openai
import pytest

from openai_eval_client import TooManyFailuresError, ValidationError
from openai_eval_client._online.stopping import StopRule, check_max_failures
from openai_eval_client._wire.bodies import status_error
from openai_eval_client.errors import rate_limited, sdk_httpx


def error_of(status, message="m"):
    """The SDK's error of a status."""
    request = sdk_httpx().Request("POST", "http://127.0.0.1/")
    body = {"error": {"message": message}}
    return status_error(status, body, sdk_httpx().Response(status, json=body, request=request))


def page():
    """The error for an HTML page."""
    response = sdk_httpx().Response(200, request=sdk_httpx().Request("POST", "http://127.0.0.1/"))
    message = "an HTML page came in place of an answer"
    return openai.APIResponseValidationError(response=response, body=None, message=message)


@pytest.mark.parametrize(
    "error", [error_of(402), error_of(429, "insufficient_quota"), rate_limited("m", 601)]
)
def test_what_meets_every_prompt_for_certain_ends_the_run_at_once(error):
    """Even in the middle."""
    rule = StopRule(600)
    rule.answered()
    assert rule.failed(error, "prompt") is error


@pytest.mark.parametrize("error", [error_of(401), error_of(403), error_of(404), page()])
def test_a_failure_that_may_be_one_prompts_ends_a_run_by_evidence(error):
    """Three different prompts in a row before any answer, twenty after one."""
    rule = StopRule(600)
    for prompt in ("a", "a", "a", "b"):
        assert rule.failed(error, prompt) is None
        assert rule.suspect is None
    assert rule.failed(error, "c") is None
    assert rule.suspect is error
    rule.answered()
    assert rule.suspect is None
    for prompt in range(19):
        assert rule.failed(error, prompt) is None
    assert rule.suspect is None
    rule.failed(error, 19)
    assert rule.suspect is error


def test_what_only_a_text_says_of_credit_ends_a_run_by_evidence():
    """A refusal may quote a prompt that speaks of credit."""
    quoted = error_of(400, "cannot parse: my account was suspended")
    rule = StopRule(600)
    for prompt in range(2):
        assert rule.failed(quoted, prompt) is None
    assert rule.suspect is None
    rule.failed(quoted, 2)
    assert rule.suspect is quoted


def test_a_resumed_run_whose_rest_is_refused_is_over():
    """The others were answered, by the cache: it is these prompts' own failure."""
    rule = StopRule(600)
    rule.answered(cached=True)
    rule.failed(error_of(403), "a")
    assert rule.last is None


def test_equal_prompts_are_evidence_only_in_number():
    """Where nothing was answered; after an answer, one prompt that is refused says nothing of the others."""
    error = error_of(403)
    rule = StopRule(600)
    for _ in range(19):
        rule.failed(error, "a")
    assert rule.suspect is None
    rule.failed(error, "a")
    assert rule.suspect is error
    rule.answered()
    for _ in range(99):
        rule.failed(error, "a")
    assert rule.suspect is None


def test_an_answer_from_the_cache_is_no_evidence():
    """It says nothing of the server."""
    rule = StopRule(600)
    for prompt in range(3):
        rule.answered(cached=True)
        rule.failed(error_of(401), prompt)
    assert rule.suspect is not None


@pytest.mark.parametrize("error", [error_of(400), error_of(403, "flagged by moderation"), error_of(500)])
def test_what_concerns_one_prompt_never_ends_a_run(error):
    """However many fail so."""
    rule = StopRule(600)
    for prompt in range(100):
        assert rule.failed(error, prompt) is None
    assert rule.suspect is rule.last is None


def test_a_run_that_is_over_in_which_all_failed_alike_ends_with_that_error():
    """Fewer prompts than evidence takes."""
    error = error_of(401)
    rule = StopRule(600)
    rule.failed(error, "a")
    assert (rule.suspect, rule.last) == (None, error)
    rule.failed(error_of(500), "b")
    assert rule.last is None


@pytest.mark.parametrize(
    ("allowed", "total", "outcomes", "ends_at"),
    [
        (0, None, "+-", 2),
        (2, None, "--+-", 4),
        (0.5, None, "-" * 30, 11),
        (0.1, None, "+" * 40 + "-" * 9, 45),
        (0.5, 4, "---", 3),
        (0.0, 9, "+-", 2),
        (None, 9, "-" * 99, None),
    ],
)
def test_more_failures_than_allowed_end_a_run(allowed, total, outcomes, ends_at):
    """A number of prompts, or a share of those done, judged from twenty on."""
    rule = StopRule(600, max_failures=allowed, total=total)
    ended = None
    for position, outcome in enumerate(outcomes, 1):
        if outcome == "+":
            rule.answered()
            continue
        error = rule.failed(error_of(500), position)
        if error is not None:
            ended = position
            assert isinstance(error, TooManyFailuresError)
            assert isinstance(error.__cause__, openai.InternalServerError)
            assert f"max_failures={allowed}" in str(error)
            break
    assert ended == ends_at


@pytest.mark.parametrize("value", [-1, 1.0, -0.1, float("nan"), "5", True, [1]])
def test_what_is_no_number_of_failures_is_refused(value):
    """By name and value."""
    with pytest.raises(ValidationError, match="max_failures") as caught:
        check_max_failures(value)
    assert caught.value.field == "max_failures"
