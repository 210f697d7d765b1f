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
from ._options import Options
from ._server import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Sequence

_HINT = "in another shell: export OPENAI_BASE_URL={url} OPENAI_API_KEY=any"


def main(
    arguments: Sequence[str] | None = None, *, program: str = "python -m openai_eval_client.testing"
) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit code."""
    gc.freeze()  # what is imported stays: collections that skip it stall the server for half as long
    parser = _parser(program)
    options = vars(parser.parse_args(arguments))
    if options.pop("child"):
        return _serve_parent()
    options["faults"] = dict(options["faults"])
    options["script"] = [*options.get("script", ()), *options.pop("when")]
    try:
        _serve(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def _serve(options: dict[str, Any]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    _pin(options.pop("cpu", None))
    with suppress(KeyboardInterrupt), SimulatedServer(**options) as server:
        print(server.base_url, flush=True)  # noqa: T201
        print(_HINT.format(url=server.base_url), file=sys.stderr, flush=True)  # noqa: T201
        threading.Event().wait()


def _interrupt(*_: object) -> None:
    """Begin to stop; the next signal ends the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def _serve_parent() -> int:
    """Serve the process that started this one, until it closes our standard input or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
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
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PROBABILITY, such as 500=0.1") from None


def _rule(text: str) -> tuple[str, Any]:
    pattern, arrow, given = text.partition("=>")
    if not arrow:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=>OUTCOME, such as 'capital=>Paris'")
    return pattern, json.loads(given) if given.startswith(("[", "{")) else given


def _names(text: str) -> list[str]:
    return text.split(",")


class _Help(argparse.HelpFormatter):
    """Adds to each help text the default that the server's own options have."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = getattr(Options, action.dest, None)
        if default is None or isinstance(default, bool):
            return action.help  # which says itself what happens without it
        return f"{action.help} (default: {default})"


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="A simulated OpenAI API on 127.0.0.1. Prints its base URL; ends on Ctrl-C or SIGTERM. "
        "Its counters are at /_sim/state, its calls at /_sim/calls.",
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,  # the server knows its defaults
    )
    add = parser.add_argument
    add("--child", action="store_true", default=False, help=argparse.SUPPRESS)
    add("--port", type=int, help="TCP port; 0 takes a free one")
    add("--api-key", help="the only key accepted (default: any)")
    add("--models", type=_names, metavar="A,B", help="the models that exist (default: all)")
    add("--cpu", type=int, help="number of the processor to run on (default: any)")
    _add_limits(parser.add_argument_group("limits"))
    _add_answers(parser.add_argument_group("answers and failures"))
    return parser


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rpm", type=float, help="requests per minute and model (default: unlimited)")
    add("--tpm", type=float, help="tokens per minute and model (default: unlimited)")
    add("--window", type=float, metavar="S", help="bucket capacity in seconds of quota")
    charge = "upfront keeps the unused tokens of a request, actual gives them back"
    add("--charge", choices=("upfront", "actual"), help=charge)
    add("--default-output", type=int, metavar="N", help="output tokens charged if no maximum is requested")
    enqueued = "prompt tokens of a model's batches under way at once (default: unlimited)"
    add("--enqueued-tokens", type=int, metavar="N", help=enqueued)
    limits = "send no x-ratelimit-* headers (default: send them)"
    add("--no-headers", dest="headers", action="store_false", help=limits)
    wait = "send no retry-after headers (default: send them)"
    add("--no-retry-after", dest="retry_after", action="store_false", help=wait)
    stamp = "when the x-ratelimit-remaining-* values are read"
    add("--stamp", choices=("answer", "admission"), help=stamp)
    quota = "answer insufficient_quota after N generations (default: never)"
    add("--quota-exhausted-after", type=int, metavar="N", help=quota)


def _add_answers(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--latency", type=float, metavar="S", help="mean seconds to an answer")
    add("--latency-sigma", type=float, metavar="SIGMA", help="spread of the lognormal latency")
    faults = f"probability of a fault, repeatable; NAME is one of {', '.join(FAULTS)} (default: no faults)"
    add("--fault", dest="faults", type=_fault, action="append", default=[], metavar="NAME=P", help=faults)
    script = "faults, or ok, of the first generations in order (default: none)"
    add("--script", type=_names, metavar="A,B", help=script)
    when = (
        "what a prompt gets in which a pattern is found, repeatable; OUTCOME is a fault, ok, a text, or "
        "in JSON a body, or a list of these for one attempt after the other (default: none)"
    )
    add("--when", type=_rule, action="append", default=[], metavar="REGEX=>OUTCOME", help=when)
    lenient = "take parameters and values that OpenAI refuses (default: refuse them)"
    add("--lenient", action="store_true", help=lenient)
    add("--fault-wait", type=float, metavar="S", help="seconds that faults ask to wait which name a wait")
    wait = "seconds in the retry-after header of fault 503 (default: no header)"
    add("--unavailable-retry-after", type=float, metavar="S", help=wait)
    output = "completion tokens to report (default: the words of the answer)"
    add("--output-tokens", type=int, metavar="N", help=output)
    add("--cached-tokens", type=int, metavar="N", help="prompt tokens to report as cached")
    polls = "polls that find a background response still under way"
    add("--background-polls", type=int, metavar="N", help=polls)
    seconds = "seconds that a background response takes (default: its latency)"
    add("--background-seconds", type=float, metavar="S", help=seconds)
    after = "seconds in the openai-poll-after-ms header of a background response (default: no header)"
    add("--background-poll-after", type=float, metavar="S", help=after)
    add("--batch-seconds", type=float, metavar="S", help="seconds from a batch's creation to its end")
    add("--seed", type=int, metavar="N", help="seed of latencies and faults")
    add("--record", type=int, metavar="N", help="how many of the newest calls are kept")


if __name__ == "__main__":
    sys.exit(main())
