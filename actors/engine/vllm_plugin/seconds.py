"""Seconds per temporal patch, as the processor computes them: they place every frame in time
(M-RoPE).

Stock vLLM 0.32 casts all that a processor returns to the model's type. In bfloat16 that moves
frames of most real clips (2.06 s per patch become 2.0625) to other positions than the learner's,
with sound interleaved even into other chunks. It also loads the whole processor anew for each value
of ``second_per_grid_ts`` among its arguments. That takes 4 s for a real vocabulary, though only the
prompt's layout reads the value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerProcessingInfo
    from vllm.multimodal.processing.context import InputProcessingContext
    from vllm.utils.jsontree import JSONTree

KEYS = ("second_per_grid_ts", "video_second_per_grid")
_INSTALLED = "_avatar_rl_seconds"


def install() -> None:
    """Keep the values as they are, and the processor."""
    from vllm.model_executor.models import qwen2_5_omni_thinker
    from vllm.multimodal.processing import context

    # Untyped, as their methods change here.
    contexts: Any = context.InputProcessingContext
    infos: Any = qwen2_5_omni_thinker.Qwen2_5OmniThinkerProcessingInfo
    if hasattr(contexts, _INSTALLED):
        return
    cast, load = contexts._postprocess_output, infos.get_hf_processor

    def _postprocess_output(self: InputProcessingContext, output: JSONTree) -> JSONTree:
        found = cast(self, output)
        for key in KEYS:
            if isinstance(output, dict) and isinstance(output.get(key), Tensor):
                found[key] = output[key].cpu()
        return found

    def get_hf_processor(
        self: Qwen2_5OmniThinkerProcessingInfo, **kwargs: object
    ) -> ProcessorMixin:
        return load(self, **{name: value for name, value in kwargs.items() if name not in KEYS})

    contexts._postprocess_output = _postprocess_output
    infos.get_hf_processor = get_hf_processor
    setattr(contexts, _INSTALLED, True)
