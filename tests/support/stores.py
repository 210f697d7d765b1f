"""A store on a real file, and programs that use it from processes of their own."""

import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from openai_eval_client._cache.store import Store

KEYS = [bytes([n]) * 32 for n in range(40)]
VALUES = {key: (b"%d " % n) * (3000 if n % 10 == 9 else 40) for n, key in enumerate(KEYS)}
POSIX = pytest.mark.skipif(os.name != "posix", reason="forks, signals and permission bits")
# A program that forks while it has threads is warned of it.
QUIET = "import os, time, warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"


def names(folder: Path) -> set[str]:
    """The names of all files in a folder."""
    return {file.name for file in folder.iterdir()}


async def fill(store: Store) -> None:
    """Put all values, and one entry of the journal."""
    assert all(await asyncio.gather(*(store.put(key, VALUES[key]) for key in KEYS)))
    await store.journal_put("job", {"id": "batch_1"})


def started(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """A process of its own, in which a warning is an error."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, cwd=Path(__file__).parents[2], **pipes, **options)


def outcome(child: subprocess.Popen[str]) -> str:
    """What a process that ends well has written."""
    out, errors = child.communicate(timeout=50)
    assert (child.returncode, errors) == (0, ""), errors
    return out
