"""LoRA adapters as policy versions in a rollout engine: each request keeps the one it began with.

A new version empties no cache, and nothing is prefilled again: keys and values of different
adapters never mix, since vLLM's prefix cache knows which adapter made them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from avatar_rl.common.adapter import AdapterShape
from avatar_rl.common.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

#: Ranks that vLLM has room for.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Versions that may be generated with at once; the next prompt waits for the oldest to end.
SLOTS = 4


def adapter_arguments(shape: AdapterShape) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs for adapters of ``shape``.

    vLLM makes room in the named layers alone. By default it would in all, routed experts among
    them: by arithmetic 10 GB for Qwen3-30B-A3B at rank 32, of zeros.
    """
    return {
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in RANKS if rank >= shape.rank),
        "max_loras": SLOTS,
        "max_cpu_loras": SLOTS,
        "lora_target_modules": list(shape.layers),
    }


class Adapters:
    """The versions that requests of one engine run with."""

    def __init__(self, engine: LLMEngine, shape: AdapterShape) -> None:
        self._engine, self._shape = engine, shape
        self._versions: dict[str, int] = {}  # of the requests in flight

    def begin(self, request_id: str, version: int) -> LoRARequest | None:
        """The adapter of a request that begins at ``version``; None for the base, version 0."""
        from vllm.lora.request import LoRARequest

        self._versions[request_id] = version
        return LoRARequest(f"v{version}", version, "memory") if version > 0 else None

    def end(self, request_id: str) -> int:
        """The version that a request was generated with; it is forgotten."""
        return self._versions.pop(request_id)

    def take(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand ``version`` to the workers; what no request in flight needs is dropped there.

        Raises ModelError where vLLM has no place for one of its layers.
        """
        tensors = {f"base_model.model.{name}": tensor.clone() for name, tensor in weights}
        settings = {
            "r": self._shape.rank,
            "lora_alpha": self._shape.alpha,
            "use_rslora": self._shape.rslora,
            "target_modules": sorted({name.split(".lora_")[0] for name in tensors}),
        }
        needed = sorted({*self._versions.values(), version})
        try:
            homeless = self._engine.collective_rpc(
                "hold_adapter", args=(version, tensors, settings, needed)
            )
        except Exception as error:
            raise ModelError(
                f"vLLM cannot take the adapter of version {version}: {error}"
            ) from error
        if names := sorted(set(homeless[0])):
            raise ModelError(
                f"vLLM has no place for {len(names)} layers of the adapter, first {names[0]}: set "
                "rollout.lora to merged, or leave them out of learner.lora.targets"
            )
