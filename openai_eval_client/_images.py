"""What an image costs in tokens, by the formulas of OpenAI's guide "Images and vision".

https://platform.openai.com/docs/guides/images-vision#calculating-costs documents two of them: 512-pixel
tiles, and 32-pixel patches for the small models. Models it does not name are counted like gpt-4o.
"""

from __future__ import annotations

import base64
import io
import math
from functools import lru_cache
from typing import NamedTuple

DEFAULT_SIZE = (1024, 1024)
"""Pixels assumed where the size cannot be seen: a web address, a file id, a broken data URL."""

_MAX_SIDE = 2048
_MAX_SHORT_SIDE = 768
_TILE = 512
_PATCH = 32
_MAX_PATCHES = 1536
_HEADER_LENGTHS = (
    1 << 16,
    1 << 20,
)  # of base64: a JPEG may hide its size behind megabytes of camera metadata


class _Tiles(NamedTuple):
    """Tokens of an image in low detail, and of each further tile in high detail."""

    base: int
    each: int


_GPT_4O = _Tiles(85, 170)
_FAMILIES: dict[
    str, _Tiles | float
] = {  # by the start of the model's name: tiles, or the multiplier of patches
    "gpt-4o": _GPT_4O,
    "gpt-4o-mini": _Tiles(2833, 5667),
    "gpt-4.1": _GPT_4O,
    "gpt-4.1-mini": 1.62,
    "gpt-4.1-nano": 2.46,
    "gpt-4.5": _GPT_4O,
    "gpt-5": _Tiles(70, 140),
    "gpt-5-mini": 1.62,
    "gpt-5-nano": 2.46,
    "o1": _Tiles(75, 150),
    "o3": _Tiles(75, 150),
    "o4-mini": 1.72,
    "computer-use-preview": _Tiles(65, 129),
}


def image_tokens(model: str, source: object, detail: object = None) -> int:
    """Counts one image of a request.

    Args:
        model: The model's name; "provider/model" and fine-tuned "ft:model:..." names are understood.
        source: Where the image is: a data URL, whose header tells the size; anything else has DEFAULT_SIZE.
        detail: "low", or "high", which "auto" and None also mean. The patch formula knows no detail.

    Returns:
        Input tokens.
    """
    return sized_image_tokens(model, _size_of(source), detail)


def sized_image_tokens(model: str, size: tuple[int, int], detail: object = None) -> int:
    """Counts one image of a known size.

    Args:
        model: As for image_tokens.
        size: Width and height in pixels, both positive.
        detail: As for image_tokens.

    Returns:
        Input tokens.
    """
    family = _family(model)
    if isinstance(family, float):
        return math.ceil(round(_patches(*size) * family, 6))
    return family.base + (0 if detail == "low" else _tiles(*size) * family.each)


@lru_cache(maxsize=256)
def _family(model: str) -> _Tiles | float:
    """Finds the longest documented name that the model's name starts with."""
    name = model.rpartition("/")[2].removeprefix("ft:")
    known = max((start for start in _FAMILIES if name.startswith(start)), key=len, default="gpt-4o")
    return _FAMILIES[known]


def _tiles(width: int, height: int) -> int:
    """Fits the image into 2048 x 2048 and its short side into 768, and counts the tiles that cover it."""
    shrink = min(1.0, _MAX_SIDE / max(width, height), _MAX_SHORT_SIDE / min(width, height))
    across, down = (max(1, round(side * shrink)) for side in (width, height))
    return math.ceil(across / _TILE) * math.ceil(down / _TILE)


def _patches(width: int, height: int) -> int:
    """Counts the patches that cover the image, which is shrunk until they are few enough."""
    across, down = width / _PATCH, height / _PATCH
    if math.ceil(across) * math.ceil(down) <= _MAX_PATCHES:
        return math.ceil(across) * math.ceil(down)
    shrink = min(1.0, math.sqrt(_MAX_PATCHES / (across * down)))
    across, down = across * shrink, down * shrink
    shrink = min(max(1, math.floor(side)) / side for side in (across, down))  # one side gets whole patches
    return min(_MAX_PATCHES, _covering(across * shrink) * _covering(down * shrink))


def _covering(patches: float) -> int:
    """Rounds up, forgiving what floating point adds to a whole number."""
    return math.ceil(patches - 1e-6)


def _size_of(source: object) -> tuple[int, int]:
    """Reads an image's size from the header in its data URL."""
    if not isinstance(source, str) or not source.startswith("data:"):
        return DEFAULT_SIZE
    start = source.find(",", 0, 256) + 1
    for length in _HEADER_LENGTHS:
        size = _header_size(source[start : start + length])
        if size:
            return size
        if len(source) <= start + length:
            break
    return DEFAULT_SIZE


def _header_size(encoded: str) -> tuple[int, int] | None:
    """Reads the size from the beginning of a base64-encoded image, if it is there."""
    import imagesize

    try:
        header = base64.b64decode(encoded[: len(encoded) // 4 * 4])
        width, height = imagesize.get(io.BytesIO(header))
    except Exception:  # noqa: BLE001  # whatever is wrong with the image, it has a default size
        return None
    return (int(width), int(height)) if width > 0 and height > 0 else None
