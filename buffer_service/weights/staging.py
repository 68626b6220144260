"""Host memory in which a member of a transfer collects a version beside the running engine.

Nothing of a version touches the engine before all of it is here, checked and committed. So a sender
that dies half-way leaves the engine as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from avatar_rl.buffer_service.weights.block import layout_of, views_of
from avatar_rl.buffer_service.weights.store import Manifest

#: Makes of a version's tensors what an engine takes, or raises ModelError.
Check = Callable[[Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]]


class Staging:
    """Collects one transfer at a time. Its memory is used again once it was given back."""

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned  # for fast copies to a GPU
        self._free: list[Tensor] = []
        self._memory: Tensor | None = None  # of what is being collected
        self._views: dict[str, Tensor] = {}
        self._filled: set[str] = set()

    def room(self, manifest: Manifest, counts: Sequence[int]) -> Iterator[Tensor]:
        """Memory for the tensors of ``manifest``: one part after another, ``counts`` tensors each,
        as bytes. A part counts as received when the next is asked for."""
        names = iter(manifest)
        self._reserve(sum(layout_of(_some(manifest, names, count))[1] for count in counts))
        names, at = iter(manifest), 0
        for count in counts:
            part = _some(manifest, names, count)
            offsets, size = layout_of(part)
            assert self._memory is not None
            flat = self._memory[at : at + size]
            yield flat
            self._views |= views_of(part, offsets, flat.numpy())
            self._filled |= part.keys()
            at += size

    def load_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy tensors from any device into the room of ``expect``; a loader, as vLLM's transfer
        engines know it."""
        loaded = set()
        for name, tensor in pairs:
            self._views[name].copy_(tensor, non_blocking=self.pinned)
            loaded.add(name)
        self._filled |= loaded
        return loaded

    def expect(self, manifest: Manifest, piece: int) -> None:
        """Make room for what ``load_weights`` will be given of a transfer's piece, from 0."""
        offsets, size = layout_of(manifest)
        if piece == 0:
            self._reserve(size)
        memory = self._memory if piece == 0 else self._new(size)
        assert memory is not None
        self._views |= views_of(manifest, offsets, memory.numpy())

    def taken(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """What was collected, with its memory for ``give_back``; the next transfer gets another.
        Raises KeyError for a tensor that did not come."""
        if missing := self._views.keys() - self._filled:
            raise KeyError(min(missing))
        found = self._views, self._memory
        self._memory, self._views, self._filled = None, {}, set()
        return found

    def discard(self) -> None:
        """Forget what was collected so far."""
        if self._memory is not None:
            self._free.append(self._memory)
        self._memory, self._views, self._filled = None, {}, set()

    def give_back(self, memory: Tensor | None) -> None:
        """Memory of ``taken`` that nobody reads any more."""
        if memory is not None and len(self._free) < 2:
            self._free.append(memory)

    def _reserve(self, size: int) -> None:
        self.discard()
        fitting = [memory for memory in self._free if memory.numel() == size]
        if fitting:
            self._free = [memory for memory in self._free if memory is not fitting[0]]
            self._memory = fitting[0]
        else:
            self._free.clear()
            self._memory = self._new(size)

    def _new(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)


def _some(manifest: Manifest, names: Iterator[str], count: int) -> Manifest:
    """The next ``count`` entries."""
    return {name: manifest[name] for name in itertools.islice(names, count)}
