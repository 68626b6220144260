"""The sender's ends of the links that are vLLM's own: NCCL, and CUDA IPC on a GPU that learner and
engine share. Not yet run on a GPU; the protocol around them is the one that the gloo twin runs."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from avatar_rl.buffer_service.weights.ipc_handles import to_plain
from avatar_rl.buffer_service.weights.links import PartSource, own_address
from avatar_rl.buffer_service.weights.transfer_client import (
    FORM_S,
    TransferClient,
    TransferError,
)

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer import WeightSource
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

#: Tensors are packed into buffers of this size, of which NCCL has two. That of IPC grows to the
#: largest tensor.
BUFFER_BYTES = 256 << 20


class _Client:
    """What vLLM's trainer calls: our client, and ``abort`` when the members fail while the trainer
    waits in a collective."""

    def __init__(self, client: TransferClient) -> None:
        self.client = client
        self.engine: NCCLTrainerWeightTransferEngine | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.client.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        try:
            self.client.update_weights(update_info)
        except TransferError:
            if self.engine is not None:
                self.engine.shutdown()  # aborts the communicator: a broadcast under way returns
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.client.finish_weight_update(weight_version)


class NcclSender:
    """vLLM's ``NCCLTrainerWeightTransferEngine`` on rank 0."""

    def __init__(self, client: TransferClient, source: PartSource) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        info = NCCLTrainerInitInfo(
            own_address(),
            port,
            1 + len(client.ranks),
            packed_buffer_size_bytes=BUFFER_BYTES,
            rank=0,
        )
        self._client = _Client(client)
        met: list[NCCLTrainerWeightTransferEngine] = []
        errors: list[BaseException] = []
        device = torch.accelerator.current_device_index()

        def meet() -> None:
            try:
                torch.accelerator.set_device_index(device)
                given = cast("WeightSource", source)
                found = NCCLTrainerWeightTransferEngine.trainer_init(
                    info, client=self._client, source=given
                )
                met.append(found)
            except BaseException as error:
                errors.append(error)

        # NCCL's own start cannot be broken off: a member that dies in it costs this thread.
        thread = threading.Thread(target=meet, name="nccl-meeting", daemon=True)
        thread.start()
        thread.join(FORM_S)
        if errors:
            raise errors[0]
        if not met:
            raise TransferError(f"NCCL formed no group of {info.world_size} within {FORM_S:g} s")
        self._engine = self._client.engine = met[0]

    def send_weights(self) -> None:
        """As ``SenderLink.send_weights``."""
        self._engine.send_weights()
        if self._engine.model_update_group is None:
            raise TransferError("the communicator was aborted")

    def shutdown(self) -> None:
        """As ``SenderLink.shutdown``: aborts the communicator."""
        self._engine.shutdown()


class _IpcClient(_Client):
    """Sends handles as plain data, and keeps errors until the pass is over: other ranks wait in
    collectives of vLLM's for this one."""

    def __init__(self, client: TransferClient) -> None:
        super().__init__(client)
        self.error: TransferError | None = None

    def update_weights(self, update_info: Any) -> None:
        if self.error is not None:
            return
        plain = {**update_info, "ipc_handles": to_plain(update_info["ipc_handles"])}
        try:
            self.client.update_weights(plain)
        except TransferError as error:
            self.error = error

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self.error is None:
            super().finish_weight_update(weight_version)


class IpcSender:
    """vLLM's ``IPCTrainerWeightTransferEngine`` on rank 0."""

    def __init__(self, client: TransferClient, source: PartSource) -> None:
        self._client, self._source = _IpcClient(client), source
        self._engine = _ipc_engine(self._client, source, rank=0)

    def send_weights(self) -> None:
        """As ``SenderLink.send_weights``."""
        self._engine.packed_buffer_size_bytes = _buffer_for(self._source)
        self._engine.send_weights()
        if self._client.error is not None:
            raise self._client.error

    def shutdown(self) -> None:
        """As ``SenderLink.shutdown``."""
        self._engine.shutdown()


class IpcFollower:
    """The same engine on the other ranks, whose GPUs have workers of their own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._source = PartSource([], dtype)
        self._engine: IPCTrainerWeightTransferEngine | None = None

    def send(
        self, layout: Sequence[Mapping[str, Tensor]], parts: Iterator[Mapping[str, Tensor]]
    ) -> None:
        """Take part in a pass of rank 0's."""
        if self._engine is None:
            self._engine = _ipc_engine(None, self._source, rank=1)
        self._source.layout = layout
        self._source.feed(parts)
        self._engine.packed_buffer_size_bytes = _buffer_for(self._source)
        self._engine.send_weights()


def _buffer_for(source: PartSource) -> int:
    """Bytes that take the largest tensor of a source."""
    largest = max((math.prod(m.shape) * m.dtype.itemsize for m in source.metadata()), default=0)
    return max(BUFFER_BYTES, largest)


def _ipc_engine(
    client: _IpcClient | None, source: PartSource, rank: int
) -> IPCTrainerWeightTransferEngine:
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCTrainerInitInfo,
        IPCTrainerWeightTransferEngine,
    )

    return IPCTrainerWeightTransferEngine.trainer_init(
        IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=BUFFER_BYTES, rank=rank),
        client=cast("_IpcClient", client),  # other ranks than the first never call it
        source=cast("WeightSource", source),
    )


def open_nccl(client: TransferClient, source: PartSource) -> NcclSender:
    """For ``RoadSender``."""
    return NcclSender(client, source)


def open_ipc(client: TransferClient, source: PartSource) -> IpcSender:
    """For ``RoadSender``."""
    return IpcSender(client, source)
