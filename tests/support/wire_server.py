"""A server of bare sockets that sends exactly these bytes: to each prompt what the test says, in turn."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MODEL = "gpt-4o-mini"  # USD 0.15 and 0.60 a million tokens, cached input 0.075; half of that in a batch
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
USD = "0.00045"  # what that costs
JSON = "application/json"


def chat(content: Any = "yes", *, finish: Any = "stop", usage: Any = USAGE, **more: Any) -> dict[str, Any]:
    """Return the body of an answer to a chat completion; `usage=None` leaves it out."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
    return {**body, "choices": [choice], **({} if usage is None else {"usage": usage}), **more}


def response(text: str | None = "yes", *, usage: Any = "same", **more: Any) -> dict[str, Any]:
    """Return the body of an answer of the Responses API; `text=None` leaves all output out."""
    content = [{"type": "output_text", "text": text, "annotations": []}]
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}
    counts = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}
    body = {"id": "resp_1", "object": "response", "created_at": 1, "model": MODEL, "status": "completed"}
    output = [] if text is None else [item]
    return {**body, "error": None, "output": output, "usage": counts if usage == "same" else usage, **more}


@dataclass(frozen=True)
class Reply:
    """One answer of the server, and what it costs in USD."""

    body: Any = field(default_factory=chat)  # bytes go as they are, anything else as JSON
    status: int = 200
    headers: tuple[str | Callable[[], str], ...] = ()  # a function is called when the answer is sent
    kind: str | None = JSON  # the content type; None: no such header
    usd: str = "0"
    raw: bytes | None = None  # the whole answer, head included, instead of all of the above
    hang_up: bool = False  # close the connection after it
    delay: float = 0.0  # seconds before it is sent

    @property
    def content(self) -> bytes:
        """The bytes of the body."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def on_the_wire(self) -> bytes:
        """Return all bytes of the answer."""
        if self.raw is not None:
            return self.raw
        try:
            phrase = http.HTTPStatus(self.status).phrase
        except ValueError:
            phrase = "Unknown"
        lines = [f"HTTP/1.1 {self.status} {phrase}"]
        lines += [] if self.kind is None else [f"content-type: {self.kind}"]
        lines += [each if isinstance(each, str) else each() for each in self.headers]
        lines += [f"content-length: {len(self.content)}", "", ""]
        return "\r\n".join(lines).encode() + self.content


GOOD = Reply(usd=USD)
GOOD_RESPONSE = Reply(response(), usd=USD)


class WireServer:
    """Answers the n-th request that holds a text with the n-th of its replies, and then with the last."""

    def __init__(self, script: Mapping[str, Sequence[Reply]], lines: Sequence[Any] | None = None) -> None:
        self.url = ""
        self.counts: Counter[str] = Counter()  # requests by the text in them; "" for all others
        self.heads: list[bytes] = []
        self._script = script
        self._lines = lines  # of the output of a batch, instead of those made of the script
        self._files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}  # by their ids
        self.hooks: dict[
            str, Callable[[int, Reply], Reply | None]
        ] = {}  # answers replaced: see `_of_batches`
        self.looks: Counter[str] = Counter()  # how often each of them was asked for
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def calls(self) -> int:
        """Requests that ran a model."""
        return sum(self.counts.values())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it is closed."""
        self._tasks.add(asyncio.current_task())
        self._writers.add(writer)
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                reply = self._answer(head, await _body(reader, head))
                if reply.delay:
                    await asyncio.sleep(reply.delay)
                writer.write(reply.on_the_wire())
                await writer.drain()
                if reply.hang_up:
                    return

    async def close(self) -> None:
        """End all connections."""
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*filter(None, self._tasks), return_exceptions=True)

    def _answer(self, head: bytes, body: bytes) -> Reply:
        method, target = head.split(b" ", 2)[:2]
        path = target.decode().partition("?")[0].removeprefix("/v1")
        if path.startswith(("/files", "/batches")):
            return self._of_batches(method.decode(), path, body)
        self.heads.append(head)
        return self._next(body, path)

    def _next(self, body: bytes, path: str) -> Reply:
        key = next((key for key in self._script if key.encode() in body), "")
        number = self.counts[key]
        self.counts[key] += 1
        if not key:
            return GOOD_RESPONSE if path.endswith("/responses") else GOOD
        replies = self._script[key]
        return replies[min(number, len(replies) - 1)]

    # --- the Batch API: each batch has ended as soon as it is made ------------------------------------------

    def _of_batches(self, method: str, path: str, body: bytes) -> Reply:
        """Do a call, and answer as a hook of its name says that is given its number and the plain answer."""
        # The names: upload, file, content, input (the content of an input file), create, list, retrieve and
        # cancel. "no create" is asked before a batch is made; if it answers, none is.
        _, kind, *rest = path.split("/")
        if kind == "files":
            name = "upload" if method == "POST" else "content" if rest[1:] else "file"
            name = "input" if name == "content" and rest[0] in self._inputs else name
        else:
            name = ("retrieve" if rest else "list") if method == "GET" else "cancel" if rest else "create"
        number = self.looks[name]
        self.looks[name] += 1
        refused = self.hooks.get(f"no {name}", lambda *_: None)(number, GOOD)
        if refused is not None:
            return refused
        reply = self._plainly(kind, method, rest, body)
        return self.hooks.get(name, lambda *_: None)(number, reply) or reply

    @property
    def _inputs(self) -> set[str]:
        return {batch["input_file_id"] for batch in self.batches.values()}

    def _plainly(self, kind: str, method: str, rest: Sequence[str], body: bytes) -> Reply:
        if kind == "files":
            if method == "POST":
                return Reply(self._file(_uploaded(body)))
            content = self._files.get(rest[0])
            if content is None:
                return Reply({"error": {"message": f"No such File object: {rest[0]}"}}, 404)
            return Reply(content if rest[1:] == ["content"] else _file_object(rest[0], content))
        if method == "POST" and not rest:
            return Reply(self._batch(json.loads(body)))
        if not rest:
            return Reply({"object": "list", "data": list(self.batches.values()), "has_more": False})
        unknown = Reply({"error": {"message": f"No batch found with id '{rest[0]}'."}}, 404)
        return Reply(self.batches[rest[0]]) if rest[0] in self.batches else unknown

    def _file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self._files)}"
        self._files[name] = content
        return _file_object(name, content)

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        requests = self._files[asked["input_file_id"]].splitlines()
        lines = [self._line(number, raw, asked["endpoint"]) for number, raw in enumerate(requests)]
        output = self._file(b"".join(line + b"\n" for line in lines))
        name, now = f"batch_{len(self.batches)}", int(time.time())
        counts = {"total": len(requests), "completed": len(requests), "failed": 0}
        times = {"created_at": now, "completed_at": now}
        ended = {"status": "completed", "output_file_id": output["id"], "error_file_id": None}
        batch = {"id": name, "object": "batch", "errors": None, **asked, **times, **ended}
        self.batches[name] = {**batch, "request_counts": counts}
        return self.batches[name]

    def _line(self, number: int, raw: bytes, endpoint: str) -> bytes:
        custom_id = json.loads(raw)["custom_id"]
        if self._lines is not None:
            line = self._lines[number]
            return line.replace(b"CUSTOM_ID", custom_id.encode()) if isinstance(line, bytes) else b"?"
        reply = self._next(raw, endpoint)
        try:
            body = json.loads(reply.content)
        except (ValueError, RecursionError):
            body = reply.content.decode(errors="replace")
        answer = {"status_code": reply.status, "request_id": "req_1", "body": body}
        return json.dumps({"id": "x", "custom_id": custom_id, "response": answer, "error": None}).encode()


def _file_object(name: str, content: bytes) -> dict[str, Any]:
    sizes = {"bytes": len(content), "created_at": 1, "filename": "f.jsonl"}
    return {"id": name, "object": "file", "purpose": "batch", "status": "processed", **sizes}


def _uploaded(body: bytes) -> bytes:
    """Return the file in a form."""
    boundary = body.partition(b"\r\n")[0]
    part = next(part for part in body.split(boundary) if b"filename=" in part)
    return part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """Read the body of a request, chunked or not."""
    fields = dict(line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:] if b":" in line)
    if b"chunked" not in fields.get(b"transfer-encoding", b""):
        return await reader.readexactly(int(fields.get(b"content-length", b"0")))
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return body


@contextlib.asynccontextmanager
async def serving(script: Mapping[str, Sequence[Reply]] | None = None, lines: Sequence[Any] | None = None):
    """A server on a port of its own, for as long as the block lasts."""
    wire = WireServer(script or {}, lines)
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    wire.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield wire
    finally:
        server.close()
        await wire.close()


def refusal(
    message: Any = "a message", code: Any = None, kind: Any = None, *, status: int = 429, **more: Any
) -> Reply:
    """Return an answer with an error in the form of OpenAI's; headers and content type as for a reply."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Reply(body, status, **more)
