"""Files of a checkpoint are data: opening one runs nothing of it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.state import load_weights


class Evil:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_a_pickle_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2), "more": Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match=r"evil\.pt holds more than weights and counters"):
        load_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # it does what it threatens
    assert (tmp_path / "owned").exists()


def test_what_a_learner_writes_is_read_back(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    state = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "scaler": LossScaler(2.0),
        "stage": ZeroStageEnum.gradients,
    }
    torch.save(state, tmp_path / "state.pt")
    found = load_weights(tmp_path / "state.pt")
    assert torch.equal(found["torch"], state["torch"]) and found["python"] == state["python"]
    assert np.array_equal(found["numpy"][1], state["numpy"][1])
    assert (found["scaler"].cur_scale, found["stage"]) == (2.0, ZeroStageEnum.gradients)
