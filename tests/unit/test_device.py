"""A worker that was given a GPU does not continue without one."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from avatar_rl.common.errors import ResourceError
from avatar_rl.common.process import sees_gpu


@pytest.mark.parametrize("given", [[], ["0"]])
def test_a_gpu_that_torch_does_not_see_is_an_error(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given, "TPU": []})
    ray: Any = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if given:
        with pytest.raises(ResourceError, match="EXTRA=gpu"):
            sees_gpu()
    else:
        assert not sees_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sees_gpu()
