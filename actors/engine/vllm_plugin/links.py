"""The workers' ends of the links by which versions come: gloo's is ours, NCCL's and CUDA IPC's are
vLLM's weight transfer engines, loading into host memory instead of the running model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec
import torch

from avatar_rl.buffer_service.weights.ipc_handles import from_plain
from avatar_rl.buffer_service.weights.links import GlooMember, MemberLink
from avatar_rl.buffer_service.weights.staging import Staging
from avatar_rl.buffer_service.weights.store import Manifest
from avatar_rl.buffer_service.weights.transfer_client import RECEIVE_S

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def open_link(transport: str, runner: GPUModelRunner) -> tuple[Staging, MemberLink]:
    """A worker's memory for versions, and its end of the link "gloo", "nccl" or "ipc"."""
    if transport == "gloo":
        staging = Staging()
        return staging, GlooMember(staging)
    staging = Staging(pinned=True)
    kind = NcclMember if transport == "nccl" else IpcMember
    return staging, kind(staging, runner)


class NcclMember:
    """vLLM's ``NCCLWeightTransferEngine``, which loads what it receives into ``staging``.

    Not yet run on a GPU."""

    def __init__(self, staging: Staging, runner: GPUModelRunner) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.staging, self.device = staging, runner.device
        config: VllmConfig = runner.vllm_config
        self._engine = NCCLWeightTransferEngine(
            WeightTransferConfig(backend="nccl"),
            config,
            runner.device,
            cast("torch.nn.Module", staging),  # of a model it calls ``load_weights`` alone
        )
        parallel = config.parallel_config
        self._own = parallel.data_parallel_index * parallel.world_size + parallel.rank

    def meet(self, how: bytes, rank: int) -> None:
        """As ``MemberLink.meet``."""
        info = msgspec.msgpack.decode(how, type=dict[str, Any])
        # vLLM counts ranks within one engine and adds the offset; the sender numbers all workers.
        info["rank_offset"] = rank - self._own
        with torch.accelerator.device_index(self.device.index):
            self._engine.init_transfer_engine(self._engine.parse_init_info(info))

    def receive(self, what: bytes, piece: int) -> list[int]:
        """As ``MemberLink.receive``. NCCL itself checks what it carries: no checksums."""
        info = msgspec.msgpack.decode(what, type=dict[str, Any])
        self.staging.expect(_manifest(info), piece)

        def receive() -> None:
            self._engine.receive_weights(self._engine.parse_update_info(info))

        _on_device(self.device, receive, self.shutdown)
        return []

    def shutdown(self) -> None:
        """As ``MemberLink.shutdown``: aborts the communicator."""
        self._engine.shutdown()


class IpcMember:
    """vLLM's ``IPCWeightTransferEngine`` on the GPU that it shares with a learner rank.

    Not yet run on a GPU."""

    def __init__(self, staging: Staging, runner: GPUModelRunner) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

        self.staging, self.device = staging, runner.device
        self._engine = IPCWeightTransferEngine(
            WeightTransferConfig(backend="ipc"),
            runner.vllm_config,
            runner.device,
            cast("torch.nn.Module", staging),
        )

    def meet(self, how: bytes, rank: int) -> None:
        """As ``MemberLink.meet``; there is nobody to meet."""
        info = msgspec.msgpack.decode(how, type=dict[str, Any])
        self._engine.init_transfer_engine(self._engine.parse_init_info(info))

    def receive(self, what: bytes, piece: int) -> list[int]:
        """As ``MemberLink.receive``."""
        info = msgspec.msgpack.decode(what, type=dict[str, Any])
        self.staging.expect(_manifest(info), piece)
        info["ipc_handles"] = from_plain(info["ipc_handles"])

        def receive() -> None:
            self._engine.receive_weights(self._engine.parse_update_info(info))
            torch.accelerator.synchronize()

        _on_device(self.device, receive, lambda: None)
        return []

    def shutdown(self) -> None:
        """As ``MemberLink.shutdown``."""
        self._engine.shutdown()


def _manifest(info: dict[str, Any]) -> Manifest:
    """Of vLLM's update info."""
    described = zip(info["names"], info["shapes"], info["dtype_names"], strict=True)
    return {name: (tuple(shape), kind) for name, shape, kind in described}


def _on_device(device: torch.device, action: Callable[[], None], abort: Callable[[], None]) -> None:
    """``action`` with ``device`` as this thread's; it is broken off when it takes too long."""
    timer = threading.Timer(RECEIVE_S, abort)
    timer.daemon = True
    timer.start()
    try:
        with torch.accelerator.device_index(device.index):
            action()
    finally:
        timer.cancel()
