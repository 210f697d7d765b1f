"""What the tests of the simulated server share: requests through the SDK and over raw HTTP, and a clock."""

import asyncio
import json
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello there"}]}

COMPLETIONS = "/chat/completions"


def client(server, **options):
    return openai.AsyncOpenAI(base_url=server.base_url, api_key="sk-test", **{"max_retries": 0, **options})


def send(server, body=CHAT, path=COMPLETIONS, *, method="POST", key="sk-test", headers=None, timeout=30):
    """One raw request on a connection of its own: status, headers, body."""
    url = urlsplit(server.base_url)
    raw = body if isinstance(body, bytes | type(None)) else json.dumps(body)
    connection = HTTPConnection(url.netloc, timeout=timeout)
    try:
        sent = {"authorization": f"Bearer {key}", "content-type": "application/json", **(headers or {})}
        connection.request(method, url.path + path, raw, sent)
        response = connection.getresponse()
        shown = {name.lower(): value for name, value in response.getheaders()}
        return response.status, shown, response.read()
    finally:
        connection.close()


def error_of(raw):
    return json.loads(raw)["error"]


def events_of(raw):
    lines = [line for line in raw.decode().split("\n") if line.startswith("data: ")]
    return [line.removeprefix("data: ") for line in lines]


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now
