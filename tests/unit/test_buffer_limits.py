"""Settings that would hold a run up in silence."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.cluster.config import RunConfig


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": "x.jsonl"}, **sections})


def test_a_warm_up_that_the_capacity_cannot_hold_is_refused() -> None:
    assert BufferConfig(capacity=320, warm_up=128).warm_up == 128
    with pytest.raises(ValidationError, match=r"128 is above the 127 .* warm_up to 127"):
        BufferConfig(capacity=316, warm_up=128)  # an unsolved pool is Hard as a whole
    with pytest.raises(
        ValidationError, match="warm_up 128 is above capacity 127: replay would never start"
    ):
        BufferConfig(capacity=127)


@pytest.mark.parametrize(
    ("rewards", "room", "said"),
    [
        ({"format": 1.0}, 20, r"20 \(evaluation\.pool\.samples\)$"),
        ({"format": 1.0, "fusion": 1.0}, 60, r"60 \(evaluation\.pool\.samples\) \(fusion: "),
    ],
)
def test_a_measurement_of_the_pool_needs_room_in_an_actor(
    rewards: dict[str, float], room: int, said: str
) -> None:
    def measured(sequences: int, every: int) -> RunConfig:
        pool = {"every": every, "samples": 20}
        return config(
            rewards={"weights": rewards},
            rollout={"max_sequences": sequences},
            evaluation={"pool": pool},
        )

    assert (
        measured(room, 5).evaluation.pool.samples
        == measured(room - 1, 0).evaluation.pool.samples
        == 20
    )
    with pytest.raises(ValidationError) as caught:
        measured(room - 1, 5)
    [error] = caught.value.errors()
    assert re.search(said, error["msg"])
