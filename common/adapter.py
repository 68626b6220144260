"""The settings of a LoRA adapter that decide what its tensors mean, as learner and rollouts share
them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterShape:
    """A rank and a scale: alpha / rank, or with ``rslora`` alpha / sqrt(rank). ``layers``: the last
    words of the names of the layers that have one, such as q_proj."""

    rank: int
    alpha: float
    rslora: bool
    layers: tuple[str, ...]
