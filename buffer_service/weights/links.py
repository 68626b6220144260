"""Links: how the tensors of one transfer travel from the sender to its group.

A link has two ends with the methods of vLLM's weight transfer engines, so that vLLM's own (NCCL,
CUDA IPC) and the gloo twin below are driven alike. The twin runs the protocol of the NCCL link on
CPUs: the same groups, calls and order, with broadcasts by gloo."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple, Protocol

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from avatar_rl.buffer_service.weights.block import DTYPES, WeightBlock, checksum_of
from avatar_rl.buffer_service.weights.staging import Staging
from avatar_rl.buffer_service.weights.transfer_client import TransferClient, TransferError

#: A member that is alive, and still does not take its part of a broadcast for so long, has hung.
GLOO_S = 30.0
POLL_S = 0.002  # between looks at who stands ready
MEET_S = 10.0  # for a group of gloo to meet; its members stand ready by then
_NAMES = {kind: name for name, kind in DTYPES.items()}


class TensorMeta(NamedTuple):
    """What a source will yield, as vLLM's ``ParamMeta``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PartSource:
    """Published tensors of one transfer, part by part, in the type that engines hold.

    ``layout``: the parts, tensors on the meta device by name. vLLM's engines take this for a
    ``WeightSource``: metadata at any time, and one pass over what ``feed`` was given.
    """

    def __init__(self, layout: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        self._parts: Iterator[Mapping[str, Tensor]] = iter(())

    def feed(self, parts: Iterator[Mapping[str, Tensor]]) -> None:
        """The parts of the next pass, in the layout's order; each is valid until the next is asked
        for."""
        self._parts = parts

    def metadata(self) -> list[TensorMeta]:
        """All tensors, in order."""
        return [
            TensorMeta(name, self._dtype(tensor), tuple(tensor.shape))
            for part in self.layout
            for name, tensor in part.items()
        ]

    def parts(self) -> Iterator[Mapping[str, Tensor]]:
        """The pass. Raises TransferError where it is not what the layout says."""
        for expected in self.layout:
            part = next(self._parts, {})
            if part.keys() != expected.keys():
                odd = min(part.keys() ^ expected.keys())
                raise TransferError(f"{odd!r} is missing from a transfer, or does not belong to it")
            yield {name: part[name] for name in expected}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts():
            for name, tensor in part.items():
                yield name, tensor.detach().to(self._dtype(tensor))

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype


class SenderLink(Protocol):
    """The sender's end; it has met the group."""

    def send_weights(self) -> None:
        """Send one pass of the source. Raises where not all of the group received it."""

    def shutdown(self) -> None:
        """Leave the group."""


class MemberLink(Protocol):
    """A member's end."""

    def meet(self, how: bytes, rank: int) -> None:
        """Join the group as ``rank``."""

    def receive(self, what: bytes, piece: int) -> list[int]:
        """Take a piece into the staging. Returns the checksums of its parts; none where the link
        has none."""

    def shutdown(self) -> None:
        """Leave the group; ends a call under way in another thread."""


class GlooMeeting(msgspec.Struct, frozen=True):
    """Where the members of a gloo group meet."""

    address: str
    port: int
    epoch: int
    size: int


class GlooPiece(msgspec.Struct, frozen=True):
    """Tensors of a transfer by gloo; ``counts``: how many make a part."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[tuple[int, ...]]
    counts: list[int]


def _group(store: dist.Store, meeting: GlooMeeting, rank: int) -> dist.ProcessGroupGloo:
    """Blocks until all are there; raises RuntimeError when they are not in time."""
    prefixed = dist.PrefixStore(f"epoch-{meeting.epoch}", store)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in the stubs
    # By the way to the sender, not by what this host's name happens to resolve to.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_route_to(meeting.address))]
    options._timeout = timedelta(seconds=MEET_S)
    return dist.ProcessGroupGloo(prefixed, rank, meeting.size, options)


def _route_to(address: str) -> str:
    """This host's own address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def _ready(epoch: int, rank: int) -> str:
    """Key of a member that stands ready to meet: gloo itself could not be broken off."""
    return f"ready-{epoch}-{rank}"


def _broadcast(group: dist.ProcessGroupGloo, flat: Tensor) -> None:
    if not flat.numel():
        return
    options = dist.BroadcastOptions()
    options.rootRank, options.timeout = 0, timedelta(seconds=GLOO_S)
    group.broadcast([flat], options).wait()  # type: ignore[attr-defined]  # not in the stubs


class GlooSender:
    """The twin of vLLM's ``NCCLTrainerWeightTransferEngine``."""

    def __init__(self, client: TransferClient, source: PartSource, store: dist.TCPStore) -> None:
        self.client, self.source = client, source
        size = 1 + len(client.ranks)
        meeting = GlooMeeting(own_address(), store.port, client.epoch, size)
        with ThreadPoolExecutor(1) as pool:  # the members meet while this end does
            met = pool.submit(client.init_weight_transfer_engine, msgspec.structs.asdict(meeting))
            waiting = [_ready(client.epoch, rank) for rank in range(1, size)]
            while not store.check(waiting):
                if met.done():
                    met.result()  # raises: nobody has met yet
                time.sleep(POLL_S)
            try:
                store.set(_ready(client.epoch, 0), "")
                self._group: dist.ProcessGroupGloo | None = _group(store, meeting, 0)
            except RuntimeError:
                client.give_up()
                raise
            met.result()
        self._memory: Tensor | None = None  # of the largest part

    def send_weights(self) -> None:
        """As ``SenderLink.send_weights``."""
        meta, client = self.source.metadata(), self.client
        piece = GlooPiece(
            names=[m.name for m in meta],
            dtype_names=[_NAMES[m.dtype] for m in meta],
            shapes=[m.shape for m in meta],
            counts=[len(part) for part in self.source.layout],
        )
        client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        try:
            received = pool.submit(client.update_weights, msgspec.structs.asdict(piece))
            for number, flat in enumerate(self._flats()):
                if received.done():
                    received.result()
                assert self._group is not None
                _broadcast(self._group, flat)
                client.on_phase(f"part {number}")
            received.result()
        finally:
            pool.shutdown(wait=False)  # it may still wait for members that will never answer
        client.finish_weight_update()

    def _flats(self) -> Iterator[Tensor]:
        """The bytes of each part, in the same memory again and again."""
        for part in self.source.parts():
            sizes = WeightBlock.size_of(part, self.source.dtype)
            if self._memory is None or self._memory.numel() < sizes:
                self._memory = torch.empty(sizes, dtype=torch.uint8)
            block = WeightBlock(part, self.source.dtype, memory=self._memory[:sizes].numpy())
            block.fill(part)
            flat = self._memory[:sizes]
            self.client.checksums.append(checksum_of(flat))
            yield flat

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


class GlooMember:
    """The twin of vLLM's ``NCCLWeightTransferEngine``: receives into ``staging``."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self._group: dist.ProcessGroupGloo | None = None

    def meet(self, how: bytes, rank: int) -> None:
        """As ``MemberLink.meet``. Raises RuntimeError when the others do not come."""
        meeting = msgspec.msgpack.decode(how, type=GlooMeeting)
        store = dist.TCPStore(
            meeting.address,
            meeting.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=GLOO_S),
        )
        store.set(_ready(meeting.epoch, rank), "")
        store.wait([_ready(meeting.epoch, 0)], timedelta(seconds=MEET_S))
        self._group = _group(store, meeting, rank)

    def receive(self, what: bytes, piece: int) -> list[int]:
        """As ``MemberLink.receive``. Raises RuntimeError when the sender or another member is
        gone."""
        found = msgspec.msgpack.decode(what, type=GlooPiece)
        assert self._group is not None
        manifest = {
            name: (tuple(shape), kind)
            for name, shape, kind in zip(found.names, found.shapes, found.dtype_names, strict=True)
        }
        checksums = []
        for flat in self.staging.room(manifest, found.counts):
            _broadcast(self._group, flat)
            checksums.append(checksum_of(flat))
        return checksums

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


def open_store() -> dist.TCPStore:
    """Where the groups of this sender meet, on a free port of this host."""
    address = own_address()
    listening = socket.create_server((address, 0))  # TCPStore itself would listen everywhere
    return dist.TCPStore(
        address,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=GLOO_S),
        master_listen_fd=listening.detach(),
    )


def own_address() -> str:
    """This host's address as other hosts of the run know it."""
    import ray

    if ray.is_initialized():
        return str(ray.util.get_node_ip_address())
    return socket.gethostbyname("localhost")
