"""The modality-attentive reward of OmniVideo-R1 (docs/method.md 2.2)."""

from __future__ import annotations

#: What a completion earns for answering at least as well as both of its unimodal counterparts.
ATTENTION_BONUS = 0.3


def attention_score(both: float, video: float, audio: float, *, strict: bool) -> float:
    """r_attn: 0.3 if the audio-visual answer score is at least both unimodal ones (``strict``:
    exceeds), else 0."""
    best = max(video, audio)
    return ATTENTION_BONUS if (both > best if strict else both >= best) else 0.0
