"""The endpoints that generate: each understands a request, makes its answer, and cuts that into events.

To add one: a module that ends with a `Generation`, its name here, and a row in `_routes.py`.
"""

from .answers import Ask, Count, Generation, quarter_bytes, required
from .chat import CHAT, COMPLETIONS, dumps
from .embeddings import EMBEDDINGS
from .responses import RESPONSES

__all__ = [
    "CHAT", "COMPLETIONS", "EMBEDDINGS", "RESPONSES", "Ask", "Count", "Generation", "dumps", "quarter_bytes",
    "required",
]  # fmt: skip
