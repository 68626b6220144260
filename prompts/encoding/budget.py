"""The most tokens that all videos of a prompt take together (``data.template.total_video_tokens``).

Every frame of a prompt gets an equal share, which bounds its pixels. Rollouts and learner pass the
same bounds to their processors, and so have equal tokens and positions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from avatar_rl.common.errors import DataError
from avatar_rl.prompts.encoding.processor import PixelBounds


class FrameGrain(NamedTuple):
    """What one token of a video covers."""

    frames: int
    side: int  # pixels

    @classmethod
    def of(cls, video_processor: Any) -> FrameGrain:
        side = video_processor.patch_size * video_processor.merge_size
        return cls(video_processor.temporal_patch_size, side)

    @property
    def pixels(self) -> int:
        return self.side**2

    def steps(self, frames: int) -> int:
        """Temporal steps of a video."""
        return -(-frames // self.frames)


class VideoShape(NamedTuple):
    """Of the decoded frames."""

    frames: int
    height: int
    width: int


def frame_bounds(
    bounds: PixelBounds, videos: Sequence[VideoShape], grain: FrameGrain, total: int
) -> PixelBounds:
    """``bounds`` of one frame, lowered so that ``videos`` have at most ``total`` tokens.

    Raises DataError when not even one token a step is left.
    """
    steps = sum(grain.steps(video.frames) for video in videos)
    share = total // steps
    if share < 1:
        raise DataError(_too_many(steps, total))
    high = min(bounds["longest_edge"], share * grain.pixels)
    low = min(bounds["shortest_edge"], high)
    for video in videos:
        if _frame_tokens(video, grain, low, high) > share:
            low = min(low, grain.pixels)  # small frames would be enlarged beyond the share
    return {"shortest_edge": low, "longest_edge": high}


def video_bounds(
    bounds: PixelBounds, videos: Sequence[VideoShape], grain: FrameGrain, total: int
) -> PixelBounds:
    """The same of whole videos, ``bounds`` too: Qwen3-VL's processor bounds these.

    One setting serves all videos of a prompt, so each gets an equal share. Raises DataError when
    not even one token a step is left."""
    share = total // len(videos)
    longest = max(grain.steps(video.frames) for video in videos)
    if share < longest:
        raise DataError(_too_many(longest * len(videos), total))
    high = min(bounds["longest_edge"], share * grain.frames * grain.pixels)
    low = min(bounds["shortest_edge"], high)
    for video in videos:
        if _video_tokens(video, grain, low, high) > share:
            low = min(low, grain.frames * grain.pixels)
    return {"shortest_edge": low, "longest_edge": high}


def _too_many(steps: int, total: int) -> str:
    return (
        f"its videos have {steps} temporal steps, and data.template.total_video_tokens leaves "
        f"{total} tokens for them: lower data.media.max_frames or its frames, or raise the total"
    )


def _frame_tokens(video: VideoShape, grain: FrameGrain, low: int, high: int) -> int:
    """Tokens of a step as the processor will size it; 0 where it will refuse the proportions."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

    with suppress(ValueError):
        height, width = smart_resize(
            video.height, video.width, factor=grain.side, min_pixels=low, max_pixels=high
        )
        return height * width // grain.pixels
    return 0


def _video_tokens(video: VideoShape, grain: FrameGrain, low: int, high: int) -> int:
    """Of all its steps, likewise."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    with suppress(ValueError):
        height, width = smart_resize(
            video.frames,
            video.height,
            video.width,
            temporal_factor=grain.frames,
            factor=grain.side,
            min_pixels=low,
            max_pixels=high,
        )
        return grain.steps(video.frames) * height * width // grain.pixels
    return 0
