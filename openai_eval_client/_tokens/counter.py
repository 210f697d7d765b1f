"""Count tokens: with tiktoken, else by an estimate that observed usage corrects."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from concurrent.futures import Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from openai_eval_client._log import inform, warn
from openai_eval_client._tokens.body import Input
from openai_eval_client._wire import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from openai_eval_client.models import ModelResponse


_K = TypeVar("_K")
_V = TypeVar("_V")

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
_REMEMBERED = range(128, _ON_LOOP)  # characters: finding it saves 14 us at 400, else it costs 0.8 us
_ROLE = len("assistant")  # characters: nearly all texts so short are roles, the same ones repeated
_BYTES_PER_TOKEN = 4
_SCHEMAS = ("tools", "functions", "response_format", "text", "suffix", "documents", "chat_template")
_MARGIN = 128  # tokens that a provider may put round the messages; the most known are gpt-oss's 70


class TokenCounter:
    """Counts the input tokens of requests, with tiktoken's vocabularies where they can be had.

    A vocabulary is loaded in a thread of its own, once in a process. Until it is there, and for ever where it
    cannot be had, texts are estimated at 4 bytes of UTF-8 a token, OpenAI's rule of thumb for English
    (https://help.openai.com/en/articles/4936856); bytes, because scripts that need more of them also need
    more tokens. What the server then reports corrects the estimate. Threads and event loops may share one.
    """

    def __init__(self, *, load_timeout: float = 5.0) -> None:
        self._load_timeout = load_timeout  # seconds that the first counts with a vocabulary wait for it
        self._lock = threading.Lock()
        # By model, and whether it is counted with a vocabulary: the ratio of real to counted text tokens.
        self._ratios: dict[tuple[str, bool], float] = {}
        # By model and corrected count: the ratio's key, fixed tokens, text tokens.
        self._counts: dict[tuple[str, int], tuple[tuple[str, bool], int, int]] = {}

    async def count_input(self, body: Mapping[str, Any]) -> int:
        """Count the input of a request to any endpoint, without holding up the event loop."""
        # Messages cost 3 tokens each, their names 1, the priming of the reply 3, and functions what OpenAI's
        # cookbook says; images, sound and files: see body.py.
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
        # Texts count exactly where the model's own vocabulary is at hand, else as a token a byte, which no
        # byte-level vocabulary exceeds; tools and schemas as a token a byte of their JSON. What no text
        # shows, images, files and sound among it, counts twice, and a margin comes on top.
        fit = await self._fit(_model_of(body))
        if _is_long(fit.read(_without_schemas(body))):
            return await asyncio.to_thread(self.most_input_now, body)
        return self.most_input_now(body)

    def most_input_now(self, body: Mapping[str, Any]) -> int:
        """Count like `most_input`, for as long as that takes: for a thread."""
        fit = _VOCABULARIES.find(_model_of(body))
        content = fit.read(_without_schemas(body))
        is_exact = fit.own and fit.vocabulary.is_loaded
        tokens = sum(map(fit.vocabulary.count if is_exact else _size, content.texts))
        schemas = sum(_size(json.dumps(body[key], default=str)) for key in _SCHEMAS if body.get(key))
        return tokens + schemas + 2 * content.fixed + _MARGIN

    async def count_text(self, text: str, model: str) -> int:
        """Count one text, without holding up the event loop."""
        return await self.count_input({"model": model, "prompt": text})

    async def estimate_usage(
        self, response: ModelResponse, input_tokens: int, *, service_tier: object = None
    ) -> Usage:
        """Fill in the usage that the server left out, and return it."""
        usage, texts = response.usage, "\n".join(response.choices)
        usage.prompt_tokens = input_tokens
        usage.completion_tokens = await self.count_text(texts, response.model) if texts else 0
        usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
        return Usage(
            usage.prompt_tokens,
            usage.completion_tokens,
            model=response.model,
            service_tier=service_tier if isinstance(service_tier, str) else None,
            estimated=True,
        )

    def observe(self, model: str, counted: int, actual: int) -> None:
        """Learn from what a server reported, for models without a vocabulary of their own."""
        with self._lock:
            key, fixed, tokens = self._counts.get((model, counted), (None, 0, 0))
            if key is None or not tokens:
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
            return _estimate(text)
        if len(text) <= _ROLE or len(text) in _REMEMBERED:
            return self._remembered(text)
        return self._encoded(text)

    def _encoded(self, text: str) -> int:
        if len(text) <= _SLICE:
            return len(self._encode(text))
        return sum(map(len, map(self._encode, _slices(text))))

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
        self._lock = threading.Lock()
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


def _estimate(text: str) -> int:
    """Count 4 bytes of UTF-8 as a token, rounded up."""
    return -(-_size(text) // _BYTES_PER_TOKEN)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


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
