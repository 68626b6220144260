"""Seeds of replay draws: a small explicit generator that Lua and Python run identically."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

_M1, _M2 = 2147483563, 2147483399


def seed_state(seed: int, step: int) -> tuple[int, int]:
    """Start state (x, y) of the generator for a draw; hashing keeps neighbouring seeds
    unrelated."""
    digest = hashlib.sha256(f"avatar-draw:{seed}:{step}".encode()).digest()
    return 1 + int.from_bytes(digest[:8], "big") % (_M1 - 1), 1 + int.from_bytes(
        digest[8:16], "big"
    ) % (_M2 - 1)


def generator(seed: int, step: int) -> Callable[[int], int]:
    """``below(n)``: uniform integers in [0, n), n < 2^22, by L'Ecuyer's combined generator (CACM
    31, 1988).

    The same arithmetic as ``generator`` in scripts/lib.lua: exact in 53-bit floats.
    """
    x, y = seed_state(seed, step)

    def below(n: int) -> int:
        nonlocal x, y
        x, y = (x * 40014) % _M1, (y * 40692) % _M2
        return int((x - y) % (_M1 - 1) * n / (_M1 - 1))

    return below
