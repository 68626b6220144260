"""What a prompt's tokens are known by."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def prompt_digest(token_ids: Sequence[int] | NDArray[np.int32] | Tensor) -> int:
    """crc32 of the expanded prompt token ids (a sequence, an array or a tensor) as little-endian
    int32."""
    return zlib.crc32(np.asarray(token_ids, dtype="<i4").tobytes())
