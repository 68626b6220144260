"""What one generated completion is, and the group it was generated in (docs/architecture.md,
docs/method.md 1.3)."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """One scored completion. T = completion tokens, end-of-turn token included."""

    id: str  # f"{group_id}.{index}"
    group_id: str
    prompt_id: str
    index: int  # position in the group, 0..G-1
    hinted: bool  # the hint was in context: train with it in context (docs/method.md 1.4)
    prompt_tokens: int  # expanded prompt length the behaviour policy saw
    prompt_digest: int  # crc32 of the expanded prompt token ids (int32, little endian)
    token_ids: NDArray[np.int32]  # (T,)
    logprobs: NDArray[np.float32]  # (T,) behaviour log-probability of each token, at `temperature`
    versions: tuple[tuple[int, int], ...]  # ((policy version, tokens generated with it), ...)
    finish_reason: str  # "stop" | "length"
    temperature: float
    reward: float  # weighted over the unmasked components
    components: dict[str, float | None]  # None = masked, never 0 (docs/method.md 1.5)
    step: int  # learner step this group was generated for
    #: What components are made of, such as a judge's criteria ("judge/visual_id_score").
    details: dict[str, float] = {}
    #: (T - 1, decoder layers, k), the experts that each token but the last took in the engine, in
    #: no order; None where nobody recorded them. uint8, above 256 experts uint16.
    experts: NDArray[np.uint8] | NDArray[np.uint16] | None = None

    @property
    def version(self) -> int:
        """Oldest policy version that generated a token of it."""
        return self.versions[0][0]


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The fresh completions of one prompt, scored together."""

    id: str
    prompt_id: str
    seq: int  # position in the prompt stream; orders groups deterministically
    step: int  # learner step it was admitted for
    hinted: bool
    trajectories: tuple[Trajectory, ...]
    #: Indexes of trajectories whose reward rests on a mean in place of a masked mark. They count
    #: for no statistic of the prompt (docs/method.md 1.5).
    imputed: tuple[int, ...] = ()
