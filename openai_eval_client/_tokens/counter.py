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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


_K = TypeVar("_K")
_V = TypeVar("_V")

_MODELS = 1024


class Corrections:
    """The ratio of real to counted text tokens per model, from the answers to what was counted."""

    _WEIGHT = 0.2
    _LOWEST, _HIGHEST = 0.25, 4.0
    _UNANSWERED = 4096

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ratios: dict[tuple[str, bool], float] = {}
        self._given: dict[tuple[str, int], tuple[tuple[str, bool], int, int]] = {}

    def apply(self, key: tuple[str, bool], fixed: int, tokens: int) -> int:
        """Corrects a count, and remembers what it was made of: by the time of its answer the ratio moved."""
        with self._lock:
            counted = fixed + round(tokens * self._ratios.get(key, 1.0))
            put(self._given, (key[0], counted), (key, fixed, tokens), self._UNANSWERED)
        return counted

    def observe(self, model: str, counted: int, actual: int) -> None:
        """Moves the ratio towards what this answer shows."""
        with self._lock:
            key, fixed, tokens = self._given.get((model, counted), (None, 0, 0))
            if key is None or not tokens:
                return
            seen = min(self._HIGHEST, max(self._LOWEST, (actual - fixed) / tokens))
            ratio = self._ratios.get(key, 1.0)
            put(self._ratios, key, ratio + self._WEIGHT * (seen - ratio), _MODELS)


def put(bounded: dict[_K, _V], key: _K, value: _V, most: int) -> None:
    """Stores a value, and forgets the oldest one when there are too many."""
    if key not in bounded and len(bounded) >= most:
        del bounded[next(iter(bounded))]
    bounded[key] = value


_FALLBACK = "o200k_base"
_ON_LOOP = 20_000  # characters: 0.6 ms of English, 3 ms of Chinese; a hop to a thread costs 0.1-0.3 ms
_SLICE = 10_000  # characters: longer words overflow tiktoken's stack, or before 0.13 take quadratic time
_REMEMBERED = range(128, _ON_LOOP)  # characters: a hit saves 14 us at 400, a miss costs 0.8 us
_ROLE = len("assistant")  # characters: nearly all texts so short are roles, the same ones again and again
_BYTES_PER_TOKEN = 4
_SCHEMAS = ("tools", "functions", "response_format", "text", "suffix", "documents", "chat_template")
_MARGIN = 128  # tokens: what providers put round the messages; gpt-oss has the most known, 70


class TokenCounter:
    """Counts what a request will cost in tokens, with tiktoken's vocabularies where they can be had.

    A vocabulary is loaded in a thread of its own, once in a process. Until it is there, and for ever where it
    cannot be had, texts are estimated at 4 bytes of UTF-8 a token, OpenAI's rule of thumb for English
    (https://help.openai.com/en/articles/4936856); bytes, because scripts that need more of them also need
    more tokens. What the server then reports corrects the estimate. Safe to share by threads and event loops.
    """

    def __init__(self, *, load_timeout: float = 5.0) -> None:
        self._load_timeout = load_timeout
        self._corrections = Corrections()

    async def count_input(self, body: Mapping[str, Any]) -> int:
        """Counts the input of a request to any endpoint, without holding up the event loop."""
        # Messages cost 3 tokens each, their names 1, the priming of the reply 3, and functions what OpenAI's
        # cookbook says: https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken. Images: see
        # image_tokens. Audio: 10 tokens a second, whose length is judged from the bytes (48,000 a second as
        # wav, else 16,000). Files: 2,000 tokens, for want of anything better. The first call for a vocabulary
        # waits for it, at most load_timeout seconds.
        counted = self.count_input_now(body)
        if counted is not None:
            return counted
        model = _model_of(body)
        fit = await self._fit(model)
        return await self._count(fit.read(body, model), model, fit)

    def count_input_now(self, body: Mapping[str, Any], *, longest: float = _ON_LOOP) -> int | None:
        """Counts like count_input, where that is possible at once."""
        model = _model_of(body)
        fit = _VOCABULARIES.known(model)
        if fit is None or not fit.vocabulary.settled:
            return None
        content = fit.read(body, model)
        if fit.vocabulary.encode and sum(map(len, content.texts)) > longest:
            return None
        return self._total(content, model, fit)

    async def most_input(self, body: Mapping[str, Any]) -> int:
        """Counts the tokens that a request's input cannot exceed, without holding up the event loop."""
        # Texts count exactly where the model's own vocabulary is at hand, else as a token a byte, which no
        # byte-level vocabulary exceeds; tools and schemas as a token a byte of their JSON. What no text
        # shows, images, files and sound among it, counts twice, and 128 tokens come on top.
        model = _model_of(body)
        content, fit = _without_schemas(body), await self._fit(model)
        if sum(map(len, fit.read(content, model).texts)) > _ON_LOOP:
            return await asyncio.to_thread(self.most_input_now, body)
        return self.most_input_now(body)

    def most_input_now(self, body: Mapping[str, Any]) -> int:
        """Counts like most_input, for as long as that takes: for a thread."""
        model = _model_of(body)
        fit = _VOCABULARIES.find(model)
        content = fit.read(_without_schemas(body), model)
        exact = fit.own and fit.vocabulary.encode is not None
        tokens = sum(map(fit.vocabulary.count if exact else _size, content.texts))
        schemas = sum(_size(json.dumps(body[key], default=str)) for key in _SCHEMAS if body.get(key))
        return tokens + schemas + 2 * content.fixed + _MARGIN

    async def count_text(self, text: str, model: str) -> int:
        """Counts one text, without holding up the event loop."""
        content = Input(model, old=False)
        content.texts.append(text)
        return await self._count(content, model, await self._fit(model))

    def observe(self, model: str, counted: int, actual: int) -> None:
        """Learns from what a server reported, for models without a vocabulary of their own."""
        self._corrections.observe(model, counted, actual)

    async def _fit(self, model: str) -> _Fit:
        fit = _VOCABULARIES.known(model)
        if fit is None:
            fit = await asyncio.to_thread(_VOCABULARIES.find, model)
        await fit.vocabulary.wait(self._load_timeout)
        return fit

    async def _count(self, content: Input, model: str, fit: _Fit) -> int:
        if sum(map(len, content.texts)) > _ON_LOOP:
            return await asyncio.to_thread(self._total, content, model, fit)
        return self._total(content, model, fit)

    def _total(self, content: Input, model: str, fit: _Fit) -> int:
        exact = fit.vocabulary.encode is not None
        tokens = sum(map(fit.vocabulary.count if exact else _estimate, content.texts))
        if exact and fit.own:
            return content.fixed + tokens
        return self._corrections.apply((model, exact), content.fixed, tokens)


class _Vocabulary:
    """One of tiktoken's encodings, loaded in a daemon thread: its download knows no timeout, and may hang."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.encode: Callable[[str], list[int]] | None = None
        self._loaded: Future[None] = Future()
        self._loaded.set_running_or_notify_cancel()  # from here on, no waiter's cancellation can cancel it
        self._deadline: float | None = None
        self._complained = False
        self._remember = lru_cache(maxsize=256)(self._encoded)  # not more, because it keeps the texts
        threading.Thread(target=self._load, name=f"tiktoken-{name}", daemon=True).start()

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for: it is loaded, or failed, or was waited for long enough."""
        return self._loaded.done() or (self._deadline is not None and time.monotonic() >= self._deadline)

    async def wait(self, timeout: float) -> None:
        """Waits until it is loaded, but at most this many seconds after the first waiter came."""
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout
        if self.settled:
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._loaded), self._deadline - time.monotonic())
        except asyncio.TimeoutError:
            self._complain("it takes too long")

    def count(self, text: str) -> int:
        """Counts a text's tokens."""
        if len(text) <= _ROLE or len(text) in _REMEMBERED:
            return self._remember(text)
        return self._encoded(text)

    def _encoded(self, text: str) -> int:
        if self.encode is None:
            return _estimate(text)
        return (
            len(self.encode(text)) if len(text) <= _SLICE else sum(map(len, map(self.encode, _slices(text))))
        )

    def _load(self) -> None:
        try:
            import tiktoken

            self.encode = tiktoken.get_encoding(self.name).encode_ordinary
        except Exception as error:  # noqa: BLE001  # no network, no disk, a bad file: estimates do
            self._complain(type(error).__name__)
        finally:
            self._loaded.set_result(None)

    def _complain(self, reason: str) -> None:
        if not self._complained:
            self._complained = True
            text = "no token vocabulary %s (%s): token counts are estimates"
            warn(text, self.name, reason, event="no_vocabulary", error_type=reason)


class _Fit(NamedTuple):
    """The vocabulary that counts for a model, and whether it is the model's own."""

    vocabulary: _Vocabulary
    own: bool

    def read(self, body: Mapping[str, Any], model: str) -> Input:
        """Reads a body; the models of one vocabulary count functions alike."""
        return Input.of(body, model, old=self.vocabulary.name == "cl100k_base")


class _Vocabularies:
    """The vocabularies of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, _Vocabulary] = {}
        self._fits: dict[str, _Fit] = {}

    def known(self, model: str) -> _Fit | None:
        """Tells which vocabulary was found for a model, if it was looked for."""
        return self._fits.get(model)

    def find(self, model: str) -> _Fit:
        """Finds a model's vocabulary, and starts to load it. Imports tiktoken: not for an event loop."""
        with self._lock:
            if model not in self._fits:
                name = _encoding_name(model)
                if name is None:
                    text = "tiktoken does not know model %r: counting with %s"
                    inform(text, model, _FALLBACK, event="unknown_model", model=model)
                vocabulary = self._loaded.get(name or _FALLBACK) or _Vocabulary(name or _FALLBACK)
                self._loaded[vocabulary.name] = vocabulary
                put(self._fits, model, _Fit(vocabulary, own=name is not None), _MODELS)
            return self._fits[model]


_VOCABULARIES = _Vocabularies()


def _encoding_name(model: str) -> str | None:
    """Asks tiktoken for a model's encoding, also by the model's name without its provider."""
    import tiktoken

    for name in (model, model.rpartition("/")[2]):
        with contextlib.suppress(KeyError):
            return tiktoken.encoding_name_for_model(name)
    return None


def _model_of(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    return model if isinstance(model, str) else ""


def _without_schemas(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in body.items() if key not in _SCHEMAS}


def _estimate(text: str) -> int:
    """Counts 4 bytes of UTF-8 as a token, rounded up."""
    return -(-_size(text) // _BYTES_PER_TOKEN)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _slices(text: str) -> Iterator[str]:
    """Cuts a long text, before a space where it can: between words, that changes no token."""
    # Elsewhere a cut was seen to add 4 tokens at most, to endless repetitions of "-=" that is 0.6%.
    start = 0
    while len(text) - start > _SLICE:
        cut = text.rfind(" ", start + _SLICE // 2, start + _SLICE)
        cut = cut if cut > 0 else start + _SLICE
        yield text[start:cut]
        start = cut
    yield text[start:]
