"""Keeps every request's media in the worker, so that a preempted request can be encoded anew after
a weight update.

vLLM strips media that the prefix cache covers when a request is scheduled: nothing will ever encode
them. A weight update empties that cache and preempts what runs, and then the completions whose
siblings had filled the cache (n > 1) need their media again; without them ``embed_multimodal``
returns nothing and the engine dies."""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Scheduler and worker share a process or a pipe to the same host; the tensors are small beside
    the weights."""
    from vllm.v1.core.sched import output

    output.strip_covered_mm_data = _keep


def _keep(mm_features: Any, *_: Any, **__: Any) -> Any:
    return mm_features
