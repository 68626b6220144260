"""What the threads of a rollout actor share: leases that come back, totals, the first failure."""

from __future__ import annotations

import pytest

from avatar_rl.actors.shared_state import SharedState
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest


def lease(seq: int, attempt: int = 1) -> RequestLease:
    request = RolloutRequest(seq=seq, prompt_id="p", step=0, n=2)
    return RequestLease(request=request, attempt=attempt, consumer="a", hinted=False)


def test_an_own_lease_that_comes_back_is_noted_and_its_group_not_begun_again() -> None:
    state = SharedState()
    assert state.hold([lease(0), lease(1)]) == [lease(0), lease(1)]
    assert state.hold([lease(1, attempt=2), lease(2)]) == [lease(2)]
    assert list(state.held.values()) == [lease(0), lease(1, attempt=2), lease(2)]
    assert state.take_back(lease(1)) == lease(1, attempt=2)
    assert lease(1).request.key not in state.held


def test_a_settled_group_that_is_leased_again_is_begun_again() -> None:
    state = SharedState()
    state.hold([lease(0)])
    state.settle(lease(0).request.key, 7)
    assert state.held == {}
    assert state.hold([lease(0, attempt=2)]) == [lease(0, attempt=2)]
    state.settle(lease(0).request.key, None)
    assert (state.totals.groups, state.totals.tokens) == (1, 7)  # what was given up does not count


def test_the_first_failure_ends_all_loops_and_wakes_the_feeder() -> None:
    def broken(message: str) -> None:
        raise ValueError(message)

    state = SharedState()
    assert state.running
    state.guard(lambda: broken("first"))
    state.guard(lambda: broken("second"))
    assert not state.running and state.wake.is_set()
    with pytest.raises(ValueError, match="first"):
        raise state.failure or AssertionError


def test_clearing_returns_what_is_still_leased() -> None:
    state = SharedState()
    state.hold([lease(0), lease(1)])
    assert state.clear() == [lease(0), lease(1)]
    assert state.held == {} and state.clear() == []
