"""What the simulated model reads and says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._errors import missing_parameter, server_error, wrong_type
from .schemas import minimal

if TYPE_CHECKING:
    from .._options import Options

Json = dict[str, Any]
Count = Callable[[str], int]
PER_MESSAGE = 3
PER_REPLY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function the model must call."""

    name: str
    parameters: Json
    named: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A generation request, understood.

    Attributes:
        model: The model asked for.
        body: The request.
        prompts: The texts to answer, one each; several only for completions and embeddings.
        prompt_tokens: Tokens of everything sent.
        cap: Most output tokens of one answer; None where the request sets no maximum.
        n: Answers to each prompt.
        stream: Whether the answer is to be streamed.
        schema: JSON schema the answer must follow.
        tool: Function the answer must call.
    """

    model: str
    body: Json
    prompts: list[str]
    prompt_tokens: int
    cap: int | None
    n: int = 1
    stream: bool = False
    schema: Json | None = None
    tool: Tool | None = None

    def reserved(self, default_output: int) -> int:
        """Tokens to charge before the answer is known."""
        cap = default_output if self.cap is None else self.cap
        return self.prompt_tokens + cap * self.n * len(self.prompts)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: text, or the arguments of the function called."""

    text: str
    tokens: int
    cut: bool

    @property
    def pieces(self) -> list[str]:
        """The text as a stream delivers it, word by word."""
        return words(self.text)


def words(text: str) -> list[str]:
    """The text cut after each word, losing nothing."""
    return re.findall(r"\S+\s*|\s+", text)


def quarter_bytes(text: str) -> int:
    """A cheap and deterministic count: a quarter of the UTF-8 bytes, at least 1."""
    return max(1, len(text.encode("utf-8", "surrogatepass")) // 4)


def compose(ask: Ask, prompt: str, options: Options) -> Answer:
    """Answer one prompt, deterministically."""
    text = _said(ask, prompt, options)
    pieces = words(text)
    tokens = len(pieces) if options.output_tokens is None else options.output_tokens
    if ask.cap is None or tokens <= ask.cap:
        return Answer(text, tokens, cut=False)
    return Answer("".join(pieces[: ask.cap]), ask.cap, cut=True)


def mark_cached(usage: Json, prompt_tokens: int, cached: int) -> Json:
    """The usage with so many tokens of the prompt reported as cached, where it reports them at all."""
    for name in usage.keys() & {"prompt_tokens_details", "input_tokens_details"}:
        details = {**usage[name], "cached_tokens": min(prompt_tokens, cached)}
        return {**usage, name: details}
    return usage


def _said(ask: Ask, prompt: str, options: Options) -> str:
    if ask.tool:
        return json.dumps(minimal(ask.tool.parameters))
    if options.answer:
        return _custom(options.answer, ask.body)
    if ask.schema is not None:
        return json.dumps(minimal(ask.schema))
    return f"echo: {prompt}"


def _custom(answer: Callable[[Json], str], body: Json) -> str:
    try:
        return answer(body)
    except Exception as error:  # the user's function may fail in any way, and its author reads the answer
        raise server_error(f"answer() raised {error!r}") from error


def required(body: Json, name: str) -> Any:
    """A parameter the request must have."""
    if body.get(name) is None:
        raise missing_parameter(name)
    return body[name]


def model_of(body: Json) -> str:
    """The model asked for."""
    model = required(body, "model")
    if not isinstance(model, str):
        raise wrong_type("model", "a string")
    return model


def number(body: Json, *names: str) -> int | None:
    """The first of these parameters that is given, as an integer."""
    for name in names:
        value = body.get(name)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise wrong_type(name, "an integer")
        if value is not None:
            return value
    return None


def content_text(content: Any) -> str:
    """The text of a message's content, a string or a list of parts; other parts count for nothing."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def messages_read(messages: Any, name: str, count: Count) -> tuple[str, int]:
    """The last user text and the tokens of all messages."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise wrong_type(name, "an array of objects")
    texts = [(message.get("role"), content_text(message.get("content"))) for message in messages]
    last = next((text for role, text in reversed(texts) if role == "user"), "")
    return last, sum(count(text) + PER_MESSAGE for _, text in texts) + PER_REPLY
