"""A refusal of one prompt fails that prompt; one that all would meet ends a run by evidence."""

from __future__ import annotations

import pytest
from wire_rows import (
    BAD,
    DENIED,
    KEYS,
    LIMITED,
    NOT_FOUND,
    OTHER,
    Row,
    check_alone,
    check_batch,
    check_drop_in,
    check_limiter,
    check_one,
    check_run,
    over,
)
from wire_server import Reply, refusal

pytestmark = pytest.mark.usefixtures("no_pauses", "few_certificates")


def content(name, reply, error, *words, **more):
    """A row of a prompt whose content is refused: no other prompt is concerned."""
    return Row(name, (reply,), error, words=words, **more)


AZURE = {
    "message": "The response was filtered due to the prompt triggering the content management policy.",
    "type": None,
    "param": "prompt",
    "code": "content_filter",
    "status": 400,
    "innererror": {"code": "ResponsibleAIPolicyViolation"},
}
MODERATED = {
    "message": 'model requires moderation on Provider. Your input was flagged for "violence".',
    "code": 403,
    "metadata": {"reasons": ["violence"], "flagged_input": "xyz", "provider_name": "Provider"},
}
REASONS_ALONE = {"message": "Forbidden", "code": 403, "metadata": {"reasons": ["sexual"]}}
CONTENT = [
    content("xAI 403, usage guidelines", Reply(
        {"code": "The caller does not have permission", "error": "Content violates usage guidelines."}, 403),
        DENIED, "Content violates usage guidelines"),
    content("xAI 403, usage guidelines, a shorter code", Reply(
        {"code": "permission-denied", "error": "Content violates usage guidelines. "}, 403), DENIED),
    content("403, usage guidelines in OpenAI's form",
        refusal("Content violates usage guidelines.", status=403), DENIED, "usage guidelines"),
    content("OpenRouter 403, moderation", Reply({"error": MODERATED}, 403), DENIED, "flagged"),
    content("OpenRouter 403, by its reasons alone", Reply({"error": REASONS_ALONE}, 403), DENIED),
    content("400 invalid_prompt", refusal("Invalid prompt: flagged as violating our usage policy.",
        "invalid_prompt", "invalid_request_error", status=400), BAD, "Invalid prompt"),
    content("400 content_policy_violation", refusal("Your request was rejected by our safety system.",
        "content_policy_violation", "image_generation_user_error", status=400), BAD),
    content("403 content_policy_violation", refusal("m", "content_policy_violation", status=403), DENIED),
    content("Azure 400, content filter", Reply({"error": AZURE}, 400), BAD, "filtered"),
    content("LiteLLM 400, content filter", refusal(
        "litellm.ContentPolicyViolationError: the prompt triggered the content management policy", "400",
        status=400), BAD),
    content("DeepSeek 400", refusal("Content Exists Risk", "invalid_request_error", "invalid_request_error",
        status=400), BAD, "Content Exists Risk"),
    content("Moonshot 400", refusal("The request was rejected because it was considered high risk", None,
        "content_filter", status=400), BAD, "high risk"),
    content("DashScope 400", refusal("Input data may contain inappropriate content", "data_inspection_failed",
        "data_inspection_failed", status=400), BAD, "inappropriate"),
    content("Zhipu 400", Reply({"contentFilter": [{"level": 1}], "error": {"code": "1301", "message":
        "系统检测到输入或生成内容可能包含不安全或敏感内容"}}, 400), BAD),
    content("Anthropic 400", refusal("Output blocked by content filtering policy", None,
        "invalid_request_error", status=400), BAD, "content filtering policy"),
    content("Groq 400, moderation", refusal("This request was blocked by moderation", "blocked", status=400),
        BAD),
    content("for the other API", refusal("m", "invalid_prompt", status=400), BAD, api="responses"),
]  # fmt: skip
CONTEXT = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens."
TOO_LARGE = "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000."
INPUT = [
    content("404, no endpoint for images", Reply(
        {"error": {"message": "No endpoints found that support image input", "code": 404}}, 404),
        NOT_FOUND, "image input"),
    content("404, no endpoint for tools", Reply(
        {"error": {"message": "No endpoints found that support tool use. To learn more, see the docs.",
                   "code": 404}}, 404), NOT_FOUND, "tool use"),
    content("400 context_length_exceeded", refusal(CONTEXT, "context_length_exceeded",
        "invalid_request_error", status=400), BAD, "maximum context length"),
    content("vLLM 400, context", Reply({"object": "error", "message": CONTEXT, "type": "BadRequestError",
        "param": None, "code": 400}, 400), BAD, "maximum context length"),
    content("llama.cpp 400, context", Reply({"error": {"code": 400, "message":
        "the request exceeds the available context size", "type": "exceed_context_size_error"}}, 400), BAD),
    content("413", refusal("Payload too large", status=413), OTHER, "Payload too large"),
    content("413 as a page", Reply(b"<html><h1>413 Request Entity Too Large</h1></html>", 413,
        kind="text/html"), OTHER),
    content("Groq 413, tokens per minute", refusal(
        "Request too large for model on tokens per minute (TPM): Limit 6000, Requested 9000",
        "rate_limit_exceeded", "tokens", status=413), OTHER, "Request too large"),
    content("429, too large for the limit", refusal(TOO_LARGE, "rate_limit_exceeded", "tokens"), LIMITED,
        "Request too large"),
    content("422 as FastAPI has it", Reply({"detail": [{"loc": ["body"], "msg": "field required"}]}, 422),
        "UnprocessableEntityError", "field required"),
    content("400, a value that is wrong", refusal("Invalid value for 'top_p'", "invalid_value",
        "invalid_request_error", status=400), BAD, "top_p"),
    content("400, numbers for code and type", refusal("m", 400, 5, status=400), BAD),
    content("400, lists for code and type", refusal(["m"], ["x"], {"y": 1}, status=400), BAD),
    content("405", refusal("Method Not Allowed", status=405), OTHER),
    content("411", refusal("Length Required", status=411), OTHER),
    content("451", refusal("Unavailable for legal reasons", status=451), OTHER),
]  # fmt: skip


def of_all(name, reply, error, *words, **more):
    """A row of a refusal that most likely all prompts would meet."""
    return Row(name, (reply,), error, words=words, evidence=True, **more)


ALL = [
    of_all("401", refusal("Incorrect API key provided.", "invalid_api_key", "invalid_request_error",
        status=401), KEYS, "Incorrect API key"),
    of_all("401 without a body", Reply(b"", 401), KEYS),
    of_all("401 as plain text", Reply(b"Unauthorized", 401, kind="text/plain"), KEYS, "Unauthorized"),
    of_all("401 that echoes the key", refusal("The key sk-world-1234567890 is not known.", status=401), KEYS),
    of_all("401, a text as error", Reply({"error": "invalid token"}, 401), KEYS, "invalid token"),
    of_all("403", refusal("You are not allowed to do that.", status=403), DENIED, "not allowed"),
    of_all("403 as a page", Reply(b"<html><title>403</title></html>", 403, kind="text/html"), DENIED),
    of_all("xAI 403, its other meaning", Reply(
        {"code": "permission-denied", "error": "Access to the chat endpoint is denied"}, 403), DENIED,
        "chat endpoint"),
    of_all("403 unsupported country", refusal("Country, region, or territory not supported",
        "unsupported_country_region_territory", "request_forbidden", status=403), DENIED, "Country"),
    of_all("403 model_not_found", refusal("Project has no access to the model", "model_not_found",
        "invalid_request_error", status=403), DENIED, "no access"),
    of_all("404", refusal("Not Found", status=404), NOT_FOUND, "Not Found"),
    of_all("404 as FastAPI has it", Reply({"detail": "Not Found"}, 404), NOT_FOUND, "Not Found"),
    of_all("404 as plain text", Reply(b"404 page not found\n", 404, kind="text/plain"), NOT_FOUND,
        "page not found"),
    of_all("404 as a page", Reply(b"<html><title>404</title></html>", 404, kind="text/html"), NOT_FOUND),
    of_all("404 model_not_found", refusal("The model `gpt-9` does not exist", "model_not_found",
        "invalid_request_error", status=404), NOT_FOUND, "gpt-9"),
    of_all("OpenRouter 404, no endpoint at all", Reply(
        {"error": {"message": "No endpoints found for x/y.", "code": 404}}, 404), NOT_FOUND, "No endpoints"),
    of_all("Ollama 404", Reply({"error": {"message": "model 'x' not found", "type": "not_found_error"}}, 404),
        NOT_FOUND, "not found"),
    of_all("vLLM 404", Reply({"object": "error", "message": "The model `x` does not exist.", "type":
        "NotFoundError", "code": 404}, 404), NOT_FOUND, "does not exist"),
    of_all("Azure 404", Reply({"error": {"code": "DeploymentNotFound", "message":
        "The API deployment for this resource does not exist."}}, 404), NOT_FOUND, "deployment"),
    of_all("400 model_not_found", refusal("model is not available", "model_not_found", status=400),
        (BAD, NOT_FOUND), "not available"),
    of_all("for the other API", refusal("Unknown url", status=404), NOT_FOUND, api="responses"),
]  # fmt: skip
ROWS = [*CONTENT, *INPUT, *ALL]


@over(ROWS, "one")
async def test_one_prompt(row, tmp_path):
    """One call, the error in the server's own words, nothing billed or cached."""
    await check_one(row, tmp_path / "cache.sqlite")


@over(ROWS, "run", every=2)
async def test_a_run_goes_on(row):
    """Beside prompts that are answered, each of them fails its own prompt alone."""
    await check_run(row)


@over(ROWS, "run")
async def test_a_run_of_nothing_else(row):
    """A refused key, model or address ends it at the third prompt; refused contents never do."""
    await check_alone(row)


@over(ROWS, "batch", first=1, every=2)
async def test_the_same_in_a_batch(row):
    """The line fails with the same words."""
    await check_batch(row)


@over(ROWS, "limiter", every=3)
async def test_the_rate_is_not_cut(row):
    """A refusal says nothing of the rate."""
    await check_limiter(row)


@over(ROWS, "drop-in", first=1, every=2)
async def test_the_drop_in_client(row):
    """Likewise for the SDK's own calls."""
    await check_drop_in(row)
