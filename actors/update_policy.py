"""When a rollout engine takes new weights in: between two steps of the stream, at the least cost.

Taking them in makes the engine prefill everything in flight again. So once the next prompt begins a
step, nothing more is submitted until the rest has ended. The wait ends early when the places left
idle have cost as much as prefilling that rest. This is the rule of the ski rental: never worse than
twice the best choice made with the lengths of the completions known.
"""

from __future__ import annotations


class WeightUpdatePolicy:
    """Weighs idle places against prefill, both in seconds of a full engine.

    The engine's thread reports each step (``stepped``), from which the cost of prefill is measured.
    """

    def __init__(self) -> None:
        self.idle_s = 0.0  # places kept free for the weights that wait
        self.prefill_s = 0.0  # of one request, lately
        self._decode_s = 0.0  # the last step that only decoded
        self._prefills = True

    def is_due(self, in_flight: int, *, room_for_next_step: bool) -> bool:
        """Whether to take the waiting weights in now. ``in_flight`` requests would be prefilled
        again."""
        if in_flight == 0:
            return True
        if not room_for_next_step:
            self.idle_s = 0.0
            return False
        return self.idle_s >= self.prefill_s * in_flight

    def prefill_follows(self) -> None:
        """The next step prefills all that is in flight: the engine was empty, or weights have just
        been taken in."""
        self._prefills = True
        self.idle_s = 0.0

    def stepped(self, seconds: float, requests: int, *, idle_share: float) -> None:
        """A step with ``requests`` in flight was made.

        ``idle_share`` of the places was kept free for new weights, 0 to 1.
        """
        self.idle_s += seconds * idle_share
        if self._prefills:
            self.prefill_s, self._prefills = max(0.0, seconds - self._decode_s) / requests, False
        else:
            self._decode_s = seconds
