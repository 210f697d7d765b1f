"""Which paths there are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ._endpoints import chat, completions, embeddings, responses
from ._endpoints.answers import compose, mark_cached
from ._errors import unknown_url, wrong_method

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._endpoints.answers import Answer, Ask, Count, Json
    from ._options import Options

BASE = "/v1"
UPLOAD = ("POST", f"{BASE}/files")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """An endpoint that is limited, delayed and subject to faults.

    Attributes:
        read: Understands a request body.
        write: Makes the whole answer.
        stream: Cuts the whole answer into events; None where it cannot be streamed.
    """

    read: Callable[[Json, Count], Ask]
    write: Callable[[Ask, Callable[[str], Answer], str], Json]
    stream: Callable[[Ask, Json], list[bytes]] | None = None

    def answer(self, ask: Ask, ident: str, options: Options) -> Json:
        """The whole answer as the options want it."""
        body = self.write(ask, partial(compose, ask, options=options), ident)
        return {**body, "usage": mark_cached(body["usage"], ask.prompt_tokens, options.cached_tokens)}


@dataclass(frozen=True, slots=True)
class Lookup:
    """An endpoint that answers at once: called with the known models and the path's parameters."""

    answer: Callable[[Sequence[str], dict[str, str]], Json]


@dataclass(frozen=True, slots=True)
class Stored:
    """An endpoint of files or batches, by its name in `endpoint_script`."""

    name: str


@dataclass(frozen=True, slots=True)
class Route:
    """A method, a path below /v1 with its parameters in braces, and what answers there."""

    method: str
    path: str
    endpoint: Generation | Lookup | Stored

    def match(self, path: str) -> dict[str, str] | None:
        """The path's parameters, or None where it is another path."""
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/].*)", BASE + self.path)
        found = re.fullmatch(pattern, path)
        return found and found.groupdict()


def model_object(name: str) -> Json:
    """A model as GET /models lists it."""
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "openai"}


def list_models(models: Sequence[str], _parameters: dict[str, str]) -> Json:
    """GET /models."""
    return {"object": "list", "data": [model_object(name) for name in models]}


def one_model(_models: Sequence[str], parameters: dict[str, str]) -> Json:
    """GET /models/{model}, once the model is known to exist."""
    return model_object(parameters["model"])


ROUTES = (
    Route("POST", "/chat/completions", Generation(read=chat.read, write=chat.write, stream=chat.stream)),
    Route(
        "POST",
        "/responses",
        Generation(read=responses.read, write=responses.write, stream=responses.stream),
    ),
    Route(
        "POST",
        "/completions",
        Generation(read=completions.read, write=completions.write, stream=completions.stream),
    ),
    Route("POST", "/embeddings", Generation(read=embeddings.read, write=embeddings.write)),
    Route("GET", "/models", Lookup(list_models)),
    Route("GET", "/models/{model}", Lookup(one_model)),
    Route("POST", "/files", Stored("upload")),
    Route("GET", "/files", Stored("list_files")),
    Route("GET", "/files/{id}/content", Stored("content")),
    Route("GET", "/files/{id}", Stored("retrieve_file")),
    Route("DELETE", "/files/{id}", Stored("delete")),
    Route("POST", "/batches", Stored("create")),
    Route("GET", "/batches", Stored("list")),
    Route("POST", "/batches/{id}/cancel", Stored("cancel")),
    Route("GET", "/batches/{id}", Stored("retrieve")),
)
EXACT = {(route.method, BASE + route.path): route for route in ROUTES}


def find(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The route of a request and its path's parameters.

    Raises:
        ApiError: 404 for an unknown path, 405 for an unknown method on a known one.
    """
    if route := EXACT.get((method, path)):
        return route, {}
    matches = [(route, parameters) for route in ROUTES if (parameters := route.match(path)) is not None]
    for route, parameters in matches:
        if route.method == method:
            return route, parameters
    raise (wrong_method if matches else unknown_url)(method, path)
