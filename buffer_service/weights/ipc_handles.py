"""Handles of CUDA IPC as plain data. torch describes a shared tensor by the arguments that rebuild
it, classes among them; a message that carries classes would have to be pickled, and whoever can
write to Redis could then run code in a worker."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

#: Arguments of torch's ``rebuild_cuda_tensor`` for a packed buffer.
Arguments: TypeAlias = "tuple[Any, ...]"
#: What stands for classes and types: a packed buffer is a tensor of bytes.
_FIXED = {0: torch.Tensor, 4: torch.storage.TypedStorage, 5: torch.uint8}


def to_plain(handles: dict[str, Arguments]) -> dict[str, list[Any]]:
    """By GPU: the arguments without classes. Raises ValueError for a tensor of another kind."""
    plain: dict[str, list[Any]] = {}
    for gpu, arguments in handles.items():
        given = list(arguments)
        for place, expected in _FIXED.items():
            found = given[place]
            if found is not expected:
                raise ValueError(
                    f"a packed buffer's handle has {found!r} in place {place}, not {expected!r}: "
                    "this torch describes shared tensors otherwise; set weights.transport to board"
                )
            given[place] = None
        plain[gpu] = [list(value) if isinstance(value, torch.Size) else value for value in given]
    return plain


def from_plain(handles: dict[str, list[Any]]) -> dict[str, Arguments]:
    """What ``to_plain`` was given."""
    found: dict[str, Arguments] = {}
    for gpu, plain in handles.items():
        given = list(plain)
        for place, value in _FIXED.items():
            given[place] = value
        given[1], given[2] = torch.Size(given[1]), tuple(given[2])
        found[gpu] = tuple(given)
    return found
