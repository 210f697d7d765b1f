"""A simulated OpenAI server: rehearse a run, limits and failures included, without a key or a bill."""

from ._exchange import Call
from ._server import SimulatedServer

__all__ = ["Call", "SimulatedServer"]
