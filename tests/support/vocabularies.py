"""tiktoken's vocabularies without a network."""

from __future__ import annotations

import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path

_URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"


def unpack_vocabularies(folder: Path) -> None:
    """Put both, which bpe-openai carries, where tiktoken looks if `TIKTOKEN_CACHE_DIR` is this folder."""
    # not imported: that unpacks them all, and warns
    packed = Path(find_spec("bpe_openai").origin).with_name("data")
    for name in ("cl100k_base", "o200k_base"):
        key = hashlib.sha1(_URL.format(name).encode()).hexdigest()  # noqa: S324
        (folder / key).write_bytes(gzip.decompress((packed / f"{name}.tiktoken.gz").read_bytes()))
