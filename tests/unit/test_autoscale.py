"""The autoscaling policy: patience, hysteresis, bounds."""

from __future__ import annotations

import pytest

from avatar_rl.cluster.config import RolloutSection
from avatar_rl.cluster.workers.rollout_fleet import COOLDOWN, PATIENCE, Autoscaler


def feed(
    policy: Autoscaler, workers: int, steps: int, *, learner: float, rollouts: float
) -> list[int]:
    """Sizes after each of ``steps`` equal steps of 10 s, given the shares that each side waits."""
    sizes = []
    for _ in range(steps):
        workers = policy.observe(
            workers, learner_wait=10 * learner, rollout_wait=10 * rollouts, step=10.0
        )
        sizes.append(workers)
    return sizes


def test_it_grows_by_one_once_the_learner_has_waited_for_some_steps_and_then_rests() -> None:
    sizes = feed(Autoscaler(1, 4), 1, 2 * PATIENCE + COOLDOWN, learner=0.5, rollouts=0.0)
    assert sizes[: PATIENCE - 1] == [1] * (PATIENCE - 1)
    assert sizes[PATIENCE - 1 :] == [2] * (PATIENCE + COOLDOWN) + [3]


def test_it_shrinks_while_rollouts_wait() -> None:
    assert feed(Autoscaler(1, 4), 3, PATIENCE, learner=0.0, rollouts=0.8)[-1] == 2


@pytest.mark.parametrize(("learner", "rollouts"), [(0.2, 0.2), (0.5, 0.5), (0.0, 0.4), (0.0, 0.0)])
def test_a_pool_that_fits_is_left_alone(learner: float, rollouts: float) -> None:
    assert set(feed(Autoscaler(1, 4), 2, 20, learner=learner, rollouts=rollouts)) == {2}


def test_one_odd_step_starts_the_count_anew() -> None:
    policy = Autoscaler(1, 4)
    feed(policy, 1, PATIENCE - 1, learner=0.5, rollouts=0.0)
    feed(policy, 1, 1, learner=0.0, rollouts=0.8)
    assert feed(policy, 1, PATIENCE - 1, learner=0.5, rollouts=0.0)[-1] == 1


def test_it_stays_within_its_bounds() -> None:
    assert feed(Autoscaler(1, 2), 2, 20, learner=0.9, rollouts=0.0)[-1] == 2
    assert feed(Autoscaler(2, 4), 2, 20, learner=0.0, rollouts=0.9)[-1] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 4, "max_workers": 3}, "workers 4 is outside"),
        ({"workers": 1, "min_workers": 2}, "workers 1 is outside"),
        ({"autoscale": True}, "autoscale needs max_workers"),
    ],
)
def test_impossible_pools_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutSection.model_validate(settings)
