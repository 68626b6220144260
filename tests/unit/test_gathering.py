"""When an engine waits for prompts that are being prepared, before it steps."""

from __future__ import annotations

from avatar_rl.actors.gathering import GATHER_S, GatherPolicy


def simulated(*, gathers: bool, tokens: int, step_s: float, prepare_s: float) -> tuple[float, int]:
    """256 requests come one after the other to an engine of 64 places: seconds until all are
    answered, and the engine's steps."""
    policy, now, came, steps = GatherPolicy(64), 0.0, 0, 0
    flight: list[int] = []  # tokens left of each
    while came < 256 or flight:
        while came < min(256, int(now / prepare_s)):
            came += 1
            flight.append(tokens)
        waits = gathers and policy.waits(len(flight), came < 256, now)
        if flight and not waits:
            flight = [left - (at < 64) for at, left in enumerate(flight)]
            flight = [left for left in flight if left]
            now, steps = now + step_s, steps + 1
        else:
            now += 0.001
    return now, steps


def test_short_answers_are_made_in_large_loads() -> None:
    took, steps = simulated(gathers=True, tokens=10, step_s=0.004, prepare_s=0.006)
    at_once, many = simulated(gathers=False, tokens=10, step_s=0.004, prepare_s=0.006)
    assert steps < many / 4
    assert took < at_once + 0.05  # the preparing decides: only the last load comes later


def test_long_answers_wait_for_the_first_load_alone() -> None:
    took, _ = simulated(gathers=True, tokens=2000, step_s=0.03, prepare_s=0.3)
    at_once, _ = simulated(gathers=False, tokens=2000, step_s=0.03, prepare_s=0.3)
    assert took < at_once + GATHER_S + 0.1


def test_a_full_engine_steps_and_so_does_one_that_nothing_comes_to() -> None:
    policy = GatherPolicy(4)
    assert policy.waits(0, True, 0.0) and policy.waits(1, True, 0.1)
    assert not policy.waits(1, False, 0.1)  # nothing more comes
    assert not policy.waits(1, True, 0.2)  # more than half of that one is there
    assert policy.waits(0, True, 0.3) and not policy.waits(4, True, 0.4)
    assert not policy.waits(3, True, 0.5) and policy.waits(2, True, 0.6)
    assert not policy.waits(2, True, 0.6 + GATHER_S)
