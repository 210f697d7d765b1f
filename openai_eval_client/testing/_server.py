"""The simulated server as users hold it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from ._backends import ProcessBackend, ThreadBackend
from ._options import FUNCTIONS, Options, check_positive

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._exchange import Call


@dataclass(kw_only=True, eq=False)
class SimulatedServer(Options):
    """An OpenAI API on a real loopback socket: limits, latency and failures as set, made-up answers.

    Serves /v1/chat/completions, /v1/responses, /v1/completions, /v1/embeddings, /v1/models, /v1/files and
    /v1/batches. It keeps the responses that are made in the background. A batch spends a tenth of
    `batch_seconds` validating, eight tenths in progress and a tenth finalizing; more if its lines cannot be
    answered as fast. Its lines are answered like requests online, but charged to no limit, and written in
    another order than they came.
    Start it with `with`, `async with` or `start()`. Once stopped, `calls` and the counters stay readable.

    ```python
    with SimulatedServer(rpm=1800, tpm=480_000, latency=0.5, faults={"500": 0.05}) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="any")
    ```

    Args:
        port: TCP port on 127.0.0.1; 0 lets the system choose a free one.
        api_key: The only key accepted; None accepts any that is not empty.
        models: The models that exist; None means every name does.
        rpm: Requests per minute and model; None is unlimited.
        tpm: Tokens per minute and model; None is unlimited.
        window: Bucket capacity, in seconds of quota. Buckets start full and refill continuously.
        charge: "upfront" charges prompt and possible output tokens at admission and gives nothing back;
            "actual" settles to the true usage when the answer is ready.
        default_output: Output tokens charged at admission if the request sets no maximum.
        headers: Send the x-ratelimit-* headers.
        retry_after: Send retry-after (s) and retry-after-ms (ms) with a 429.
        stamp: Read the x-ratelimit-remaining-* values when answering ("answer") or on arrival ("admission").
        quota_exhausted_after: Answer insufficient_quota after that many generations were served; None never.
        latency: Mean seconds from admission to the end of the answer, lognormal; 0 answers at once.
        latency_sigma: Sigma of the lognormal's logarithm; 0 makes every latency the mean.
        faults: Probability of each fault, drawn once per admitted generation. Errors that are charged: "500",
            "503", "408", "409". Errors that are not, and come without headers of the limits: "429", "401",
            "402", "403", "404", "502" (HTML), "529"; no money left: "insufficient_quota",
            "billing_not_active", "billing_hard_limit_reached", "credit_balance_exhausted",
            "organization_spend_limit_exceeded", "project_spend_limit_exceeded",
            "organization_usage_limit_exceeded", and of other servers "suspended", "insufficient_balance",
            "exceeded_quota", "daily_allowance"; this prompt is refused: "guidelines" (403), "moderation"
            (403), "image_input" (404), "invalid_prompt", "content_policy", "content_filter",
            "context_length" (400); waits: "date_behind" and "date_ahead" (by a wrong clock), "date_asctime",
            "date_zone" (-0000), "retry_in", "retry_delay"; "slow_down" (503); 429: "overloaded",
            "concurrency", "resource_unavailable" (for service_tier flex alone); bodies of other shapes:
            "error_text", "detail", "message", "plain_text", and "login_page" (HTML with status 200).
            Of sending: "drop" (closed unanswered), "hang" (never answered), "truncate" (closed mid-body),
            "garbage" (a 200 of HTML), "cut_json" (half the JSON), "json_done" (JSON, then data: [DONE]),
            "sse" (events unasked), "slow_drip" (byte by byte, over one second more than the latency),
            "malformed_headers" (nonsense in x-ratelimit-* and retry-after).
            A 200 that is no answer: "failed", "failed_rate_limit", "failed_half", "finish_error",
            "status_cancelled", "status_in_progress" (of a response), "error_beside", "empty" (no choices),
            "wrong_types"; "filtered" is ended by a content filter. Usage: "null_usage",
            "no_usage", "reasoning_outside" (of the completion), "float_usage", "negative_usage",
            "huge_usage", "text_usage", "null_counts", "cached_hits", "cached_beside" (other servers'
            names). A service_tier that was not asked for: "priority", "fast".
        script: Faults, or "ok", of the first admitted generations in order, before the random ones. Or pairs:
            a regular expression that is searched in the prompt, and what the prompt gets: a fault, "ok", the
            text of an answer, a mapping or bytes as body, a mapping of "status", "headers" and "body", or a
            list of these, one attempt after the other, the last for ever. The first pair that fits holds.
        fault_wait: Seconds to wait in faults that state a wait.
        lenient: Answer what OpenAI refuses: unknown parameters, values of wrong types or out of bounds.
        unavailable_retry_after: Seconds in the retry-after header of the fault "503"; None sends none.
        seed: Seeds latencies and faults, each with its own generator.
        answer: Called with the request body, returns the answer's text; runs in the server's event loop.
            Default: "echo: " and the last user message; a minimal instance if a JSON schema is asked for.
        output_tokens: Completion tokens to report for every answer; None counts the answer's words.
            The text itself does not change, and the request's own maximum still cuts it.
        cached_tokens: Prompt tokens to report as cached; all of a shorter prompt.
        count_tokens: Called with a text of the prompt, returns its tokens; default a quarter of its UTF-8
            bytes, at least 1. A chat request counts 3 more for each message and 3 for the reply.
        record: How many of the newest calls are kept.
        background_polls: How many polls find a response still under way that was created with
            `background`: queued at its creation, then in_progress.
        background_seconds: Seconds for which it is under way, however often it is polled; None draws
            `latency`. Then it is what it would have been at once, with its usage.
        background_poll_after: Seconds in the header openai-poll-after-ms meanwhile; None sends none.
        batch_seconds: Seconds from a batch's creation to its end.
        batch_plans: What happens to the first batches, in the order of their creation; all others complete.
            A plan may have:
            "status": where the batch ends ("completed", "failed", "expired", "cancelled"), or stays for ever
            ("validating", "in_progress", "finalizing", "cancelling"). "failed" ends it after validating,
            unless the plan has "done" or "lines"; it is the default of a plan that has "errors".
            "seconds": in place of `batch_seconds`.
            "done": share of the lines that are run; 1, but 0.5 if the batch expires or is cancelled and the
            plan has no "lines". The others are in the error file as expired or cancelled, and counted
            neither as completed nor as failed.
            "lines": outcomes of the first lines in input order; the others are "ok". In the output file:
            "ok", "duplicate" (twice), "unknown_id" (and one more, under an id never sent), "truncated" (its
            first half), "null_body" (status 200, body null), "garbage" (the body is HTML), "status_text"
            and "body_text" (a text in place of the number or object), and of the faults a 200 that is no
            answer, usage and a tier. In the error file: "400", "429", "500" (the API's errors), "expired",
            "cancelled", "timeout" (no response but an error), "status_0" (status 0, body null). In both:
            "duplicate_error". In neither: "missing".
            "output_file", "error_file": False leaves the file out although there are lines for it, "" is
            shown as its id, "empty" is a file of no bytes, "gone" an id that leads nowhere.
            "counts", "errors": shown in place of the true request_counts and errors.data.
            "input_gone": True deletes the input file at the end.
        batch_faults: Probability of each of these outcomes for a line, if the plan has no "lines".
        completion_windows: The windows accepted, such as "24h" or "7d".
        enqueued_tokens: Prompt tokens that a model's batches under way may have; None is unlimited.
        enqueued_refusal: A batch that would have more is refused with 429 ("create"), or fails after
            validating ("later"); either way the code is token_limit_exceeded.
        unknown_file: A batch whose file is unknown is refused with 400 ("create"), or fails after
            validating ("later"), as it does at OpenAI.
        file_lag: Seconds for which a file just uploaded cannot be found.
        endpoint_script: What happens to the first calls of an endpoint, by its name: "upload", "list_files",
            "retrieve_file", "delete", "content"; of batches "create", "list", "retrieve", "cancel"; of stored
            responses "retrieve_response", "cancel_response", "delete_response". "ok"; without effect "500",
            "503", "429", "drop", "hang"; with the effect, but without its answer "500_after", "drop_after",
            "hang_after"; for "content" also "truncate" (closed mid-body).
        endpoint_faults: Probabilities of the same, by endpoint, after the script.
        ranges: Whether a download honors "range: bytes=N-".
        process: Run in a process of its own instead of a thread of this one; `answer` and `count_tokens`
            cannot be used then.
        cpu: Pin that process to this processor, if the system can.

    Raises:
        ValueError: An option is invalid; the message names it.
    """

    process: bool = False
    cpu: int | None = None
    _backend: ThreadBackend | ProcessBackend | None = field(default=None, init=False, repr=False)
    _last: tuple[list[Call], dict[str, Any], list[dict[str, Any]]] | None = field(
        default=None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        functions = [name for name in FUNCTIONS if getattr(self, name) is not None]
        if self.process and functions:
            names = ", ".join(functions)
            raise ValueError(f"{names}: not with process=True, as functions cannot be passed to a process")
        if self.cpu is not None and not self.process:
            raise ValueError(f"cpu={self.cpu}: a processor can be chosen only with process=True")

    def start(self) -> Self:
        """Listen; return once connections are accepted. Do nothing if already started.

        Raises:
            OSError: The port is taken.
        """
        if self._backend is None:
            self._backend = ProcessBackend(self, self.cpu) if self.process else ThreadBackend(self)
        return self

    def stop(self) -> None:
        """Close every connection and end the thread or process. Do nothing if already stopped."""
        if self._backend is None:
            return
        backend, self._backend = self._backend, None
        try:
            self._last = backend.calls(), backend.state(), backend.batches()
        finally:
            backend.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.start)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)

    @property
    def base_url(self) -> str:
        """What to give a client as its base URL: "http://127.0.0.1:PORT/v1"."""
        return self._running.base_url

    @property
    def calls(self) -> list[Call]:
        """The newest calls on API paths in order of arrival, refused ones included."""
        if self._backend is None and self._last:
            return self._last[0]
        return self._running.calls()

    @property
    def batches(self) -> list[dict[str, Any]]:
        """The Batch objects as of now, oldest first."""
        if self._backend is None and self._last:
            return self._last[2]
        return self._running.batches()

    @property
    def counts(self) -> Counter[str]:
        """How often each status ("200") and fault ("drop") occurred; "disconnect": the client left early."""
        return Counter(self._state["counts"])

    @property
    def in_flight(self) -> int:
        """Requests being worked on now."""
        return int(self._state["in_flight"])

    @property
    def max_in_flight(self) -> int:
        """Most requests worked on at once."""
        return int(self._state["max_in_flight"])

    @property
    def connections(self) -> int:
        """TCP connections open now."""
        return int(self._state["connections"])

    def set_limits(
        self, *, rpm: float | EllipsisType | None = ..., tpm: float | EllipsisType | None = ...
    ) -> None:
        """Change limits while running; each bucket stays as full in proportion. What is not given stays.

        Args:
            rpm: Requests per minute and model; None is unlimited.
            tpm: Tokens per minute and model; None is unlimited.
        """
        given = {"rpm": rpm, "tpm": tpm}
        limits = {name: limit for name, limit in given.items() if not isinstance(limit, EllipsisType)}
        for name, limit in limits.items():
            check_positive(name, limit)
        self._running.set_limits(limits)
        for name, limit in limits.items():
            setattr(self, name, limit)

    def reset(self) -> None:
        """Forget calls and counts and fill every bucket; faults, latencies, files and batches go on."""
        self._running.reset()

    @property
    def _running(self) -> ThreadBackend | ProcessBackend:
        if self._backend is None:
            raise RuntimeError("the simulated server is not running: use `with`, or call start()")
        return self._backend

    @property
    def _state(self) -> dict[str, Any]:
        if self._backend is None and self._last:
            return {**self._last[1], "in_flight": 0, "connections": 0}
        return self._running.state()
