"""What a prompt's tokens are known by."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def prompt_digest(token_ids: Sequence[int] | NDArray[np.int32] | Any) -> int:
    """crc32 of the expanded prompt token ids (a sequence, an array or a tensor) as little-endian
    int32."""
    return zlib.crc32(np.asarray(token_ids, dtype="<i4").tobytes())
