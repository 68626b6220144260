"""CPU threads of a learner rank."""

import os

import pytest
from pydantic import ValidationError

from avatar_rl.cluster.services.services import CPU_ENVIRONMENT
from avatar_rl.learner.config import MOST_THREADS, LearnerConfig


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 1), (2, 4, 1), (8, 2, 4), (64, 1, MOST_THREADS), (None, 1, 1)],
)
def test_ranks_share_the_cores(
    cores: int | None, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert LearnerConfig().threads_of(ranks) == threads


def test_a_recipe_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert LearnerConfig(threads=8).threads_of(2) == 8
    with pytest.raises(ValidationError, match="threads"):
        LearnerConfig(threads=0)


def test_threads_that_wait_leave_their_core_to_others() -> None:
    assert CPU_ENVIRONMENT["OMP_WAIT_POLICY"] == "PASSIVE"
