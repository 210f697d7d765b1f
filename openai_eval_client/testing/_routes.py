"""Which paths there are, and what answers each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ._endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Generation
from ._faults import ApiError

BASE = "/v1"
UPLOAD = ("POST", f"{BASE}/files")


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a path of the API, and what answers there."""

    method: str
    path: str  # below /v1, with its parameters in braces
    endpoint: Generation | str  # a generation, or the name of another endpoint

    def match(self, path: str) -> dict[str, str] | None:
        """Return the path's parameters, or None if it is another path."""
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/].*)", BASE + self.path)
        found = re.fullmatch(pattern, path)
        return found and found.groupdict()


ROUTES = (
    Route("POST", "/chat/completions", CHAT),
    Route("POST", "/responses", RESPONSES),
    Route("POST", "/completions", COMPLETIONS),
    Route("POST", "/embeddings", EMBEDDINGS),
    Route("POST", "/responses/{id}/cancel", "cancel_response"),
    Route("GET", "/responses/{id}", "retrieve_response"),
    Route("DELETE", "/responses/{id}", "delete_response"),
    Route("GET", "/models", "list_models"),
    Route("GET", "/models/{model}", "retrieve_model"),
    Route("POST", "/files", "upload"),
    Route("GET", "/files", "list_files"),
    Route("GET", "/files/{id}/content", "content"),
    Route("GET", "/files/{id}", "retrieve_file"),
    Route("DELETE", "/files/{id}", "delete"),
    Route("POST", "/batches", "create"),
    Route("GET", "/batches", "list"),
    Route("POST", "/batches/{id}/cancel", "cancel"),
    Route("GET", "/batches/{id}", "retrieve"),
)
EXACT = {(route.method, BASE + route.path): route for route in ROUTES}


def find(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """Return the route of a request and its path's parameters; raise a 404 or 405 if there is none."""
    if route := EXACT.get((method, path)):
        return route, {}
    matches = [(route, parameters) for route in ROUTES if (parameters := route.match(path)) is not None]
    for route, parameters in matches:
        if route.method == method:
            return route, parameters
    if matches:
        raise ApiError(405, f"Not allowed to {method} on {path}.", code="method_not_supported")
    raise ApiError(404, f"Invalid URL ({method} {path})")
