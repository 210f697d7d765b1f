"""How many tokens a request will count: text, images, tools."""

from openai_eval_client._tokens.counter import TokenCounter

__all__ = ["TokenCounter"]
