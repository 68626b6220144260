"""The turns of a learner rank that shares its device with a rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avatar_rl.common.turn_lock import TurnLock


class RankTurn:
    """The rank works between ``begin`` and ``end``, and nowhere else. Without a lock the device is
    its own, and its turn never ends."""

    def __init__(self, lock: TurnLock | None) -> None:
        self.lock = lock
        self.parked: ParkedState | None = None  # what leaves the device with the turn

    def begin(self) -> None:
        """Take the device. Raises ResourceError while an engine has it."""
        if self.lock is None:
            return
        self.lock.take()
        if self.parked is not None:
            self.parked.come_back()

    def end(self) -> None:
        """Leave the device to the engine."""
        if self.lock is None or not self.lock.held:
            return
        if self.parked is not None:
            self.parked.leave()
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()  # the allocator keeps the activations of the last step
        self.lock.give_back()

    def check(self) -> None:
        """Raises ResourceError outside the turn."""
        if self.lock is not None:
            self.lock.check()


class ParkedState:
    """Moves what a rank keeps on its device to host memory, and back to where it was.

    The bytes of a storage move, not its tensors: a storage is emptied and filled again. So views of
    it, such as the parameters in DeepSpeed's flat buffers, stay what they are under every ZeRO
    stage. Host buffers are kept from turn to turn, pinned where they come from a GPU.

    Args:
        roots: Gives the objects whose tensors move: modules, optimisers, DeepSpeed's wrappers.
        device: Of the tensors that move.
    """

    def __init__(self, roots: Callable[[], Iterable[object]], device: torch.device) -> None:
        self._roots, self.device = roots, device
        self._hosts: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._away: list[int] = []

    def leave(self) -> int:
        """Everything to the host; the bytes that moved."""
        if self._away:
            return 0
        hosts, on_gpu = {}, self.device.type == "cuda"
        for storage in self._storages():
            key, size = storage._cdata, storage.nbytes()
            _, host = self._hosts.get(key, (storage, None))
            if host is None or host.numel() != size:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
            host.copy_(_bytes(storage), non_blocking=on_gpu)
            hosts[key] = (storage, host)
        if on_gpu:
            torch.cuda.synchronize(self.device)
        self._hosts = hosts
        self._away = list(hosts)
        for storage, _ in hosts.values():
            storage.resize_(0)
        if on_gpu:
            torch.cuda.empty_cache()
        return sum(host.numel() for _, host in hosts.values())

    def come_back(self) -> None:
        """Everything to where it was."""
        for key in self._away:
            storage, host = self._hosts[key]
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=self.device.type == "cuda")
        if self._away and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._away = []

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Each storage once that has bytes on the device and can be emptied."""
        seen: set[int] = set()
        for root in self._roots():
            for tensor in tensors_of(root):
                if tensor.device.type != self.device.type or tensor.layout != torch.strided:
                    continue
                storage = tensor.untyped_storage()
                if storage._cdata in seen or not storage.nbytes() or not storage.resizable():
                    continue
                seen.add(storage._cdata)
                yield storage


def tensors_of(root: object) -> Iterator[Tensor]:
    """The tensors that an object holds: in containers, modules, optimisers and DeepSpeed's own
    objects, with their gradients and their ZeRO 3 shares."""
    pending, seen = [root], set[int]()
    while pending:
        item: Any = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
            pending += [item.grad] if item.is_leaf else []
            pending += [vars(item).get("ds_tensor")]
        elif isinstance(item, nn.Module):
            pending += [*item.parameters(), *item.buffers()]
        elif isinstance(item, Mapping):
            pending += list(item.values())
        elif isinstance(item, list | tuple | set):
            pending += list(item)
        elif isinstance(item, torch.optim.Optimizer):
            pending += [item.state, item.param_groups]
        elif type(item).__module__.startswith("deepspeed.runtime."):
            pending += list(getattr(item, "__dict__", {}).values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage as (bytes,) uint8."""
    found = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return found.set_(storage, 0, (storage.nbytes(),), (1,))
