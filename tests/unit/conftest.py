"""What files of unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni


@pytest.fixture(scope="session")
def tiny_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Omni of the demo; not to be changed."""
    return build_tiny_omni(tmp_path_factory.mktemp("tiny") / "model")
