"""Config sections of the prompts floor: how media are decoded and cached, how datasets are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from avatar_rl.common.config import Section, expanded
from avatar_rl.prompts.record import Modality, ProblemType

DatasetFormat = Literal["auto", "native", "conversational", "swift", "verl"]


class MediaConfig(Section):
    """Decoding limits and caches of one worker process."""

    fps: float = Field(
        2.0, gt=0, description="Frames per second of videos that name neither frames nor fps."
    )
    max_frames: int = Field(
        64, ge=2, description="Most frames of one video; a longer one is sampled more thinly."
    )
    max_pixels: int = Field(
        602_112,
        ge=784,
        description="Largest frame or image that is kept, in pixels, where the item sets no bound.",
    )
    window_slack: float = Field(
        0.5,
        ge=0,
        description="Seconds by which a clip window may run past the end before that is an error.",
    )
    threads: int = Field(1, ge=1, description="Codec threads of one decode.")
    blank: tuple[Modality, ...] = Field(
        (),
        description="Kinds replaced by silence or black, placeholders kept: what a model does "
        "without them.",
    )
    missing_sound: Literal["refuse", "silence"] = Field(
        "refuse",
        description="A video without a sound track whose sound is asked for: its prompt is set "
        "aside, or hears silence of the clip's length.",
    )
    roots: tuple[Path, ...] = Field(
        (),
        description="Folders that media must lie in, links followed; empty: a row may name any "
        "file that the run can read (docs/security.md).",
    )
    memory_cache_bytes: int = Field(
        256 << 20, ge=0, description="Decoded media kept in this process, in bytes."
    )
    disk_cache: Path | None = Field(
        None,
        description="Node-local folder for decoded media shared by this machine's processes; null "
        "turns it off.",
    )
    disk_cache_bytes: int = Field(
        8 << 30, ge=0, description="Upper bound of that folder, in bytes."
    )

    @field_validator("roots")
    @classmethod
    def _absolute(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        """Workers start in other folders."""
        return tuple(Path(expanded(root)).absolute() for root in roots)


class DataConfig(Section):
    """How a dataset becomes prompts. Decode settings fill in only what a row leaves open."""

    format: DatasetFormat = Field("auto", description="Row layout; 'auto' looks at the first row.")
    split: str = Field("train", description="Split to read of a saved `datasets` DatasetDict.")
    problem_type: ProblemType | None = Field(
        None, description="Problem type of rows that name none."
    )
    system: str | None = Field(None, description="System prompt of rows that bring none.")
    limit: int | None = Field(
        None, ge=1, description="Read at most this many rows; null reads all."
    )
    media_root: Path | None = Field(
        None,
        description="Folder that relative media paths start from; null means the dataset's own "
        "folder.",
    )
    extract_to: Path | None = Field(
        None,
        description="Folder for media embedded in parquet rows as bytes; null refuses such rows.",
    )
    ignore_columns: tuple[str, ...] = Field(
        (), description="Columns that are left out, also where they seem to name media."
    )
    audio_in_video: bool = Field(
        False,
        description="Also take the sound track of every video, interleaved with its frames "
        "(Qwen-Omni).",
    )
    frames: int | None = Field(
        None, ge=1, description="Frames per video, sampled uniformly over the clip."
    )
    fps: float | None = Field(
        None, gt=0, description="Frames per second of a video, instead of a frame count."
    )
    min_pixels: int | None = Field(
        None, ge=1, description="Lower bound of pixels per frame or image."
    )
    max_pixels: int | None = Field(
        None, ge=1, description="Upper bound of pixels per frame or image."
    )
    image_max_pixels: int | None = Field(
        None, ge=1, description="The same for images, where theirs differs."
    )
    sample_rate: int = Field(
        16_000, ge=1_000, description="Audio sample rate after resampling, in Hz, mono."
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.frames is not None and self.fps is not None:
            raise ValueError("set frames or fps, not both")
        return self


class TemplateConfig(Section):
    """How a prompt is put into words and how large its frames are."""

    system: str | None = Field(
        None, description="System turn of prompts that bring none; null leaves it out."
    )
    instruction: str = Field(
        "", description="Format instruction appended to every user turn; empty for none."
    )
    hint_prefix: str = Field(
        "Hint: ", description="Words before the hint, which ends the user turn when it is on."
    )
    audio_caption_prefix: str | None = Field(
        None,
        description="Words before the audio caption as text cue (docs/method.md 1.6); null leaves "
        "it out.",
    )
    min_pixels: int = Field(
        128 * 28 * 28,
        ge=1,
        description="Lower bound of pixels per frame or image where the prompt sets none.",
    )
    max_pixels: int = Field(
        768 * 28 * 28,
        ge=1,
        description="Upper bound of pixels per frame or image where the prompt sets none.",
    )
    total_video_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens that all videos of one prompt take together: their frames are "
        "scaled down to it, below min_pixels too. null: no such bound, and a prompt that is too "
        "long is set aside.",
    )
    max_prompt_tokens: int = Field(
        14_336, ge=1, description="Longest accepted prompt, media tokens included."
    )
    cache_bytes: int = Field(
        1 << 30, ge=0, description="Encoded prompts kept by this process, in bytes; 0 keeps none."
    )

    @model_validator(mode="after")
    def _check(self) -> TemplateConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if (
            self.total_video_tokens is not None
            and self.total_video_tokens >= self.max_prompt_tokens
        ):
            raise ValueError(
                f"total_video_tokens {self.total_video_tokens} leaves no room for text and sound "
                f"in max_prompt_tokens {self.max_prompt_tokens}: lower it (sound takes 25 tokens a "
                "second)"
            )
        return self
