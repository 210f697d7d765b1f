"""The caller's `BatchRequest`s, checked one by one before anything is uploaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openai_eval_client._batch_lines import ENDPOINTS, Item, naming
from openai_eval_client._checks import check_text, refuse
from openai_eval_client._requests import check_parameters, check_prompt
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import BatchRequest

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from openai_eval_client._requests import Parameters

_ONLINE_ONLY = ("extra_headers", "extra_query", "timeout")
_TIERS = frozenset({None, "auto", "default"})  # a batch is a tier of its own


def endpoint_of(api: object) -> str:
    """Return the endpoint of an api, "chat" or "responses".

    Raises:
        ValidationError: It is neither.
    """
    if not isinstance(api, str) or api not in ENDPOINTS:
        refuse("api", api, "must be 'chat' or 'responses'")
    return ENDPOINTS[api]


def listed(requests: object) -> list[BatchRequest]:
    """Return the requests as a list.

    Raises:
        ValidationError: There are none, or something else is among them.
    """
    if isinstance(requests, str | bytes | dict) or not hasattr(requests, "__iter__"):
        refuse("requests", requests, f"must be a list of BatchRequest, not {type(requests).__name__}")
    found = list(requests)
    if not found:
        refuse("requests", found, "must hold at least one request")
    for index, request in enumerate(found):
        if not isinstance(request, BatchRequest):
            why = f"must be a BatchRequest, not {type(request).__name__}"
            refuse(f"requests[{index}]", request, why, field="requests", index=index)
    return found


def checked(requests: Sequence[BatchRequest], *, api: str, default_model: str) -> Iterator[Item]:
    """Yield each request, checked, by the name it has on the wire.

    Args:
        requests: At least one.
        api: "chat" or "responses".
        default_model: The model of those that name none.

    Yields:
        The requests in their order.

    Raises:
        ValidationError: Names the index, the field and the value.
    """
    for index, request in enumerate(requests):
        if request.custom_id is not None:
            name = f"requests[{index}].custom_id"
            check_text(request.custom_id, name, field="custom_id", index=index)
    models = {_model_of(request) or default_model for request in requests}
    names = naming([request.custom_id for request in requests], several_models=len(models) > 1)
    known: dict[Hashable, Parameters] = {}
    for index, (request, name) in enumerate(zip(requests, names, strict=True)):
        try:
            key = _key(request)
            parameters = known.get(key)
            if parameters is None:
                parameters = known[key] = _parameters(request, api, default_model)
            prompt = _prompt_of(request)
            check_prompt(prompt)
        except ValidationError as error:
            message = f"requests[{index}]: {error}"
            raise ValidationError(message, field=error.field, index=index) from None
        yield Item(index, name, parameters, prompt)


def is_numbered(requests: Sequence[BatchRequest], *, default_model: str) -> bool:
    """Return whether every custom_id on the wire ends with the request's index."""
    several = len({_model_of(request) or default_model for request in requests}) > 1
    return several or all(request.custom_id is None for request in requests)


def refuse_online_only(params: Mapping[str, Any]) -> None:
    """Refuse parameters that no line of a batch can carry."""
    for name in _ONLINE_ONLY:
        if params.get(name) is not None:
            refuse(name, params[name], "a request in a batch has none of its own")
    if params.get("service_tier") not in _TIERS:
        refuse("service_tier", params["service_tier"], "a batch is a tier of its own")


def _model_of(request: BatchRequest) -> str | None:
    """Return the model that a request names."""
    extra = (request.model_extra or {}).get("extra_body")
    named = extra.get("model") if isinstance(extra, dict) else None
    given = named if isinstance(named, str) else request.model
    return given if isinstance(given, str) else None  # refused by and by


def _prompt_of(request: BatchRequest) -> Any:
    """Return its prompt or messages; a request may have been changed since it was made."""
    if request.prompt is not None and request.messages is not None:
        refuse("messages", request.messages, "give either prompt or messages")
    return request.messages if request.prompt is None else request.prompt


def _parameters(request: BatchRequest, api: str, default_model: str) -> Parameters:
    params = dict(request.model_extra or {})
    refuse_online_only(params)
    return check_parameters(
        model=default_model if request.model is None else request.model,
        timeout=1.0,  # of no meaning here
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        system=params.pop("system", None),
        api=api,
        params=params,
    )


def _key(request: BatchRequest) -> Hashable:
    """Return what tells the parameters of two requests apart; most of a job share theirs."""
    named = (request.model, request.temperature, type(request.temperature), request.max_tokens)
    extra = request.model_extra
    try:
        hash(named)
    except TypeError:  # refused by and by
        return id(request)
    return (*named, _frozen(extra)) if extra else named


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_frozen, value))
    try:
        hash(value)
    except TypeError:
        return id(value)  # alive as long as its request
    return type(value), value
