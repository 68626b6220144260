"""When an engine with room waits for prompts that are just being prepared, before it steps.

A step takes much the same time for one completion as for a full engine, and its thread and the
feeder's share one interpreter. An evaluation brings each prompt once, so all are prepared anew.
Where answers are short the engine would step for the few that are there, and the preparing would
get half of the interpreter's time. So it gathers first.
"""

from __future__ import annotations

#: Longest wait, seconds. On a busy machine a load takes seconds to prepare. A large model's long
#: answers wait for the first load alone, and take minutes.
GATHER_S = 5.0


class GatherPolicy:
    """Gathers until the engine is full, nothing more is coming, or ``GATHER_S`` have passed. Then
    it steps until half of what it held at most is done.

    Where completions outlast the preparing, the engine never falls to that half, and nothing waits.
    """

    def __init__(self, places: int) -> None:
        """``places``: completions that the engine decodes together."""
        self.places = places
        self._most = 0  # in flight since the last gathering
        self._since: float | None = None  # of the gathering that goes on

    def waits(self, in_flight: int, coming: bool, now: float) -> bool:
        """Whether to wait before the next step. ``in_flight`` completions are in the engine,
        ``coming``: more are being prepared; ``now`` in seconds."""
        if self._since is None and in_flight <= self._most // 2:
            self._since = now
        if self._since is not None:
            if coming and in_flight < self.places and now - self._since < GATHER_S:
                return True
            self._since, self._most = None, 0
        self._most = max(self._most, in_flight)
        return False
