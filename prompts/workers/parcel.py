"""Objects with large tensors and arrays, sent from a process to its parent without copies.

The buffers lie in an anonymous memory file (memfd_create(2)) whose descriptor follows the pickled
rest. The receiver maps it. Nothing has a name that could outlive a killed process, and once mapped
the memory does not need the sender any more."""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch
from torch import Tensor

#: Of a buffer's begin, in bytes: no type of tensor needs more.
ALIGNMENT = 64
#: Bytes that go through the pipe itself: a mapping of its own takes more.
SMALL = 1 << 16


class _Pickler(pickle.Pickler):
    """Leaves the bytes of dense tensors on the CPU to ``buffers``; pickle does so with arrays."""

    def __init__(self, file: io.BytesIO, buffers: list[memoryview]) -> None:
        def keep(buffer: pickle.PickleBuffer) -> None:
            buffers.append(buffer.raw())

        super().__init__(file, protocol=5, buffer_callback=keep)

    def reducer_override(self, value: object) -> Any:
        if type(value) is not Tensor or value.device.type != "cpu" or value.layout != torch.strided:
            return NotImplemented
        # As bytes: NumPy knows no bfloat16.
        flat = value.detach().contiguous().as_strided((value.numel(),), (1,))
        raw = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # is a buffer
        return _tensor, (pickle.PickleBuffer(raw), value.dtype, tuple(value.shape))


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor on the memory of ``buffer``, which lives as long as it."""
    if not len(buffer):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)


def send(pipe: Connection, receiver: int, value: object) -> None:
    """``value`` to the process ``receiver`` at the other end of a two-way ``pipe``.

    Raises OSError when that is gone or memory is short, and what pickle raises.
    """
    file, buffers = io.BytesIO(), list[memoryview]()
    _Pickler(file, buffers).dump(value)
    spans = _spans([len(buffer) for buffer in buffers])
    size = spans[-1].stop if spans else 0
    if size <= SMALL:
        packed = bytearray(size)
        _fill(packed, spans, buffers)
        pipe.send((file.getvalue(), spans, packed))
        return
    shared = os.memfd_create("parcel")
    try:
        os.posix_fallocate(shared, 0, size)  # fails here, not with a signal at the first write
        with mmap.mmap(shared, size) as memory:
            _fill(memory, spans, buffers)
        pipe.send((file.getvalue(), spans, None))
        send_handle(pipe, shared, receiver)
    finally:
        os.close(shared)


def receive(pipe: Connection) -> Any:
    """What ``send`` sent. Raises EOFError or OSError when the sender is gone, and what unpickling
    raises. Only for processes of our own: unpickling runs what they name."""
    data, spans, packed = pipe.recv()
    if packed is not None:
        memory = memoryview(packed)
    else:
        memory = _mapped(recv_handle(pipe), spans[-1].stop)
    return pickle.loads(data, buffers=[memory[span] for span in spans])


def _mapped(shared: int, size: int) -> memoryview:
    """The memory of a descriptor, which is closed. (mmap.mmap would keep one for as long as the
    memory is in use, and a process has few.)"""
    try:
        path = f"/proc/self/fd/{shared}"
        found = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        return memoryview(found.numpy())  # type: ignore[arg-type]  # an array is a buffer
    finally:
        os.close(shared)


def _fill(memory: bytearray | mmap.mmap, spans: list[slice], buffers: list[memoryview]) -> None:
    for span, buffer in zip(spans, buffers, strict=True):
        memory[span] = buffer


def _spans(sizes: Sequence[int]) -> list[slice]:
    """Where buffers of these sizes lie, one behind the other."""
    found, end = [], 0
    for size in sizes:
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + size
        found.append(slice(begin, end))
    return found
