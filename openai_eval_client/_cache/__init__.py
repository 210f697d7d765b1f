"""Answers and records of batches in one SQLite file."""

from openai_eval_client._cache.cache import Cache, Keeper, Occurrence, open_cache

__all__ = ["Cache", "Keeper", "Occurrence", "open_cache"]
