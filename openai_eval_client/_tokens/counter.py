"""Count the tokens of a request: with tiktoken, else by an estimate that observed usage corrects."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from openai_eval_client._log import inform, warn
from openai_eval_client._runtime import DeferringLock
from openai_eval_client._wire import INPUT_KEYS, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openai_eval_client.models import ModelResponse

_K = TypeVar("_K")
_V = TypeVar("_V")

# --- images ---------------------------------------------------------------------------------------------

_DEFAULT_SIZE = (1024, 1024)  # pixels, where it cannot be seen: a web address, a file id, a broken data URL
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
    if detail == "low":
        return family.base
    # Tiles cover the image, shrunk to fit 2048 x 2048 with a short side of 768.
    shrink = min(1.0, _MAX_SIDE / max(size), _MAX_SHORT_SIDE / min(size))
    across, down = (math.ceil(max(1, round(side * shrink)) / _TILE) for side in size)
    return family.base + family.tile * across * down


@lru_cache(maxsize=256)
def _family(model: str) -> _Tiles | float:
    """Return what the longest documented name that the model's name starts with stands for."""
    name = model.rpartition("/")[2].removeprefix("ft:")
    known = max((start for start in _FAMILIES if name.startswith(start)), key=len, default="gpt-4o")
    return _FAMILIES[known]


def _patches(width: int, height: int) -> int:
    """Count the patches that cover an image, shrunk until they are few enough."""
    across, down = width / _PATCH, height / _PATCH
    if (patches := math.ceil(across) * math.ceil(down)) <= _MAX_PATCHES:
        return patches
    shrink = min(1.0, math.sqrt(_MAX_PATCHES / (across * down)))
    across, down = across * shrink, down * shrink
    shrink = min(max(1, math.floor(side)) / side for side in (across, down))  # one side gets whole patches
    # Rounded up, but for what floating point adds to a whole number.
    across, down = (math.ceil(side * shrink - 1e-6) for side in (across, down))
    return min(_MAX_PATCHES, across * down)


def _size_of(source: object) -> tuple[int, int]:
    """Return an image's size in pixels, read from the header in its data URL."""
    if not isinstance(source, str) or not source.startswith("data:"):
        return _DEFAULT_SIZE
    import imagesize

    start = source.find(",", 0, 256) + 1
    encoded = source[start : start + _HEADER_LENGTHS[-1]]
    for length in _HEADER_LENGTHS:
        with contextlib.suppress(Exception):  # whatever is wrong with the image, the default size does
            header = base64.b64decode(encoded[: min(length, len(encoded) // 4 * 4)])
            width, height = imagesize.get(io.BytesIO(header))
            if width > 0 and height > 0:
                return int(width), int(height)
        if len(encoded) <= length:
            break
    return _DEFAULT_SIZE


# --- what in a body counts as input ---------------------------------------------------------------------

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
                self.fixed += _MESSAGE
                self._walk(message)
                if isinstance(message, Mapping) and "name" in message and "role" in message:
                    self.fixed += _NAME
            self.fixed += _REPLY
        elif value:
            self._walk(value)

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
            url = image = part.get("image_url")
            if isinstance(
                image, Mapping
            ):  # Chat Completions; in Responses the part itself has url and detail
                url, part = image.get("url"), image
            self.fixed += image_tokens(self._model, _size_of(url), part.get("detail"))
        elif kind == "input_audio":
            audio = _mapping(part.get("input_audio"))
            data, is_wav = audio.get("data"), audio.get("format") == "wav"
            size = len(data) * 3 / 4 if isinstance(data, str) else 0
            seconds = size / (_WAV_BYTES_PER_SECOND if is_wav else _OTHER_AUDIO_BYTES_PER_SECOND)
            self.fixed += max(1, math.ceil(seconds * _AUDIO_TOKENS_PER_SECOND))
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
                is_data = value.startswith("data:") and ";base64," in value[:256]
                if key not in _UNCOUNTED_KEYS and (key in ("content", "text") or not is_data):
                    self.texts.append(value)
            elif value and key not in _UNCOUNTED_KEYS:
                self._walk(value)

    def _add_tools(self, tools: Any) -> None:
        has_functions = False
        for tool in tools if isinstance(tools, (list, tuple)) else ():
            # Chat Completions has the function in the tool; in Responses and "functions" the tool is it.
            function = _mapping(tool.get("function", tool) if isinstance(tool, Mapping) else None)
            if "name" in function and tool.get("type", "function") == "function":
                has_functions = True
                self._add_function(function)
            else:
                self._walk(tool)
        self.fixed += _FUNCTIONS_END if has_functions else 0

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


def _description(schema: Mapping[str, Any]) -> str:
    return str(schema.get("description") or "").removesuffix(".")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


# --- the counter ----------------------------------------------------------------------------------------

_MODELS = 1024  # remembered at most
_COUNTS = 4096  # remembered at most until their answers come
_WEIGHT = 0.2  # of one answer in the ratio
_LOWEST, _HIGHEST = 0.25, 4.0  # ratio


def put(bounded: dict[_K, _V], key: _K, value: _V, size: int) -> None:
    """Store a value, and forget the oldest one where there would be more than `size`."""
    if key not in bounded and len(bounded) >= size:
        del bounded[next(iter(bounded))]
    bounded[key] = value


_FALLBACK = "o200k_base"
_ON_LOOP = 20_000  # characters: 0.6 ms of English, 3 ms of Chinese; a hop to a thread costs 0.1-0.3 ms
_SLICE = 10_000  # characters: longer words overflow tiktoken's stack, or before 0.13 take quadratic time
_COUNTED = 1_000_000  # characters of one text, up to a second's work; a longer one is counted in samples
_REMEMBERED = range(128, _ON_LOOP)  # characters: finding it saves 14 us at 400, else it costs 0.8 us
_ROLE = len("assistant")  # characters: nearly all texts so short are roles, the same ones repeated
# OpenAI's rule of thumb for English, https://help.openai.com/en/articles/4936856; bytes, not characters,
# because scripts that need more of them also need more tokens.
_BYTES_PER_TOKEN = 4
_SCHEMAS = ("tools", "functions", "response_format", "text", "suffix", "documents", "chat_template")
_MARGIN = 128  # tokens that a provider may put round the messages; the most known are gpt-oss's 70


class TokenCounter:
    """Counts the input tokens of requests, with tiktoken's vocabularies where they can be had.

    Without one, texts are estimated at 4 bytes of UTF-8 a token, and what the server reports corrects that.
    Threads and event loops may share a counter.
    """

    def __init__(self, *, load_timeout: float = 5.0) -> None:
        self._load_timeout = load_timeout  # seconds that the first counts with a vocabulary wait for it
        self._lock = DeferringLock()
        # By model, and whether it is counted with a vocabulary: the ratio of real to counted text tokens.
        self._ratios: dict[tuple[str, bool], float] = {}
        # By model and corrected count: the ratio's key, fixed tokens, text tokens.
        self._counts: dict[tuple[str, int], tuple[tuple[str, bool], int, int]] = {}

    async def count_input(self, body: Mapping[str, Any]) -> int:
        """Count the input of a request to any endpoint, without holding up the event loop."""
        # Messages cost 3 tokens each, their names 1, the priming of the reply 3, and functions what OpenAI's
        # cookbook says; images, sound and files: see `Input`.
        counted = self.count_input_now(body)
        if counted is not None:
            return counted
        fit = await self._fit(_model_of(body))
        content = fit.read(body)
        if _is_long(content):
            return await asyncio.to_thread(self._total, content, fit)
        return self._total(content, fit)

    def count_input_now(self, body: Mapping[str, Any]) -> int | None:
        """Count like `count_input`; None where that cannot be done at once."""
        fit = _VOCABULARIES.fits.get(_model_of(body))
        if fit is None or not fit.vocabulary.settled:
            return None
        content = fit.read(body)
        return None if fit.vocabulary.is_loaded and _is_long(content) else self._total(content, fit)

    async def most_input(self, body: Mapping[str, Any]) -> int:
        """Return what the input of a request cannot exceed, without holding up the event loop."""
        # Texts count exactly where the model's own vocabulary is at hand and they are not too long for it,
        # else as a token a byte, which no byte-level vocabulary exceeds; tools and schemas as a token a byte
        # of their JSON. What no text shows, images, files and sound among it, counts twice, and a margin
        # comes on top.
        fit = await self._fit(_model_of(body))
        if _is_long(fit.read(_without_schemas(body))):
            return await asyncio.to_thread(self.most_input_now, body)
        return self.most_input_now(body)

    def most_input_now(self, body: Mapping[str, Any]) -> int:
        """Count like `most_input`, for as long as that takes: for a thread."""
        fit = _VOCABULARIES.find(_model_of(body))
        content = fit.read(_without_schemas(body))
        count, is_exact = fit.vocabulary.count, fit.own and fit.vocabulary.is_loaded
        tokens = sum(
            count(text) if is_exact and len(text) <= _COUNTED else _size(text) for text in content.texts
        )
        schemas = sum(_size(json.dumps(body[key], default=str)) for key in _SCHEMAS if body.get(key))
        return tokens + schemas + 2 * content.fixed + _MARGIN

    async def count_text(self, text: str, model: str) -> int:
        """Count one text, without holding up the event loop."""
        return await self.count_input({"model": model, "prompt": text})

    async def estimate_usage(self, response: ModelResponse, input_tokens: int, tier: object = None) -> Usage:
        """Fill in the usage that the server left out, and return it."""
        # What could be read of it, and is in the response already, counts at least: the input in place of
        # ours, the output where it is more than the text comes to, which holds no reasoning.
        usage, texts = response.usage, "\n".join(response.choices)
        counted = await self.count_text(texts, response.model) if texts else 0
        usage.prompt_tokens = usage.prompt_tokens or input_tokens
        usage.completion_tokens = max(usage.completion_tokens, counted)
        usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
        return Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            model=response.model,
            service_tier=tier if isinstance(tier, str) else None,
            estimated=True,
        )

    def observe(self, model: str, counted: int, actual: int) -> None:
        """Learn from what a server reported, for models without a vocabulary of their own."""
        with self._lock:
            key, fixed, tokens = self._counts.get((model, counted), (None, 0, 0))
            if key is None or not tokens or actual <= 0:
                return
            observed = min(_HIGHEST, max(_LOWEST, (actual - fixed) / tokens))
            ratio = self._ratios.get(key, 1.0)
            put(self._ratios, key, ratio + _WEIGHT * (observed - ratio), _MODELS)

    async def _fit(self, model: str) -> _Fit:
        fit = _VOCABULARIES.fits.get(model)
        if fit is None:
            fit = await asyncio.to_thread(_VOCABULARIES.find, model)
        await fit.vocabulary.wait(self._load_timeout)
        return fit

    def _total(self, content: Input, fit: _Fit) -> int:
        is_loaded = fit.vocabulary.is_loaded
        tokens = sum(map(fit.vocabulary.count, content.texts))
        if is_loaded and fit.own:
            return content.fixed + tokens
        key = fit.model, is_loaded
        with self._lock:
            counted = content.fixed + round(tokens * self._ratios.get(key, 1.0))
            # Its parts are remembered: when the answer comes, the ratio is another one.
            put(self._counts, (fit.model, counted), (key, content.fixed, tokens), _COUNTS)
        return counted


class _Vocabulary:
    """One of tiktoken's encodings, loaded in a daemon thread: its download knows no timeout, and may hang."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_loaded = False
        self._encode: Callable[[str], list[int]]  # once it is loaded
        self._remembered = lru_cache(maxsize=256)(self._encoded)  # not more, because it keeps the texts
        self._tried: Future[None] = Future()
        self._tried.set_running_or_notify_cancel()  # from here on, no cancelled wait can cancel it
        self._deadline: float | None = None  # of all that wait for it
        self._warned = False
        threading.Thread(target=self._load, name=f"tiktoken-{name}", daemon=True).start()

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for: it is loaded, or failed, or was waited for long enough."""
        return self._tried.done() or (self._deadline is not None and time.monotonic() >= self._deadline)

    async def wait(self, timeout: float) -> None:
        """Wait until it is loaded, but at most this many seconds after the first wait began."""
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout
        if self.settled:
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._tried), self._deadline - time.monotonic())
        except asyncio.TimeoutError:
            self._warn("it takes too long")

    def count(self, text: str) -> int:
        """Count the tokens of a text, by an estimate until it is loaded."""
        if not self.is_loaded:
            return -(-_size(text) // _BYTES_PER_TOKEN)  # rounded up
        if len(text) <= _ROLE or len(text) in _REMEMBERED:
            return self._remembered(text)
        return self._encoded(text)

    def _encoded(self, text: str) -> int:
        if len(text) <= _SLICE:
            return len(self._encode(text))
        tokens = sum(map(len, map(self._encode, _slices(_sample(text)))))
        return tokens if len(text) <= _COUNTED else math.ceil(tokens * len(text) / _COUNTED)

    def _load(self) -> None:
        try:
            import tiktoken

            self._encode = tiktoken.get_encoding(self.name).encode_ordinary
            self.is_loaded = True
        except Exception as error:  # noqa: BLE001  # no network, no disk, a bad file: estimates do
            self._warn(type(error).__name__)
        finally:
            self._tried.set_result(None)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            text = "no token vocabulary %s (%s): token counts are estimates"
            warn(text, self.name, reason, event="no_vocabulary", error_type=reason)


class _Fit(NamedTuple):
    """The vocabulary that counts for a model."""

    model: str
    vocabulary: _Vocabulary
    own: bool  # whether tiktoken names it for this model

    def read(self, body: Mapping[str, Any]) -> Input:
        """Read a body; the models of one vocabulary count functions alike."""
        return Input(body, self.model, old=self.vocabulary.name == "cl100k_base")


class _Vocabularies:
    """The vocabularies of this process."""

    def __init__(self) -> None:
        self.fits: dict[str, _Fit] = {}  # of the models that one was looked for; read without the lock
        self._lock = DeferringLock()
        self._loaded: dict[str, _Vocabulary] = {}

    def find(self, model: str) -> _Fit:
        """Find a model's vocabulary, and start to load it. Imports tiktoken: not for an event loop."""
        with self._lock:
            if model not in self.fits:
                name = _encoding_name(model)
                if name is None:
                    text = "tiktoken does not know model %r: counting with %s"
                    inform(text, model, _FALLBACK, event="unknown_model", model=model)
                vocabulary = self._loaded.get(name or _FALLBACK) or _Vocabulary(name or _FALLBACK)
                self._loaded[vocabulary.name] = vocabulary
                put(self.fits, model, _Fit(model, vocabulary, own=name is not None), _MODELS)
            return self.fits[model]


_VOCABULARIES = _Vocabularies()


def _encoding_name(model: str) -> str | None:
    """Return tiktoken's encoding for a model, also for its name without the provider's; None for unknown."""
    import tiktoken

    for name in (model, model.rpartition("/")[2]):
        with contextlib.suppress(KeyError):
            return tiktoken.encoding_name_for_model(name)
    return None


def _is_long(content: Input) -> bool:
    return sum(map(len, content.texts)) > _ON_LOOP


def _model_of(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    return model if isinstance(model, str) else ""


def _without_schemas(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in body.items() if key not in _SCHEMAS}


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _sample(text: str) -> str:
    """Return a text, or where it is too long to be counted slices of it, from its start to its end."""
    if len(text) <= _COUNTED:
        return text
    count = _COUNTED // _SLICE
    starts = (number * (len(text) - _SLICE) // (count - 1) for number in range(count))
    return "".join(text[start : start + _SLICE] for start in starts)


def _slices(text: str) -> Iterator[str]:
    """Cut a long text, before a space where there is one: between words, that changes no token."""
    # Elsewhere a cut was seen to add at most 4 tokens: 0.6% of endless repetitions of "-=".
    start = 0
    while len(text) - start > _SLICE:
        cut = text.rfind(" ", start + _SLICE // 2, start + _SLICE)
        cut = cut if cut > 0 else start + _SLICE
        yield text[start:cut]
        start = cut
    yield text[start:]
