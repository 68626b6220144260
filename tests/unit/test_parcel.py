"""Tensors and arrays on their way from a worker to its parent."""

from __future__ import annotations

import os
from multiprocessing import Pipe

import numpy as np
import pytest
import torch

from avatar_rl.prompts.workers import parcel


def memory_files() -> int:
    """Memory files of parcels that this process holds open."""
    names = os.listdir("/proc/self/fd")
    links = (f"/proc/self/fd/{name}" for name in names)
    return sum("memfd:parcel" in os.readlink(link) for link in links if os.path.islink(link))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [0, 3, 1 << 18])
def test_a_parcel_holds_what_was_sent(dtype: torch.dtype, size: int) -> None:
    whole = torch.arange(2 * size).view(size, 2).to(dtype)
    sent = {
        "whole": whole,
        "column": whole[:, 1],  # not contiguous
        "scalar": torch.tensor(3.5),
        "array": np.arange(size, dtype=np.int16),
        "words": ["a", ("b", 2)],
    }
    ours, its = Pipe()
    opened = memory_files()
    parcel.send(its, os.getpid(), sent)
    found = parcel.receive(ours)
    assert memory_files() == opened
    for name in ("whole", "column", "scalar"):
        assert found[name].dtype == sent[name].dtype and torch.equal(found[name], sent[name])  # type: ignore[attr-defined,arg-type]
    assert np.array_equal(found["array"], np.arange(size, dtype=np.int16))
    assert found["words"] == ["a", ("b", 2)]
    found["whole"] += found["whole"]  # writable, and nobody else's
    ours.close()
    its.close()
