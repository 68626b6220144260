"""Fused experts: packed again after a weight update, and without room for adapters.

vLLM's CPU build keeps the experts of a layer in a packed layout. Stock vLLM 0.32 packs them on the
first load only. An update then puts plain tensors into the packed storage, and the model is
silently wrong by nats; or, where the experts' width is no multiple of 32, the update fails on its
shape half-way. On a GPU there is no such step.

With adapters anywhere in a model, stock vLLM computes its experts by the kernel that could take
one, Triton's: a CPU has none, and on a GPU there are faster ones. Routed experts never get an
adapter here (learner/adapter/targets.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

_INSTALLED = "_avatar_rl_experts"


def install() -> None:
    """Pack after every load; the kernel of a model without adapters."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.platforms import current_platform

    method: Any = module.UnquantizedFusedMoEMethod  # its methods change here
    if hasattr(method, _INSTALLED):
        return
    setattr(method, _INSTALLED, True)
    config: Any = FusedMoEConfig
    made = config.__post_init__

    def __post_init__(self: FusedMoEConfig) -> None:
        self.is_lora_enabled = False
        made(self)

    config.__post_init__ = __post_init__
    if not current_platform.is_cpu():
        return
    stock = method._setup_kernel

    def _setup_kernel(self: UnquantizedFusedMoEMethod, layer: Any, w13: Tensor, w2: Tensor) -> None:
        update = self.moe_kernel is not None
        stock(self, layer, w13, w2)
        if update and self.moe_kernel is not None:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    method._setup_kernel = _setup_kernel
