"""What in the body of a request counts as input: texts, images, tools."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from openai_eval_client._wire import INPUT_KEYS

# Pixels assumed where the size cannot be seen: a web address, a file id, a broken data URL.
_DEFAULT_SIZE = (1024, 1024)
_MAX_SIDE = 2048  # pixels, as the next three
_MAX_SHORT_SIDE = 768
_TILE = 512
_PATCH = 32
_MAX_PATCHES = 1536
_HEADER_LENGTHS = (1 << 16, 1 << 20)  # of base64: a JPEG may have its size behind much camera metadata


class _Tiles(NamedTuple):
    """Tokens of an image in low detail, and of each tile that high detail adds."""

    base: int
    tile: int


_GPT_4O = _Tiles(85, 170)
# By the start of the model's name: tiles, or the tokens of a patch.
# https://platform.openai.com/docs/guides/images-vision#calculating-costs
_FAMILIES: dict[str, _Tiles | float] = {
    "gpt-4o": _GPT_4O,
    "gpt-4o-mini": _Tiles(2833, 5667),
    "gpt-4.1": _GPT_4O,
    "gpt-4.1-mini": 1.62,
    "gpt-4.1-nano": 2.46,
    "gpt-4.5": _GPT_4O,
    "gpt-5": _Tiles(70, 140),
    "gpt-5-mini": 1.62,
    "gpt-5-nano": 2.46,
    "o1": _Tiles(75, 150),
    "o3": _Tiles(75, 150),
    "o4-mini": 1.72,
    "computer-use-preview": _Tiles(65, 129),
}


def image_tokens(model: str, size: tuple[int, int], detail: object = None) -> int:
    """Count the tokens of one image of a request, of a size in pixels."""
    family = _family(model)
    if isinstance(family, float):
        return math.ceil(round(_patches(*size) * family, 6))
    return family.base + (0 if detail == "low" else _tiles(*size) * family.tile)


@lru_cache(maxsize=256)
def _family(model: str) -> _Tiles | float:
    """Return what the longest documented name that the model's name starts with stands for."""
    name = model.rpartition("/")[2].removeprefix("ft:")
    known = max((start for start in _FAMILIES if name.startswith(start)), key=len, default="gpt-4o")
    return _FAMILIES[known]


def _tiles(width: int, height: int) -> int:
    """Count the tiles that cover an image, shrunk to fit 2048 x 2048 with a short side of 768."""
    shrink = min(1.0, _MAX_SIDE / max(width, height), _MAX_SHORT_SIDE / min(width, height))
    across, down = (max(1, round(side * shrink)) for side in (width, height))
    return math.ceil(across / _TILE) * math.ceil(down / _TILE)


def _patches(width: int, height: int) -> int:
    """Count the patches that cover an image, shrunk until they are few enough."""
    across, down = width / _PATCH, height / _PATCH
    if (patches := math.ceil(across) * math.ceil(down)) <= _MAX_PATCHES:
        return patches
    shrink = min(1.0, math.sqrt(_MAX_PATCHES / (across * down)))
    across, down = across * shrink, down * shrink
    shrink = min(max(1, math.floor(side)) / side for side in (across, down))  # one side gets whole patches
    return min(_MAX_PATCHES, _covering(across * shrink) * _covering(down * shrink))


def _covering(patches: float) -> int:
    """Round up, ignoring what floating point adds to a whole number."""
    return math.ceil(patches - 1e-6)


def _size_of(source: object) -> tuple[int, int]:
    """Return an image's size, read from the header in its data URL."""
    if not isinstance(source, str) or not source.startswith("data:"):
        return _DEFAULT_SIZE
    start = source.find(",", 0, 256) + 1
    for length in _HEADER_LENGTHS:
        size = _header_size(source[start : start + length])
        if size:
            return size
        if len(source) <= start + length:
            break
    return _DEFAULT_SIZE


def _header_size(encoded: str) -> tuple[int, int] | None:
    """Return the size of a base64-encoded image from its beginning; None where it is not there."""
    import imagesize

    try:
        header = base64.b64decode(encoded[: len(encoded) // 4 * 4])
        width, height = imagesize.get(io.BytesIO(header))
    except Exception:  # noqa: BLE001  # whatever is wrong with the image, the default size does
        return None
    return (int(width), int(height)) if width > 0 and height > 0 else None


_UNCOUNTED_KEYS = frozenset(
    {"annotations", "call_id", "encrypted_content", "id", "logprobs", "status", "tool_call_id", "type"}
)

_AUDIO_TOKENS_PER_SECOND = 10
_WAV_BYTES_PER_SECOND = 48_000  # 24 kHz, 16 bits, mono
_OTHER_AUDIO_BYTES_PER_SECOND = 16_000  # mp3 at 128 kbit/s
_FILE_TOKENS = 2_000  # a few pages: what a file holds cannot be seen from here
_TEXT_BYTES_PER_TOKEN = 4
_OTHER_BYTES_PER_TOKEN = 40  # a PDF page of text takes about 40 KB and 1,000 tokens; its usage corrects it

# https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken, sections 6 and 7
_MESSAGE, _NAME, _REPLY = 3, 1, 3
_FUNCTION, _OLD_FUNCTION, _FUNCTIONS_END = 7, 10, 12
_PROPERTIES, _PROPERTY, _ENUM, _ENUM_ITEM = 3, 3, -3, 3
_CONTAINERS = (Mapping, list, tuple)
_FLAT_KEYS = frozenset({"type", "description", "enum"})


class Input:
    """The input of one request: texts to count, and tokens that no text shows."""

    __slots__ = ("_model", "_old", "fixed", "texts")

    def __init__(self, body: Mapping[str, Any], model: str, *, old: bool) -> None:
        self.fixed = 0  # tokens of structure, images, sound, files, and given as numbers
        self.texts: list[str] = []
        self._model = model
        self._old = old  # whether the model counts functions as those of gpt-4 and gpt-3.5 do
        for key in INPUT_KEYS:
            self._add_input(body.get(key))
        for key in ("tools", "functions"):
            if tools := body.get(key):
                self._add_tools(tools)
        self._add_schema(body.get("response_format"))
        self._add_schema(_mapping(body.get("text")).get("format"))

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
        """Add the texts in a value, whatever its shape; integers in a list are tokens already."""
        if isinstance(value, str):
            self.texts.append(value)
        elif isinstance(value, Mapping):
            self._add_part(value)
        elif isinstance(value, (list, tuple)):
            if value and isinstance(value[0], int):
                self.fixed += len(value)
                return
            for item in value:
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
        """Add a file by the size of its data; a file that is only named counts as a few pages."""
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
                if key not in _UNCOUNTED_KEYS and (key in ("content", "text") or not _is_data_url(value)):
                    self.texts.append(value)
            elif value and key not in _UNCOUNTED_KEYS:
                self._walk(value)

    def _add_image(self, part: Mapping[Any, Any]) -> None:
        url = image = part.get("image_url")
        if isinstance(image, Mapping):  # Chat Completions; in Responses the part itself has url and detail
            url, part = image.get("url"), image
        self.fixed += image_tokens(self._model, _size_of(url), part.get("detail"))

    def _add_audio(self, audio: Any) -> None:
        part = _mapping(audio)
        data, is_wav = part.get("data"), part.get("format") == "wav"
        size = len(data) * 3 / 4 if isinstance(data, str) else 0
        seconds = size / (_WAV_BYTES_PER_SECOND if is_wav else _OTHER_AUDIO_BYTES_PER_SECOND)
        self.fixed += max(1, math.ceil(seconds * _AUDIO_TOKENS_PER_SECOND))

    def _add_tools(self, tools: Any) -> None:
        functions = False
        for tool in tools if isinstance(tools, (list, tuple)) else ():
            function = _function_of(tool)
            if function is None:
                self._walk(tool)
            else:
                functions = True
                self._add_function(function)
        self.fixed += _FUNCTIONS_END if functions else 0

    def _add_function(self, function: Mapping[str, Any]) -> None:
        self.fixed += _OLD_FUNCTION if self._old else _FUNCTION
        self.texts.append(f"{function['name']}:{_description(function)}")
        parameters = _mapping(function.get("parameters"))
        if properties := _mapping(parameters.get("properties")):
            self.fixed += _PROPERTIES
            for name, schema in properties.items():
                self._add_property(name, _mapping(schema))
        if "$defs" in parameters:
            self.texts.append(_json(parameters["$defs"]))

    def _add_property(self, name: str, schema: Mapping[str, Any]) -> None:
        """Add one parameter; the cookbook knows only flat ones, so what is nested counts as JSON text."""
        self.fixed += _PROPERTY
        self.texts.append(f"{name}:{schema.get('type', '')}:{_description(schema)}")
        if isinstance(choices := schema.get("enum"), (list, tuple)):
            self.fixed += _ENUM + _ENUM_ITEM * len(choices)
            self.texts.extend(map(str, choices))
        others = ((key, value) for key, value in schema.items() if key not in _FLAT_KEYS)
        if nested := {key: value for key, value in others if value and isinstance(value, _CONTAINERS)}:
            self.texts.append(_json(nested))

    def _add_schema(self, response_format: Any) -> None:
        if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
            self.texts.append(_json(response_format.get("json_schema", response_format)))


def _function_of(tool: Any) -> Mapping[str, Any] | None:
    """Return the function in an entry of "tools", of either API, or of "functions"."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    is_named = isinstance(function, Mapping) and "name" in function
    return function if is_named and tool.get("type", "function") == "function" else None


def _description(schema: Mapping[str, Any]) -> str:
    return str(schema.get("description") or "").removesuffix(".")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_data_url(text: str) -> bool:
    return text.startswith("data:") and ";base64," in text[:256]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
