"""The API's error bodies, as https://platform.openai.com/docs/guides/error-codes documents them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

SHOWN_HEAD, SHOWN_TAIL = 8, 4


class ApiError(Exception):
    """An error answer: a status, OpenAI's body, and headers of its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


def missing_key() -> ApiError:
    """401 for a request without a bearer token; unlike a wrong key's, its code is null."""
    return ApiError(
        401,
        "You didn't provide an API key. You need to provide your API key in an Authorization header using "
        "Bearer auth (i.e. Authorization: Bearer YOUR_KEY). You can obtain an API key from "
        "https://platform.openai.com/account/api-keys.",
    )


def wrong_key(key: str) -> ApiError:
    """401 for a key the server does not know, shown masked."""
    where = "You can find your API key at https://platform.openai.com/account/api-keys."
    return ApiError(401, f"Incorrect API key provided: {masked(key)}. {where}", code="invalid_api_key")


def masked(key: str) -> str:
    """The key as the API shows it: its first eight and last four characters; of a short one the first two."""
    hidden = len(key) - SHOWN_HEAD - SHOWN_TAIL
    if hidden <= 0:
        return key[:2] + "*" * len(key[2:])
    return key[:SHOWN_HEAD] + "*" * hidden + key[-SHOWN_TAIL:]


def unknown_model(model: str) -> ApiError:
    """404 for a model that does not exist."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found")


def unknown_url(method: str, path: str) -> ApiError:
    """404 for a path the API does not have."""
    return ApiError(404, f"Invalid URL ({method} {path})")


def wrong_method(method: str, path: str) -> ApiError:
    """405 for a path that exists under another method."""
    return ApiError(405, f"Not allowed to {method} on {path}.", code="method_not_supported")


def missing_parameter(name: str) -> ApiError:
    """400 for a request without something it needs."""
    return ApiError(
        400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
    )


def wrong_type(name: str, expected: str) -> ApiError:
    """400 for a parameter of another type than the API takes."""
    return ApiError(400, f"Invalid type for '{name}': expected {expected}.", param=name, code="invalid_type")


def unreadable_body() -> ApiError:
    """400 for a body that is not a JSON object."""
    return ApiError(400, "We could not parse the JSON body of your request. The API expects a JSON object.")


def quota_exhausted() -> ApiError:
    """429 of an account that has run out of money, which no waiting heals."""
    message = (
        "You exceeded your current quota, please check your plan and billing details. For more information "
        "on this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
    )
    return ApiError(429, message, kind="insufficient_quota", code="insufficient_quota")


def server_error(message: str) -> ApiError:
    """500."""
    return ApiError(500, message, kind="server_error")
