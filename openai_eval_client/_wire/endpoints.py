"""What the path of a request says: whether it runs a model, and whether that costs anything."""

from __future__ import annotations

# The last part of the path of a POST that runs no model, and so counts against no RPM or TPM.
_UNMETERED = frozenset(
    {
        "admin_api_keys", "assistants", "batches", "cancel", "complete", "containers", "content",
        "conversations", "evals", "files", "input_tokens", "items", "jobs", "messages", "parts", "runs",
        "search", "sessions", "submit_tool_outputs", "threads", "uploads", "vector_stores",
    },
)  # fmt: skip
# Those of them that make the provider work for money all the same.
_CHARGED = frozenset(
    {
        "batches", "containers", "jobs", "runs", "search", "sessions", "submit_tool_outputs", "vector_stores",
    },
)  # fmt: skip
_FREE = "/moderations"  # https://platform.openai.com/docs/guides/moderation


def is_metered(method: str, path: str) -> bool:
    """Return whether a request runs a model, and so spends requests and tokens per minute."""
    return method == "POST" and path.rpartition("/")[2] not in _UNMETERED


def is_charged(method: str, path: str) -> bool:
    """Return whether a request may cost money."""
    return is_metered(method, path) or (method == "POST" and path.rpartition("/")[2] in _CHARGED)


def is_free(path: str) -> bool:
    """Return whether requests to this endpoint cost nothing."""
    return path.endswith(_FREE)
