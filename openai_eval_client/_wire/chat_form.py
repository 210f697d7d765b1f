"""What is written for Chat Completions, in the form of the Responses API: messages, tools, formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from openai_eval_client._validation import reject_input

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_NO_PARAMETERS = {"type": "object", "properties": {}}
_TURN_ONLY = {"annotations", "audio", "function_call", "name", "refusal", "tool_calls"}  # of chat messages
_WITHOUT_FORM = {"audio", "function_call", "name"}  # of these, what the Responses API has nothing for
_NO_FORM = "the Responses API has no such thing"


class _Place(NamedTuple):
    """Where something stands in what the caller gave, for the error that refuses it."""

    name: str
    field: str
    position: int | None = None  # of the prompt among several

    def at(self, more: str) -> _Place:
        return self._replace(name=f"{self.name}{more}")

    def refuse(self, value: object, why: str = _NO_FORM) -> NoReturn:
        reject_input(self.name, value, why, field=self.field, index=self.position)


def responses_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with tools and tool choice in the form of the Responses API."""
    formed = dict(body)
    if isinstance(body.get("tools"), list | tuple):
        place = _Place("tools", "tools")
        formed["tools"] = [_tool(tool, place.at(f"[{at}]")) for at, tool in enumerate(body["tools"])]
    if isinstance(body.get("tool_choice"), dict):
        formed["tool_choice"] = _choice(body["tool_choice"], _Place("tool_choice", "tool_choice"))
    return formed


def responses_format(wanted: Any) -> Any:
    """Return a `response_format` as the Responses API has it."""
    nested = wanted.get("json_schema") if isinstance(wanted, dict) else None
    return {"type": wanted["type"], **nested} if isinstance(nested, dict) else wanted


def input_items(messages: Sequence[Any], name: str = "prompt", index: int | None = None) -> list[Any]:
    """Return messages as input items; those that have the form already stay as they are."""
    items: list[Any] = []
    custom: set[str] = set()  # ids of the calls of custom tools
    for position, message in enumerate(messages):
        place = _Place(f"{name}[{position}]", "prompt", index)
        if not isinstance(message.get("role"), str) or message.get("type", "message") != "message":
            items.append(message)
        elif message["role"] == "tool":
            items.append(_tool_output(message, custom, place))
        else:
            items += _turn(message, custom, place)
    return items


def _tool(tool: Any, place: _Place) -> Any:
    kind, inner = _nested(tool, place, "name")
    if kind is None:
        return tool
    if kind == "function":  # strict is the default there, and not in Chat Completions
        defaults = {"parameters": _NO_PARAMETERS, "strict": False}
        return {"type": kind, **defaults, **{key: value for key, value in inner.items() if value is not None}}
    form = inner.get("format")
    grammar = form.get("grammar") if isinstance(form, dict) else None
    formed = {"format": {"type": "grammar", **grammar}} if isinstance(grammar, dict) else {}
    return {"type": kind, **inner, **formed}


def _choice(choice: dict[str, Any], place: _Place) -> Any:
    allowed = choice.get("allowed_tools")
    if isinstance(allowed, dict):
        tools = [
            _choice(tool, place) if isinstance(tool, dict) else tool for tool in allowed.get("tools", ())
        ]
        return {"type": "allowed_tools", **allowed, "tools": tools}
    kind, inner = _nested(choice, place, "name")
    return choice if kind is None else {"type": kind, "name": inner["name"]}


def _nested(value: Any, place: _Place, *keys: str) -> tuple[str | None, dict[str, Any]]:
    """Return kind and content of what holds its content by the name of its kind; None: it does not."""
    kind = value.get("type", "function") if isinstance(value, dict) else None
    if kind not in {"function", "custom"} or kind not in value:
        return None, {}
    inner = value[kind]
    if not isinstance(inner, dict) or not all(isinstance(inner.get(key), str) for key in keys):
        place.refuse(value, f"its {kind} must have {' and '.join(keys)}")
    return kind, inner


def _turn(message: dict[str, Any], custom: set[str], place: _Place) -> Iterator[Any]:
    """Yield the items of a message that is not a tool's: the message, and the calls that it makes."""
    for key in _WITHOUT_FORM & message.keys():
        if message[key] is not None:
            place.at(f".{key}").refuse(message[key])
    if message["role"] == "function":
        place.refuse(message, f"{_NO_FORM} as the role function; give tool_calls and the role tool")
    plain = {key: value for key, value in message.items() if key not in _TURN_ONLY}
    content, calls = message.get("content"), message.get("tool_calls") or ()
    if content is None:
        content = message.get("refusal")
    if isinstance(content, list):
        content = _said(content) if message["role"] == "assistant" else _parts(content, place)
    if content is not None:
        plain["content"] = content
    if content is not None or not calls:
        yield plain
    for at, call in enumerate(calls):
        yield _call(call, custom, place.at(f".tool_calls[{at}]"))


def _call(call: Any, custom: set[str], place: _Place) -> dict[str, Any]:
    said = "input" if isinstance(call, dict) and call.get("type") == "custom" else "arguments"
    kind, inner = _nested(call, place, "name", said)
    if kind is None or not isinstance(call.get("id"), str):
        place.refuse(call, "must be a call of a function or a custom tool, with an id")
    if kind == "custom":
        custom.add(call["id"])
    named = "custom_tool_call" if kind == "custom" else "function_call"
    return {"type": named, "call_id": call["id"], "name": inner["name"], said: inner[said]}


def _tool_output(message: dict[str, Any], custom: set[str], place: _Place) -> dict[str, Any]:
    called, content = message.get("tool_call_id"), message.get("content")
    if not isinstance(called, str):
        place.refuse(message, "must have the tool_call_id of the call that it answers")
    kind = "custom_tool_call_output" if called in custom else "function_call_output"
    output = _parts(content, place) if isinstance(content, list) else content
    return {"type": kind, "call_id": called, "output": output}


def _said(content: list[Any]) -> Any:
    """Return the parts of an answer of the model as one text; those of the Responses API stay."""
    texts = [str(part[part["type"]]) for part in content if isinstance(part, dict) and _is_said(part)]
    return "".join(texts) if len(texts) == len(content) else content


def _is_said(part: dict[str, Any]) -> bool:
    return part.get("type") in {"text", "refusal"} and isinstance(part.get(part["type"]), str)


def _parts(content: list[Any], place: _Place) -> list[Any]:
    return [_part(part, place.at(f".content[{at}]")) for at, part in enumerate(content)]


def _part(part: Any, place: _Place) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {**part, "type": "input_text"}
    if kind == "input_audio":
        place.refuse(kind)
    if kind not in {"image_url", "file"}:
        return part
    given = part.get(kind)
    rest = {key: value for key, value in part.items() if key not in {"type", kind}}
    if kind == "image_url" and isinstance(given, str):
        given = {"url": given}
    if not isinstance(given, dict) or (kind == "image_url" and not isinstance(given.get("url"), str)):
        place.refuse(part, f"its {kind} must be an object{' with a url' if kind == 'image_url' else ''}")
    if kind == "file":
        return {"type": "input_file", **rest, **given}
    return {"type": "input_image", **rest, "image_url": given["url"], "detail": given.get("detail") or "auto"}
