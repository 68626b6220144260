"""A model folder's processor, and the inputs that transformers' and vLLM's processors take."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypeAlias, TypedDict

import numpy as np

from avatar_rl.common.errors import ModelError
from avatar_rl.prompts.encoding.chat_format import describe
from avatar_rl.prompts.encoding.rope import MULTIMODAL
from avatar_rl.prompts.record import Modality

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig


class PixelBounds(TypedDict):
    """Pixels of one frame or image, whatever the names say."""

    shortest_edge: int
    longest_edge: int


class ImageSettings(TypedDict):
    """transformers' ``images_kwargs``."""

    size: PixelBounds


class VideoMetadata(TypedDict):
    """Fields of transformers' VideoMetadata."""

    total_num_frames: int
    fps: float
    duration: float
    frames_indices: list[int]
    video_backend: str


class EngineVideoMetadata(VideoMetadata):
    """The same for vLLM, which also asks whether to sample frames."""

    do_sample_frames: bool


#: One medium for vLLM: frames, frames with their metadata, samples with their rate, a picture.
EngineMedium: TypeAlias = (
    "np.ndarray | tuple[np.ndarray, EngineVideoMetadata] | tuple[np.ndarray, int] | Image"
)


class VideoSettings(TypedDict, total=False):
    """transformers' ``videos_kwargs``."""

    size: PixelBounds
    do_sample_frames: bool
    cap_pixels_per_frame: bool
    fps: float


class ProcessorSettings(TypedDict, total=False):
    """Settings that mean the same in transformers and in vLLM, JSON-ready."""

    images_kwargs: ImageSettings
    videos_kwargs: VideoSettings
    use_audio_in_video: bool
    second_per_grid_ts: list[float]


class EngineInput(TypedDict, total=False):
    """A prompt for vLLM: one placeholder per medium in its tokens, and the media."""

    prompt_token_ids: Required[list[int]]
    multi_modal_data: dict[Modality, list[EngineMedium]]
    mm_processor_kwargs: ProcessorSettings
    multi_modal_uuids: dict[Modality, list[str]]


def load_processor(model_path: Path) -> tuple[Any, PretrainedConfig]:
    """A folder's processor (a text model's tokenizer) and config. Processors have no common type.

    Raises ModelError when the folder lacks config, tokenizer, chat template or media processor.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    # Decoded media are kept for the next look and are read-only; processors only read them.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    if not (model_path / "config.json").is_file():
        raise ModelError(
            f"model folder {model_path} has no config.json: give a Hugging Face checkpoint folder"
        )
    try:
        config = AutoConfig.from_pretrained(model_path)
    except Exception as error:
        raise ModelError(
            f"{model_path}/config.json cannot be read as a model's "
            f"({describe(error)}): correct it, or copy "
            "it again from the model's source"
        ) from error
    media = config.model_type in MULTIMODAL
    needed = [("tokenizer.json", "vocab.json")]
    needed += [("preprocessor_config.json", "processor_config.json")] if media else []
    for names in needed:
        if not any((model_path / name).is_file() for name in names):
            raise ModelError(
                f"model folder {model_path} ({config.model_type}) has no {' or '.join(names)}: "
                "copy the tokenizer and processor files of the base model into it"
            )
    try:
        processor = (AutoProcessor if media else AutoTokenizer).from_pretrained(model_path)
    except Exception as error:  # its files can be anything
        raise ModelError(
            f"tokenizer or processor in {model_path} cannot be loaded "
            f"({describe(error)}): copy their files again from the model's source"
        ) from error
    if processor.chat_template is None:
        raise ModelError(
            f"model folder {model_path} has no chat template: add chat_template.jinja of the base "
            "model"
        )
    return processor, config
