"""What a request's body carries: texts to encode, and tokens that no text shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from openai_eval_client._images import image_tokens

_INPUT_KEYS = ("messages", "input", "instructions", "prompt")
_SILENT_KEYS = frozenset(
    {"annotations", "call_id", "encrypted_content", "id", "logprobs", "status", "tool_call_id", "type"}
)

_AUDIO_TOKENS_PER_SECOND = 10
_AUDIO_BYTES_PER_SECOND = {"wav": 48_000}  # 24 kHz, 16 bits, mono
_OTHER_AUDIO_BYTES_PER_SECOND = 16_000  # mp3 at 128 kbit/s
_FILE_TOKENS = 2_000  # a few pages: what a file holds cannot be seen from here
_TEXT_BYTES_PER_TOKEN = 4
_OTHER_BYTES_PER_TOKEN = 40  # a PDF page of text takes about 40 KB and 1,000 tokens; its usage corrects it

# https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken, sections 6 and 7
_MESSAGE, _NAME, _REPLY = 3, 1, 3
_FUNCTION, _OLD_FUNCTION, _FUNCTIONS_END = 7, 10, 12
_PROPERTIES, _PROPERTY, _ENUM, _ENUM_ITEM = 3, 3, -3, 3
_FLAT_KEYS = frozenset({"type", "description", "enum"})


class Input:
    """The input of one request.

    Attributes:
        texts: What is to be encoded.
        fixed: Tokens besides those of the texts.
    """

    __slots__ = ("_model", "_old", "fixed", "texts")

    def __init__(self, model: str, *, old: bool) -> None:
        self.fixed = 0
        self.texts: list[str] = []
        self._model = model
        self._old = old

    @classmethod
    def of(cls, body: Mapping[str, Any], model: str, *, old: bool) -> Input:
        """Reads a request's body.

        Args:
            body: The JSON body of a request to any endpoint; what is malformed in it, the server may judge.
            model: The model's name, for its images.
            old: Whether the model is of the gpt-4 and gpt-3.5 generation, whose functions cost 3 tokens more.

        Returns:
            All that counts as input.
        """
        content = cls(model, old=old)
        for key in _INPUT_KEYS:
            content._add_input(body.get(key))
        for key in ("tools", "functions"):
            if tools := body.get(key):
                content._add_tools(tools)
        content._add_schema(body.get("response_format"))
        if isinstance(text := body.get("text"), Mapping):
            content._add_schema(text.get("format"))
        return content

    def _add_input(self, value: Any) -> None:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            for message in value:
                self._add_message(message)
            self.fixed += _REPLY
        elif value:
            self._walk(value)

    def _add_message(self, message: Any) -> None:
        self.fixed += _MESSAGE
        if isinstance(message, Mapping):
            self._add_part(message)
            self.fixed += _NAME if "name" in message and "role" in message else 0
        else:
            self._walk(message)

    def _walk(self, value: Any) -> None:
        """Adds the texts in a value, whatever its shape; integers in a list are tokens already."""
        if isinstance(value, str):
            self.texts.append(value)
        elif isinstance(value, Mapping):
            self._add_part(value)
        elif isinstance(value, (list, tuple)):
            self.fixed += len(value) if value and isinstance(value[0], int) else 0
            for item in value if value and not isinstance(value[0], int) else ():
                self._walk(item)

    def _add_part(self, part: Mapping[Any, Any]) -> None:
        kind = part.get("type")
        if "image_url" in part or kind == "input_image":
            self._add_image(part)
        elif kind == "input_audio":
            self._add_audio(part.get("input_audio"))
        elif kind in ("file", "input_file"):
            self._add_file(part)
        else:
            self._add_leaves(part)

    def _add_file(self, part: Mapping[Any, Any]) -> None:
        """Adds a file by the size of its data; a file that is only named counts as a few pages."""
        file = part.get("file")
        data = (file if isinstance(file, Mapping) else part).get("file_data")
        if not isinstance(data, str):
            self.fixed += _FILE_TOKENS
            return
        head, _, encoded = data.rpartition(",")
        ratio = _TEXT_BYTES_PER_TOKEN if head.startswith("data:text/") else _OTHER_BYTES_PER_TOKEN
        self.fixed += max(1, math.ceil(len(encoded) * 3 / 4 / ratio))

    def _add_leaves(self, part: Mapping[Any, Any]) -> None:
        for key, value in part.items():
            if isinstance(value, str):
                if key not in _SILENT_KEYS and (key in ("content", "text") or not _is_data_url(value)):
                    self.texts.append(value)
            elif value and key not in _SILENT_KEYS:
                self._walk(value)

    def _add_image(self, part: Mapping[Any, Any]) -> None:
        image = part.get("image_url")
        if isinstance(image, Mapping):  # Chat Completions; in Responses the part itself has url and detail
            self.fixed += image_tokens(self._model, image.get("url"), image.get("detail"))
        else:
            self.fixed += image_tokens(self._model, image, part.get("detail"))

    def _add_audio(self, audio: Any) -> None:
        data, kind = (audio.get("data"), audio.get("format")) if isinstance(audio, Mapping) else (None, None)
        size = len(data) * 3 / 4 if isinstance(data, str) else 0
        seconds = size / _AUDIO_BYTES_PER_SECOND.get(str(kind), _OTHER_AUDIO_BYTES_PER_SECOND)
        self.fixed += max(1, math.ceil(seconds * _AUDIO_TOKENS_PER_SECOND))

    def _add_tools(self, tools: Any) -> None:
        functions = [_function_of(tool) for tool in tools] if isinstance(tools, (list, tuple)) else []
        for tool, function in zip(tools, functions, strict=False):
            if function is None:
                self._walk(tool)
            else:
                self._add_function(function)
        self.fixed += _FUNCTIONS_END if any(functions) else 0

    def _add_function(self, function: Mapping[str, Any]) -> None:
        self.fixed += _OLD_FUNCTION if self._old else _FUNCTION
        self.texts.append(f"{function['name']}:{_description(function)}")
        parameters = function.get("parameters")
        if not isinstance(parameters, Mapping):
            return
        properties = parameters.get("properties")
        if isinstance(properties, Mapping) and properties:
            self.fixed += _PROPERTIES
            for name, schema in properties.items():
                self._add_property(name, schema if isinstance(schema, Mapping) else {})
        if "$defs" in parameters:
            self.texts.append(_json(parameters["$defs"]))

    def _add_property(self, name: str, schema: Mapping[str, Any]) -> None:
        """Adds one parameter; the cookbook knows only flat ones, so what is nested counts as JSON text."""
        self.fixed += _PROPERTY
        self.texts.append(f"{name}:{schema.get('type', '')}:{_description(schema)}")
        if isinstance(choices := schema.get("enum"), (list, tuple)):
            self.fixed += _ENUM + _ENUM_ITEM * len(choices)
            self.texts.extend(map(str, choices))
        nested = {key: value for key, value in schema.items() if key not in _FLAT_KEYS and _is_nested(value)}
        if nested:
            self.texts.append(_json(nested))

    def _add_schema(self, response_format: Any) -> None:
        if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
            self.texts.append(_json(response_format.get("json_schema", response_format)))


def _function_of(tool: Any) -> Mapping[str, Any] | None:
    """Finds the function in an entry of "tools", of either API, or of "functions"."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    named = isinstance(function, Mapping) and "name" in function
    return function if named and tool.get("type", "function") == "function" else None


def _description(schema: Mapping[str, Any]) -> str:
    return str(schema.get("description") or "").removesuffix(".")


def _is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and bool(value)


def _is_data_url(text: str) -> bool:
    return text.startswith("data:") and ";base64," in text[:256]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
