"""A refusal that no waiting cures: QuotaError at once, and the run ends; a daily allowance ends it too."""

from __future__ import annotations

import pytest
from wire_rows import (
    BAD,
    LIMITED,
    QUOTA,
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
CREDIT = "Your credit is used up."
CODES = (
    "insufficient_quota",
    "billing_not_active",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "billing_hard_limit_reached",
    "insufficient_balance",
)


def used_up(name, reply, *words, **more):
    """A row of an account whose credit is used up."""
    return Row(name, (reply,), QUOTA, words=words, **({"ends": True} | more))


BY_EVIDENCE = {"ends": False, "evidence": True}  # a message alone says it, which may quote a prompt


OPENAI = [
    *(used_up(f"429 {code}", refusal(CREDIT, code, "rate_limit_error"), CREDIT) for code in CODES),
    *(used_up(f"429 {code}, by type alone", refusal(CREDIT, None, code), CREDIT) for code in CODES[:3]),
    used_up("429 with a wait", refusal(CREDIT, CODES[0], headers=("retry-after-ms: 5",))),
    used_up("429 with a wait in its message", refusal("Try again in 5ms.", CODES[1], "requests")),
    used_up("429 that wants to be retried", refusal(CREDIT, CODES[0], headers=("x-should-retry: true",))),
    used_up(
        "400 billing_hard_limit_reached", refusal(CREDIT, CODES[6], "billing_limit_user_error", status=400)
    ),
    used_up("403 insufficient_quota", refusal(CREDIT, CODES[0], "insufficient_quota", status=403), CREDIT),
    used_up("401 billing_not_active", refusal(CREDIT, CODES[1], "invalid_request_error", status=401), CREDIT),
    used_up("404 insufficient_quota", refusal(CREDIT, CODES[0], status=404)),
    used_up("429 by its message alone", refusal("You exceeded your current quota, check your plan.")),
    used_up("a text as error", Reply({"error": "insufficient_quota: check your plan"}, 429)),
    used_up("402", refusal("Payment Required", status=402), "Payment Required"),
    used_up("402 without a body", Reply(b"", 402)),
    used_up("402 as plain text", Reply(b"Insufficient funds", 402, kind="text/plain"), "Insufficient funds"),
    used_up("402 as a page", Reply(b"<html>Pay first</html>", 402, kind="text/html")),
    used_up("402 with a code of its own", refusal(CREDIT, "rate_limit_exceeded", status=402), CREDIT),
    used_up("402 that wants to be retried", refusal(CREDIT, status=402, headers=("x-should-retry: true",))),
    used_up("for the other API", refusal(CREDIT, CODES[3]), CREDIT, api="responses"),
]
SUSPENDED = "Account x is suspended, possibly due to reaching the monthly spending limit."
SIBLINGS = [
    used_up("DeepSeek 402",
        refusal("Insufficient Balance", "invalid_request_error", "unknown_error", status=402),
        "Insufficient Balance"),
    used_up("DeepSeek behind a proxy, 400",
        refusal("Insufficient Balance", "invalid_request_error", "unknown_error", status=400), **BY_EVIDENCE),
    used_up("Moonshot, suspended", refusal(
        "Your account org-1 is suspended, please check your plan and billing details",
        kind="exceeded_current_quota_error"), "suspended"),
    used_up("Moonshot, by its words alone",
        refusal("Your account is suspended due to insufficient balance, please recharge")),
    used_up("OpenRouter 402", Reply(
        {"error": {"message": "Insufficient credits. Add more using the credits page", "code": 402}}, 402,
    ), "Insufficient credits"),
    used_up("OpenRouter 402, too few for max_tokens", Reply(
        {"error": {"message": "This request requires more credits, or fewer max_tokens.", "code": 402}}, 402,
    )),
    used_up("one-api 403", refusal("预扣费额度失败", "insufficient_user_quota", "new_api_error", status=403),
        "额度"),
    used_up("one-api 429, its code before its words",
        refusal("当前分组上游负载已饱和", "insufficient_quota", "insufficient_quota")),
    used_up("LiteLLM 429 by type", refusal(
        "Budget has been exceeded! Current cost: 26.0, Max budget: 0.25", "429", "budget_exceeded"),
        "Budget has been exceeded"),
    used_up("LiteLLM 400 by type", refusal(
        "ExceededBudget: over budget. Spend=0.9, Budget=0.1", "400", "budget_exceeded", status=400)),
    used_up("Anthropic 400", refusal(
        "Your credit balance is too low to access the Anthropic API.", None, "invalid_request_error",
        status=400), "credit balance is too low", **BY_EVIDENCE),
    used_up("Gemini, its quota without a wait", Reply(
        [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED",
                    "message": "You exceeded your current quota, please check your plan."}}],
        429), "exceeded your current quota"),
    used_up("Fireworks 412", refusal(SUSPENDED, "PRECONDITION_FAILED", "error", status=412), "suspended"),
    used_up("Fireworks behind LiteLLM", refusal(f"APIError: Fireworks_aiException - {SUSPENDED}", "412",
        status=412), "suspended"),
    used_up("Together 402", refusal("Credit limit exceeded, please navigate to billing", "credit_limit",
        "credit_limit", status=402), "Credit limit exceeded"),
    used_up("Hugging Face 402", Reply(
        {"error": "You have exceeded your monthly included credits for Inference Providers."}, 402),
        "monthly included credits"),
    used_up("DashScope 400 Arrearage", refusal(
        "Access denied, please make sure your account is in good standing.", "Arrearage", "Arrearage",
        status=400), "good standing"),
    used_up("DashScope 403 free tier", refusal(
        "The free tier of the model has been exhausted.", "AllocationQuota.FreeTierOnly", status=403)),
    used_up("Zhipu 429", Reply({"error": {"code": "1113", "message": "您的账户已欠费"}}, 429)),
    used_up("xAI 403", Reply(
        {"code": "The caller does not have permission to execute the specified operation",
         "error": "Your team has used all available credits or reached its monthly spending limit."}, 403),
        "monthly spending limit"),
    used_up("SiliconFlow 403", Reply(
        {"code": 30001, "message": "Sorry, your account balance is insufficient", "data": None}, 403),
        "balance is insufficient"),
    used_up("FastAPI's form", Reply({"detail": "Insufficient balance"}, 429), "Insufficient balance"),
    used_up("a message beside nothing", Reply({"message": "insufficient_quota"}, 429)),
]  # fmt: skip
GROQ_DAY = (
    "Rate limit reached for model `llama` on tokens per day (TPD): Limit 100000, Used 97050, "
    "Requested 3619. Please try again in 9m38.016s."
)
FREE_DAY = (
    "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day"
)


def daily(name, reply, *words, pause=None):
    """A row of an allowance that is used up for today."""
    return Row(name, (reply,), LIMITED, words=words, ends=True, cut=None, pause=pause, max_wait=0.5)


DAILY = [
    daily("OpenRouter, free models per day", Reply(
        {"error": {"message": FREE_DAY, "code": 429, "metadata": {"headers": {"X-RateLimit-Limit": "50"}}}},
        429), "free-models-per-day"),
    daily("OpenRouter, by type", refusal("Rate limit exceeded: free-models-per-day-high-balance.", "429",
        "rate_limit_error")),
    daily("requests per day without a wait", refusal("Rate limit reached on requests per day (RPD)",
        "rate_limit_exceeded", "requests")),
    daily("a quota of Google's per day without a wait", Reply([{"error": {
        "code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Quota exceeded for this metric.",
        "details": [{"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}],
    }}], 429)),
    daily("Groq, tokens per day with a wait", refusal(GROQ_DAY, "rate_limit_exceeded", "tokens"),
        "tokens per day", pause=578.016),
    daily("requests per day with a wait in its headers", refusal(
        "Rate limit reached on requests per day (RPD)", headers=("retry-after: 4000",)), pause=4000.0),
]  # fmt: skip
# What is a rate limit, or a refusal of another kind, though some of its words are those of the above.
OTHERS = [
    Row("a rate limit that names the plan", (
        refusal("Rate limit reached. See your plan and billing details.", "rate_limit_exceeded", "requests"),
    ), LIMITED, 3, cut=True),
    Row("a rate limit that names the quota of a minute", (
        refusal("Quota exceeded for quota metric 'Requests' and limit 'Requests per minute'"),
    ), LIMITED, 3, cut=True),
    Row("a prompt about money", (
        refusal("Invalid value: 'insufficient'. Supported values are: 'low', 'high'.", "invalid_value",
                "invalid_request_error", status=400),
    ), BAD),
]  # fmt: skip
ROWS = [*OPENAI, *SIBLINGS, *DAILY, *OTHERS]


@over(ROWS, "one")
async def test_one_prompt(row, tmp_path):
    """One call, the error in the server's own words, nothing billed or cached."""
    await check_one(row, tmp_path / "cache.sqlite")


@over(ROWS, "run", every=2)
async def test_a_run_ends_in_its_middle(row):
    """Nothing more is sent, and what was answered is handed out."""
    await check_run(row)


@over(ROWS, "run", first=1, every=4)
async def test_a_run_of_nothing_else(row):
    """It ends at the first prompt."""
    await check_alone(row)


@over(ROWS, "batch", first=1, every=2)
async def test_the_same_in_a_batch(row):
    """The line fails with the same words."""
    await check_batch(row)


@over(ROWS, "limiter", every=2)
async def test_the_rate_is_not_cut(row):
    """Credit is no rate; a daily allowance pauses the model."""
    await check_limiter(row)


@over(ROWS, "drop-in", first=1, every=2)
async def test_the_drop_in_client(row):
    """Likewise for the SDK's own calls."""
    await check_drop_in(row)
