"""When a rollout engine takes new weights in: between two steps of the stream, at the least cost.

Taking them in makes the engine prefill everything in flight again. So once the next prompt begins a
step, nothing more is submitted until the rest has ended, but no longer than the places so left idle
cost as much as prefilling that rest: the rule of the ski rental, never worse than twice the best
choice made with the lengths of the completions known."""

from __future__ import annotations


class WeightUpdatePolicy:
    """Weighs idle places against prefill, both in seconds of a full engine; measures the latter as
    it goes."""

    def __init__(self) -> None:
        self.idle_s = 0.0  # places kept free for the weights that wait
        self.prefill_s = 0.0  # of one request, lately
        self._usual_s = 0.0  # a decoding step
        self._prefills = True

    def reached(self, in_flight: int, *, room_for_next_step: bool) -> bool:
        """Weights wait: take them in now? ``in_flight`` requests would be prefilled again."""
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
        """A step with ``requests`` in flight was made, ``idle_share`` of the places kept free for
        new weights."""
        self.idle_s += seconds * idle_share
        if self._prefills:
            self.prefill_s, self._prefills = max(0.0, seconds - self._usual_s) / requests, False
        else:
            self._usual_s = seconds
