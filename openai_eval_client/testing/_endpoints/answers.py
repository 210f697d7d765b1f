"""What the simulated model reads and says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._faults import missing_parameter, server_error, wrong_type
from .schemas import minimal

if TYPE_CHECKING:
    from .._options import Options

Json = dict[str, Any]
Count = Callable[[str], int]  # tokens of a text
PER_MESSAGE = 3  # tokens
PER_REPLY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function the model must call."""

    name: str
    parameters: Json
    named: bool  # whether the request names it


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A generation request, understood."""

    model: str
    body: Json
    prompts: list[str]  # each is answered; several only for completions and embeddings
    prompt_tokens: int  # of everything sent
    cap: int | None  # most output tokens of one answer; None: the request sets no maximum
    text: str | None = None  # scripted: what is answered
    n: int = 1  # answers to each prompt
    schema: Json | None = None  # JSON schema the answer must follow
    tool: Tool | None = None  # function the answer must call

    def reserved(self, default_output: int) -> int:
        """Return the tokens to charge at admission: those of the prompt, and all that may be generated."""
        cap = default_output if self.cap is None else self.cap
        return self.prompt_tokens + cap * self.n * len(self.prompts)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one prompt."""

    text: str  # or the arguments of the function called
    tokens: int
    cut: bool  # whether it ends early, at the request's maximum


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """An endpoint that is limited, delayed and subject to faults."""

    check: Callable[[Json], None]  # refuses what the API refuses
    read: Callable[[Json, Count], Ask]  # understands a request body
    write: Callable[[Ask, Options, str], Json]  # makes the whole answer, under an id
    stream: Callable[[Ask, Json], list[bytes]] | None = None  # cuts it into events, where it can be streamed

    def understand(self, body: Json, count: Count, *, lenient: bool) -> Ask:
        """Return the request of a body; raise a 400 for one that the API refuses."""
        if not lenient:
            model_of(body)
            self.check(body)
        return self.read(body, count)


def words(text: str) -> list[str]:
    """Cut the text after each word, losing nothing."""
    return re.findall(r"\S+\s*|\s+", text)


def quarter_bytes(text: str) -> int:
    """Count tokens cheaply and the same each time: a quarter of the UTF-8 bytes, at least 1."""
    return max(1, len(text.encode("utf-8", "surrogatepass")) // 4)


def compose(ask: Ask, prompt: str, options: Options) -> Answer:
    """Answer one prompt, the same each time."""
    text = _text(ask, prompt, options)
    pieces = words(text)
    tokens = len(pieces) if options.output_tokens is None else options.output_tokens
    if ask.cap is None or tokens <= ask.cap:
        return Answer(text, tokens, cut=False)
    return Answer("".join(pieces[: ask.cap]), ask.cap, cut=True)


def _text(ask: Ask, prompt: str, options: Options) -> str:
    if ask.text is not None:
        return ask.text
    if ask.tool:
        return json.dumps(minimal(ask.tool.parameters))
    if options.answer:
        try:
            return options.answer(ask.body)
        except Exception as error:  # the user's function may fail in any way; its author reads this message
            raise server_error(f"answer() raised {error!r}") from error
    if ask.schema is not None:
        return json.dumps(minimal(ask.schema))
    return f"echo: {prompt}"


def required(body: Json, name: str) -> Any:
    """Return a parameter; raise a 400 if it is missing or null."""
    if body.get(name) is None:
        raise missing_parameter(name)
    return body[name]


def model_of(body: Json) -> str:
    """Return the name of the model; raise a 400 if there is none."""
    model = required(body, "model")
    if not isinstance(model, str):
        raise wrong_type("model", "a string")
    return model


def number(body: Json, *names: str) -> int | None:
    """Return the first of these parameters that is given, as an integer."""
    for name in names:
        value = body.get(name)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise wrong_type(name, "an integer")
        if value is not None:
            return value
    return None


def messages_read(messages: Any, name: str, count: Count) -> tuple[str, int]:
    """Return the last user text and the tokens of all messages."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise wrong_type(name, "an array of objects")
    texts = [(message.get("role"), _content(message.get("content"))) for message in messages]
    last = next((text for role, text in reversed(texts) if role == "user"), "")
    return last, sum(count(text) + PER_MESSAGE for _, text in texts) + PER_REPLY


def _content(content: Any) -> str:
    """Return the text of a message, a string or a list of parts; parts without text count for nothing."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def texts_read(value: Any, name: str, count: Count) -> tuple[list[str], int]:
    """Return the texts and tokens of a string, a token list, or several of either."""
    several = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    texts, tokens = [], 0
    for item in several:
        if isinstance(item, str):
            tokens += count(item)
        elif item and isinstance(item, list) and all(isinstance(token, int) for token in item):
            tokens += len(item)
        else:
            raise wrong_type(name, "a string, a list of tokens, or a list of either")
        texts.append(item if isinstance(item, str) else " ".join(map(str, item)))  # tokens as their numbers
    return texts, tokens
