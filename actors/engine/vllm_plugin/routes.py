"""Which experts every token of a completion took, for a learner that takes the same ones.

Stock vLLM 0.32 tells them (``enable_return_routed_experts``), but with its second model runner
alone, whose sampler cannot be replaced by ours (launch.py). vLLM's recorder and its hooks in the
routers know nothing of model runners, so they are used here with the first. They refuse by name the
kernels that choose experts by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

#: In vLLM's ``additional_config``: this engine records.
KEY = "avatar_rl_records_experts"
_INSTALLED = "_avatar_rl_routes"
_FIRST = 64  # rows of a completion at first; doubled when they are full

Routes = NDArray[Any]  # (tokens, decoder layers, experts of a token), uint8 or uint16


class RouteRecorder:
    """Experts of the completions that an engine works on, by request. One per worker; a layer
    without experts has zeros."""

    def __init__(self, runner: GPUModelRunner) -> None:
        """Raises ValueError for a model without experts, or whose kernels choose them unseen."""
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            RoutedExpertsCapturer,
            bind_routed_experts_capturer,
        )

        config = runner.vllm_config
        self._recorder = RoutedExpertsCapturer(
            config.scheduler_config.max_num_batched_tokens, config
        )
        bind_routed_experts_capturer(runner.model, self._recorder)
        self._shape = self._recorder.shape_per_token
        self._type = np.dtype(self._recorder.output_dtype_name)
        self._rows: dict[str, Routes] = {}

    def note(self, runner: GPUModelRunner, scheduled: SchedulerOutput) -> None:
        """After the forward of ``scheduled``. What is computed again, after a preemption or with
        new weights, takes the place of what was there."""
        total = scheduled.total_num_scheduled_tokens
        if not total:
            return
        taken = self._recorder.snapshot_routing_data(total).cpu().numpy()
        batch, at = runner.input_batch, 0
        for number, name in enumerate(batch.req_ids):
            count = scheduled.num_scheduled_tokens[name]
            place = int(batch.num_computed_tokens_cpu[number] - batch.num_prompt_tokens[number])
            ahead = max(0, -place)  # of the prompt
            if ahead < count:
                self._put(_outer_id(name), place + ahead, taken[at + ahead : at + count])
            at += count

    def _put(self, name: str, place: int, rows: Routes) -> None:
        end = place + len(rows)
        held = self._rows.get(name)
        if held is None or len(held) < end:
            room = max(_FIRST, 2 * end)
            grown = np.zeros((room, *rows.shape[1:]), rows.dtype)
            if held is not None:
                grown[: len(held)] = held
            held = self._rows[name] = grown
        held[place:end] = rows

    def take(self, counts: Mapping[str, int]) -> dict[str, Routes]:
        """The first so many rows of these completions, which are forgotten here."""
        found = {}
        for name, count in counts.items():
            rows = self._rows.pop(name, None)
            found[name] = np.zeros((0, *self._shape), self._type) if rows is None else rows[:count]
        return {name: rows.copy() for name, rows in found.items()}


def _outer_id(name: str) -> str:
    """The name of a request, or "0_" and so on before it, without the random end that vLLM adds."""
    return name.rpartition("-")[0]


def install() -> None:
    """Let the workers of an engine that asks for it (``KEY``) have a ``RouteRecorder``."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: Any = GPUModelRunner  # its methods change here
    if hasattr(runner, _INSTALLED):
        return
    setattr(runner, _INSTALLED, True)
    prepare, execute = runner.initialize_kv_cache, runner.execute_model

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Before CUDA graphs are captured, which hold the recorder's writes from then on.
        if self.vllm_config.additional_config.get(KEY) and "routes" not in self.__dict__:
            self.routes = RouteRecorder(self)
        return prepare(self, *args, **kwargs)

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = execute(self, scheduler_output, *args, **kwargs)
        if (recorder := self.__dict__.get("routes")) is not None:
            recorder.note(self, scheduler_output)
        return result

    runner.initialize_kv_cache, runner.execute_model = initialize_kv_cache, execute_model
