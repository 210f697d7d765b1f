"""What the command line makes of a failure."""

from __future__ import annotations

import openai
import pytest

from openai_eval_client import BudgetExceededError, QuotaError
from openai_eval_client._cli import common
from openai_eval_client.errors import sdk_httpx


def status_error(kind, status, code="", message="no"):
    """An error as the SDK raises it."""
    response = sdk_httpx().Response(status, request=sdk_httpx().Request("POST", "http://test/v1"))
    return kind(message, response=response, body={"code": code, "message": message})


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        (status_error(openai.AuthenticationError, 401), 4, "check OPENAI_API_KEY or --api-key-file"),
        (status_error(openai.PermissionDeniedError, 403), 4, "check OPENAI_API_KEY or --api-key-file"),
        (status_error(openai.NotFoundError, 404, "model_not_found"), 4, "check --model"),
        (status_error(openai.NotFoundError, 404, message="No model `m`"), 4, "check --model"),
        (status_error(openai.NotFoundError, 404), 4, "check --base-url"),
        (status_error(openai.BadRequestError, 400), 4, "check --model and the parameters"),
        (status_error(QuotaError, 429), 4, "check the account's credit"),
        (status_error(openai.InternalServerError, 500), 1, ""),
        (BudgetExceededError("spent"), 3, "nothing fits: raise --max-cost"),
    ],
    ids=str,
)
def test_what_to_check_after_an_error(error, code, advice):
    """The exit code and the options to look at; nothing to check where only time helps."""
    assert common.exit_code_of(error) == code
    shown = common.what_to_check(error, answered=False)
    assert shown.startswith(advice)
    assert bool(shown) == bool(advice)


def test_a_budget_that_had_room_for_some_rows():
    """There is nothing to check: the summary shows how to go on."""
    assert common.what_to_check(BudgetExceededError("spent"), answered=True) == ""


def test_an_explained_error_quotes_no_prompt():
    """It has the class, the status and the API's code, and what they mean."""
    error = status_error(openai.BadRequestError, 400, "content_policy_violation", "the prompt was: secret")
    shown = "BadRequestError 400 content_policy_violation: the provider refuses the content"
    assert common.explain(error) == shown
