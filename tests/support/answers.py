"""Answers as a client returns them, made by hand."""

from datetime import datetime, timezone

from pydantic import BaseModel

from openai_eval_client import ModelResponse, TokenUsage

SCRIPT = '<script>alert("x")</script>'


def answer(**more):
    """An answer that tries to be HTML."""
    usage = TokenUsage(prompt_tokens=7, completion_tokens=3, total_tokens=10, estimated_cost=0.002)
    values = {
        "content": SCRIPT,
        "usage": usage,
        "model": "m",
        "request_id": "r",
        "latency_ms": 12.5,
        "temperature": 1.0,
        "finish_reason": "stop",
    }
    return ModelResponse(**{**values, **more})


class Capital(BaseModel):
    """What an answer is parsed into."""

    city: str
    founded: datetime


def parsed(city):
    """An answer with a parsed object."""
    response = answer()
    response._parsed = Capital(city=city, founded=datetime(1000, 1, 1, tzinfo=timezone.utc))
    return response
