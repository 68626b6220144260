"""The rule by which an engine waits for the end of what is in flight, or takes new weights in under
it."""

from __future__ import annotations

import pytest

from avatar_rl.actors.update_policy import WeightUpdatePolicy


@pytest.fixture
def update_policy() -> WeightUpdatePolicy:
    """A decoding step takes 10 ms; prefilling four requests took 90 ms once."""
    update_policy = WeightUpdatePolicy()
    update_policy.stepped(0.5, 4, idle_share=0.0)  # the very first step: nothing to compare it with
    update_policy.stepped(0.01, 4, idle_share=0.0)
    update_policy.prefill_follows()
    update_policy.stepped(0.09, 4, idle_share=0.0)
    return update_policy


def test_an_empty_engine_takes_weights_at_once(update_policy: WeightUpdatePolicy) -> None:
    assert update_policy.is_due(0, room_for_next_step=False)


def test_it_waits_as_long_as_idle_places_cost_less_than_prefilling_again(
    update_policy: WeightUpdatePolicy,
) -> None:
    assert update_policy.prefill_s == pytest.approx(0.02)  # (90 - 10) / 4 ms
    waited = 0
    while not update_policy.is_due(2, room_for_next_step=True):  # 2 requests: 40 ms of prefill
        update_policy.stepped(0.01, 2, idle_share=0.5)
        waited += 1
    assert waited == 8  # 8 steps of 10 ms with half the places idle


def test_without_room_for_the_next_step_nothing_is_idle_for_its_sake(
    update_policy: WeightUpdatePolicy,
) -> None:
    update_policy.stepped(10.0, 2, idle_share=0.5)
    assert not update_policy.is_due(2, room_for_next_step=False)
    assert not update_policy.is_due(
        2, room_for_next_step=True
    )  # the count starts when there is room


def test_a_prefill_is_measured_anew_after_each_adoption(update_policy: WeightUpdatePolicy) -> None:
    update_policy.prefill_follows()
    update_policy.stepped(0.05, 8, idle_share=0.0)
    assert update_policy.prefill_s == pytest.approx(0.005)
    update_policy.stepped(0.02, 8, idle_share=0.0)  # a decoding step leaves it alone
    assert update_policy.prefill_s == pytest.approx(0.005)
