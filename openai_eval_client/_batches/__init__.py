"""Prompts answered by the Batch API, resumable."""

from openai_eval_client._batches.jobs import Batches

__all__ = ["Batches"]
