"""What the tests of simulated files and batches share: input files, uploads, and batches in virtual time."""

import asyncio
import json

from simulated_calls import send
from virtual import VirtualLoop

from openai_eval_client.testing._batches.batches import Batches
from openai_eval_client.testing._batches.files import Files, Form
from openai_eval_client.testing._endpoints import quarter_bytes
from openai_eval_client.testing._options import TERMINAL

CHAT_URL = "/v1/chat/completions"

BODIES = {
    CHAT_URL: {"model": "m", "messages": [{"role": "user", "content": "hello there"}]},
    "/v1/responses": {"model": "m", "input": "hello there"},
    "/v1/completions": {"model": "m", "prompt": "hello there"},
    "/v1/embeddings": {"model": "m", "input": "hello there"},
}

LONG = 1000.0  # seconds, for what is not to end within a test

GOOD = {"endpoint": CHAT_URL, "completion_window": "24h"}

MULTIPART = "multipart/form-data; boundary=B"


def asking(number, url=CHAT_URL, **more):
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {**BODIES[url], **more}}


def jsonl(*requests):
    """Requests as a file; what is bytes already goes in as it is."""
    lines = [request if isinstance(request, bytes) else json.dumps(request).encode() for request in requests]
    return b"".join(line + b"\n" for line in lines)


def several(many, url=CHAT_URL):
    return jsonl(*[asking(number, url) for number in range(many)])


async def upload(sdk, content, purpose="batch"):
    return await sdk.files.create(file=("input.jsonl", content), purpose=purpose)


async def submit(sdk, content, url=CHAT_URL, **more):
    file = await upload(sdk, content)
    options = {"completion_window": "24h", **more}
    return await sdk.batches.create(input_file_id=file.id, endpoint=url, **options)


async def reached(sdk, batch, *statuses):
    """The batch, once it has one of these statuses."""
    while batch.status not in statuses:
        await asyncio.sleep(0.002)
        batch = await sdk.batches.retrieve(batch.id)
    return batch


async def finished(sdk, content, url=CHAT_URL, **more):
    return await reached(sdk, await submit(sdk, content, url, **more), *TERMINAL)


async def read_lines(sdk, ident):
    """The lines of a file, parsed; none where there is no file."""
    if not ident:
        return []
    return [json.loads(line) for line in (await sdk.files.content(ident)).content.splitlines()]


def request(server, path, method="GET", body=None, **headers):
    """One raw request: status, headers, body."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return send(server, body, path, method=method, headers=sent)


def form(content, *, purpose=b"batch", name=b"file", boundary=b"B"):
    head = b"--%b\r\ncontent-disposition: form-data; name=" % boundary
    return (
        head + b'"purpose"\r\n\r\n' + purpose + b"\r\n"
        + head + b'"' + name + b'"; filename="a \xc3\xa9\\"b.jsonl"\r\n\r\n' + content + b"\r\n"
        + b"--%b--\r\n" % boundary
    )  # fmt: skip


def in_virtual_time(scenario, options, content):
    """Run `scenario(batches, file)` on a loop that does not sleep."""
    loop = VirtualLoop()

    async def run():
        files = Files()
        batches = Batches(options, files, quarter_bytes, lambda _: None)
        file = files.upload(Form({"purpose": "batch"}, "input.jsonl", content))
        result = await scenario(batches, {"input_file_id": file.ident, **GOOD})
        lines = {
            name: [json.loads(line) for line in files.get(shown[f"{name}_file_id"]).content.splitlines()]
            for shown in batches.as_json()
            for name in ("output", "error")
            if shown[f"{name}_file_id"]
        }
        return result, lines

    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()
