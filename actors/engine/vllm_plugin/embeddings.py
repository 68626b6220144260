"""A connector of vLLM's encoder cache that takes embeddings from ``StoredMedia``.

vLLM made this seam for engines that encode on other machines (vllm/distributed/ec_transfer). Its
scheduler asks ``has_cache_item`` before a medium's tower is scheduled. What is there goes into the
worker's encoder cache instead. Tokens, positions and hashes stay those of the ordinary road, for
every model whose tower vLLM runs by that cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class Offer(Protocol):
    """What a connector takes from: ``StoredMedia``."""

    taken: int

    def get(self, known: str) -> Tensor | None: ...


_offered: Offer | None = None


def connector_arguments(stored: Offer | None) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs for an engine that takes from ``stored``: the only
    engine of this process."""
    global _offered
    _offered = stored
    if stored is None:
        return {}
    from vllm.config import ECTransferConfig

    config = ECTransferConfig(
        ec_connector=StoredMediaConnector.__name__,
        ec_connector_module_path=__name__,
        ec_role="ec_consumer",
    )
    return {"ec_transfer_config": config}


def withdraw() -> None:
    """The engine ends: the next one of this process may have no connector, or another."""
    from vllm.distributed.ec_transfer.ec_transfer_state import ensure_ec_transfer_shutdown

    global _offered
    _offered = None
    ensure_ec_transfer_shutdown()


@dataclass
class Loads(ECConnectorMetadata):
    """Of one step, from the scheduler to the workers. The tensors themselves: an entry of the store
    may be evicted in between, and by then no tower is scheduled any more."""

    embeddings: dict[str, Tensor] = field(default_factory=dict)  # (N, (1 + D) H) by hash


class StoredMediaConnector(ECConnectorBase):
    """Both ends: the scheduler's finds embeddings, the workers' puts them into the cache."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        # By now it is a type: vLLM's config resolves words like "auto".
        self._dtype = cast("torch.dtype", vllm_config.model_config.dtype)
        self._device = vllm_config.device_config.device
        self._found: dict[str, Tensor] = {}  # in the step that is being scheduled
        self._loads = Loads()

    # -- the scheduler's ---------------------------------------------------------------------------

    def has_cache_item(self, identifier: str) -> bool:
        found = _offered.get(identifier) if _offered is not None else None
        if found is not None:
            self._found[identifier] = found
        return found is not None

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """The request is part of the step; so is its medium ``index``, if it was found."""
        identifier = request.mm_features[index].identifier
        if identifier in self._found:
            self._loads.embeddings[identifier] = self._found[identifier]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Loads:
        loads, self._loads, self._found = self._loads, Loads(), {}
        if _offered is not None:
            _offered.taken += len(loads.embeddings)
        return loads

    # -- the workers' ------------------------------------------------------------------------------

    def start_load_caches(self, encoder_cache: dict[str, Tensor], **kwargs: Any) -> None:
        loads = self._get_connector_metadata()
        assert isinstance(loads, Loads)
        for identifier, embeddings in loads.embeddings.items():
            encoder_cache[identifier] = embeddings.to(self._device, self._dtype)

    def save_caches(self, encoder_cache: dict[str, Tensor], mm_hash: str, **kwargs: Any) -> None:
        """What towers give is not kept: the learner's workers fill the store."""
