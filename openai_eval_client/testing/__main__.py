"""`python -m openai_eval_client.testing`: the simulated server from a shell."""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ._faults import FAULTS
from ._server import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Sequence

_HINT = "in another shell: export OPENAI_BASE_URL={url} OPENAI_API_KEY=any"


def main(
    arguments: Sequence[str] | None = None, *, program: str = "python -m openai_eval_client.testing"
) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit code."""
    gc.freeze()  # what was imported stays: collections that skip it stall the server for half as long
    parser = _parser(program)
    options = vars(parser.parse_args(arguments))
    if options.pop("child"):
        return _child()
    options["faults"] = dict(options["faults"])
    try:
        _serve(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def _serve(options: dict[str, Any]) -> None:
    """Serve a person."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _pin(options.pop("cpu"))
    with suppress(KeyboardInterrupt), SimulatedServer(**options) as server:
        print(server.base_url, flush=True)  # noqa: T201
        print(_HINT.format(url=server.base_url), file=sys.stderr, flush=True)  # noqa: T201
        threading.Event().wait()


def _child() -> int:
    """Serve the process that started this one, until it closes our standard input or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    options = json.loads(sys.stdin.readline())
    _pin(options.pop("cpu"))
    try:
        server = SimulatedServer(**options).start()
    except OSError as error:
        print(json.dumps({"errno": error.errno, "error": error.strerror}))  # noqa: T201
        return 1
    print(json.dumps({"base_url": server.base_url}), flush=True)  # noqa: T201
    sys.stdin.read()
    server.stop()
    return 0


def _pin(cpu: int | None) -> None:
    if cpu is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})


def _fault(text: str) -> tuple[str, float]:
    name, _, probability = text.partition("=")
    try:
        return name, float(probability)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PROBABILITY") from None


def _names(text: str) -> list[str]:
    return text.split(",")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="A simulated OpenAI API on 127.0.0.1. Prints its base URL; ends on Ctrl-C or SIGTERM. "
        "Its counters are at /_sim/state, its calls at /_sim/calls.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--child", action="store_true", help=argparse.SUPPRESS)
    add("--port", type=int, default=0, help="TCP port; 0 takes a free one")
    add("--api-key", help="the only key accepted; any, if not given")
    add("--models", type=_names, metavar="A,B", help="the models that exist; all, if not given")
    add("--cpu", type=int, help="pin to this processor")
    _add_limits(parser.add_argument_group("limits"))
    _add_answers(parser.add_argument_group("answers and failures"))
    return parser


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rpm", type=float, help="requests per minute and model")
    add("--tpm", type=float, help="tokens per minute and model")
    add("--window", type=float, default=60.0, help="bucket capacity in seconds of quota")
    add(
        "--charge",
        choices=("upfront", "actual"),
        default="upfront",
        help="whether unused tokens are given back",
    )
    add(
        "--default-output",
        type=int,
        default=16,
        help="output tokens charged when the request sets no maximum",
    )
    add(
        "--enqueued-tokens",
        type=int,
        metavar="N",
        help="prompt tokens of a model's batches under way at once",
    )
    switch: dict[str, Any] = {"action": "store_false", "default": argparse.SUPPRESS}
    add("--no-headers", dest="headers", **switch, help="send no x-ratelimit-* headers")
    add("--no-retry-after", dest="retry_after", **switch, help="send no retry-after headers")
    add("--stamp", choices=("answer", "admission"), default="answer", help="when remaining-* is read")
    add(
        "--quota-exhausted-after", type=int, metavar="N", help="answer insufficient_quota after N generations"
    )


def _add_answers(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--latency", type=float, default=0.0, help="mean seconds to an answer")
    add("--latency-sigma", type=float, default=0.25, help="spread of the lognormal latency")
    known = f"one of {', '.join(FAULTS)}"
    add("--fault", dest="faults", type=_fault, action="append", default=[], metavar="NAME=P", help=known)
    add("--script", type=_names, metavar="A,B", help="faults, or ok, of the first generations")
    add("--unavailable-retry-after", type=float, metavar="S", help="retry-after seconds of fault 503")
    add("--output-tokens", type=int, metavar="N", help="completion tokens to report")
    add("--cached-tokens", type=int, default=0, metavar="N", help="prompt tokens to report as cached")
    add("--batch-seconds", type=float, default=0.2, metavar="S", help="from a batch's creation to its end")
    add("--seed", type=int, default=0, help="of latencies and faults")
    add("--record", type=int, default=100_000, help="newest calls kept")


if __name__ == "__main__":
    sys.exit(main())
