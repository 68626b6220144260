"""Seconds per temporal patch, as the processor computes them: they place every frame in time
(M-RoPE).

Stock vLLM 0.32 casts all that a processor returns to the model's type. In bfloat16 that moves
frames of most real clips (2.06 s per patch become 2.0625) to other positions than the learner's,
with sound interleaved even into other chunks. It also loads the whole processor anew for each value
of ``second_per_grid_ts`` among its arguments, 4 s for a real vocabulary, though only the prompt's
layout reads it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

KEYS = ("second_per_grid_ts", "video_second_per_grid")
_INSTALLED = "_avatar_rl_seconds"


def install() -> None:
    """Keep the values whole, and the processor."""
    from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerProcessingInfo
    from vllm.multimodal.processing.context import InputProcessingContext

    context: Any = InputProcessingContext
    if hasattr(context, _INSTALLED):
        return
    cast = context._postprocess_output

    def _postprocess_output(self: Any, output: Any) -> Any:
        found = cast(self, output)
        for key in KEYS:
            if isinstance(output, dict) and isinstance(output.get(key), Tensor):
                found[key] = output[key].cpu()
        return found

    info: Any = Qwen2_5OmniThinkerProcessingInfo
    load = info.get_hf_processor

    def get_hf_processor(self: Any, **kwargs: object) -> Any:
        return load(self, **{name: value for name, value in kwargs.items() if name not in KEYS})

    context._postprocess_output = _postprocess_output
    info.get_hf_processor = get_hf_processor
    setattr(context, _INSTALLED, True)
