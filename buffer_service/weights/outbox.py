"""Where rank 0 puts a version, and where the weight board's standing call picks it up
(buffer_service/board.py)."""

from __future__ import annotations

import threading
import time
from typing import Any

from avatar_rl.buffer_service.weights.block import Parcel
from avatar_rl.common.errors import ModelError

TAKE_S = 600.0  # one copy within a machine; this long only when the object store has to spill
ASK_S = (
    5.0  # a board that has not taken a version by then may be a new one, which follows nobody yet
)


class Outbox:
    """Of the actor that publishes, under the name ``outbox``; one version at a time is on its way
    to the board.

    The actor needs one thread (max_concurrency) more than calls that may publish at once: the
    standing call waits in it, and copies the tensors into the object store while the learner goes
    on."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self._changed = threading.Condition()
        self._put_out: Parcel | None = None
        self._serial = self._taken = 0  # of what was put out last, and of what the board has last
        # the standing call is the newest one: a new board may ask while its predecessor's still
        # waits
        self._call = 0
        self._followed = False

    def await_taken(self) -> None:
        """Returns once the board has what was put out last, at once where nothing was.

        Raises ModelError when it does not take it.
        """
        deadline = time.monotonic() + TAKE_S
        while not self._await_taken(ASK_S):
            if time.monotonic() > deadline:
                version = self._put_out[0] if self._put_out else 0
                raise ModelError(
                    f"the weight board did not take version {version} within {TAKE_S:g} s"
                )
            self._ask_to_follow()

    def put(self, parcel: Parcel) -> None:
        """Let the board have ``parcel``, after ``await_taken``. It takes it meanwhile, so leave its
        memory alone until the one after it was taken: a new board may ask for this one again."""
        with self._changed:
            self._put_out = parcel
            self._serial += 1
            self._changed.notify_all()
        if not self._followed:
            self._ask_to_follow()

    def put_again(self) -> int:
        """Let a board that knows nothing have what was put out last; its version, 0 where there is
        none."""
        if self._put_out is None:
            return 0
        self._ask_to_follow()
        return self._put_out[0]

    def _ask_to_follow(self) -> None:
        import ray

        ray.get(self.board.follow.remote([ray.get_runtime_context().current_actor]))
        self._followed = True

    def _await_taken(self, wait_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._taken >= self._serial, wait_s)

    def hand_over(self, taken: int) -> tuple[Parcel, tuple[int, int]]:
        """The board's standing call: it has what was put out as number ``taken``; returns (parcel,
        (number, version)) once there is more. Raises ModelError when another board has asked
        meanwhile."""
        with self._changed:
            self._call += 1
            call, self._taken = self._call, taken
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._serial > taken or self._call != call)
            if self._call != call or self._put_out is None:
                raise ModelError("another weight board took over")
            return self._put_out, (self._serial, self._put_out[0])
