"""Keeps every request's media in the worker, so that a preempted request can be encoded anew after
a weight update.

When a request is scheduled, vLLM strips the media that the prefix cache covers, as nothing should
need to encode them. But a weight update empties that cache and preempts what runs. Then the
completions whose siblings had filled the cache (n > 1) need their media again. Without them
``embed_multimodal`` returns nothing and the engine dies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


def install() -> None:
    """Let the scheduler send all media on.

    Scheduler and worker share a process or a pipe to the same host, and the tensors are small
    beside the weights.
    """
    from vllm.v1.core.sched import output

    output.strip_covered_mm_data = keep_all


def keep_all(
    mm_features: list[MultiModalFeatureSpec], num_computed_tokens: int, uses_mrope: bool = False
) -> list[MultiModalFeatureSpec]:
    """In place of ``strip_covered_mm_data``: nothing is stripped."""
    return mm_features
