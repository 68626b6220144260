"""The prompt record: what is asked, with which media, and how the answer is judged
(docs/architecture.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from avatar_rl.common.errors import InputError
from avatar_rl.common.types import JsonObject

Modality = Literal["video", "audio", "image"]


class ProblemType(StrEnum):
    """How an answer is compared with the ground truth (docs/method.md 1.5)."""

    MULTIPLE_CHOICE = "multiple_choice"
    NUMERICAL = "numerical"
    OCR = "ocr"
    FREE_FORM = "free_form"
    REGRESSION = "regression"
    LOCALISATION = "localisation"
    MULTI_LABEL = "multi_label"


#: Spellings found in the published datasets (docs/method.md 1.5), lower-cased, "-", "/" and " "
#: folded to "_".
PROBLEM_TYPE_SPELLINGS: dict[str, ProblemType] = {
    "multiple_choice": ProblemType.MULTIPLE_CHOICE,
    "multi_choice": ProblemType.MULTIPLE_CHOICE,
    "multiplechoice": ProblemType.MULTIPLE_CHOICE,
    "mcq": ProblemType.MULTIPLE_CHOICE,
    "mc": ProblemType.MULTIPLE_CHOICE,
    "numerical": ProblemType.NUMERICAL,
    "numeric": ProblemType.NUMERICAL,
    "number": ProblemType.NUMERICAL,
    "counting": ProblemType.NUMERICAL,
    "ocr": ProblemType.OCR,
    "free_form": ProblemType.FREE_FORM,
    "freeform": ProblemType.FREE_FORM,
    "free_text": ProblemType.FREE_FORM,
    "open": ProblemType.FREE_FORM,
    "open_ended": ProblemType.FREE_FORM,
    "regression": ProblemType.REGRESSION,
    "localisation": ProblemType.LOCALISATION,
    "localization": ProblemType.LOCALISATION,
    "multi_label": ProblemType.MULTI_LABEL,
    "multilabel": ProblemType.MULTI_LABEL,
}


class Strict(BaseModel):
    """Immutable record that rejects unknown keys, and numbers that JSON cannot hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MediaItem(Strict):
    """One media file and how it is decoded. Workers decode; nothing else ever travels."""

    kind: Modality
    uri: str = Field(description="path (absolute, or relative to the dataset file) or file:// URL")
    digest: str | None = Field(
        None, description="sha256 hex of the file; checked on first decode when set"
    )
    clip: tuple[float, float] | None = Field(None, description="window [start, end) in seconds")
    frames: int | None = Field(
        None, ge=1, description="video: frames sampled uniformly over the window"
    )
    fps: float | None = Field(
        None,
        gt=0,
        description="video: sample at this rate instead of a frame count",
    )
    min_pixels: int | None = Field(None, ge=1, description="video/image: lower bound per frame")
    max_pixels: int | None = Field(None, ge=1, description="video/image: upper bound per frame")
    sample_rate: int = Field(
        16_000, ge=1_000, le=768_000, description="audio: Hz after resampling, mono"
    )

    @model_validator(mode="after")
    def _check(self) -> MediaItem:
        if self.clip is not None and not 0 <= self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {self.clip} of {self.uri}: needs 0 <= start < end (seconds)")
        return self


class MediaPlan(Strict):
    """All media of a prompt, in the order of their placeholders."""

    items: tuple[MediaItem, ...] = ()
    in_text: bool = Field(
        False, description="<video>, <audio> and <image> in the question are their places"
    )
    audio_in_video: bool = Field(
        False,
        description="interleave each video's audio with its frames (Qwen-Omni use_audio_in_video)",
    )

    def of(self, kind: Modality) -> tuple[MediaItem, ...]:
        return tuple(item for item in self.items if item.kind == kind)

    @model_validator(mode="after")
    def _check(self) -> MediaPlan:
        if self.audio_in_video and len(self.of("video")) != len(self.of("audio")):
            raise ValueError("audio_in_video needs exactly one audio item per video item")
        return self


class Prompt(Strict):
    """One question about media, with the ground truth its completions are judged by."""

    id: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1, description="ground truth, as the answer tag should hold it")
    problem_type: ProblemType
    options: tuple[str, ...] = Field((), description="multiple choice: 'A. red', 'B. green', ...")
    media: MediaPlan = MediaPlan()
    system: str | None = None
    reasoning: str | None = Field(
        None, description="SFT target inside <think>; cold start only (Stage 0)"
    )
    hint: str | None = Field(
        None, description="one strategic sentence, never the answer (docs/method.md 1.4)"
    )
    caption: str | None = Field(None, description="what is seen and heard; for judges")
    audio_caption: str | None = Field(
        None, description="what is heard, as text cue (docs/method.md 1.6)"
    )
    category: str = Field("", description="question type for per-type evaluation")
    needs: tuple[Modality, ...] = Field(
        (), description="modalities without which it cannot be answered"
    )
    extra: dict[str, JsonValue] = Field(
        default_factory=dict, description="anything a dataset wants to carry along"
    )

    def label(self) -> JsonObject:
        """What a row about one of its completions says of the prompt; JSON-ready."""
        return {
            "prompt_id": self.id,
            "category": self.category,
            "needs": list(self.needs),
            "type": self.problem_type.value,
            "question": self.question,
            "answer": self.answer,
            "options": list(self.options),
            "media": [item.model_dump(exclude_defaults=True) for item in self.media.items],
            **({"hint": self.hint} if self.hint else {}),
        }


_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")


def resolve_uri(uri: str, base: Path) -> Path:
    """Local path of a media URI; relative ones are relative to ``base`` (the dataset's folder).

    Raises InputError for remote schemes, which are never fetched.
    """
    scheme = _SCHEME.match(uri)
    if scheme is not None and scheme[1].lower() != "file":
        raise InputError(
            uri,
            "media are opened by path only",
            "download them first, or mount the bucket and use the mounted path",
        )
    if "\0" in uri:
        raise InputError(repr(uri), "the path holds a NUL character", "correct the media path")
    path = Path(uri if scheme is None else unquote(uri[scheme.end() :]))
    return path if path.is_absolute() else base / path


def check_roots(path: Path, roots: Sequence[Path]) -> None:
    """Raises InputError for a file outside all of ``roots``, links followed; without roots any file
    will do."""
    if not roots:
        return
    real = path.resolve()
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise InputError(
            path,
            f"lies outside data.media.roots ({', '.join(map(str, roots))})"
            + (f" as {real}" if real != path.absolute() else ""),
            "move the file there, correct the row, or add its folder to data.media.roots",
        )
